// Where a GPU and the tests' emulator differ: shared memory, and every instruction that CUDA C++ has no name for.
//
// Included by every kernel; the only file with inline PTX. With TTR_HOST the same kernel is compiled by g++ and each
// instruction is a call into the emulator (tests/emulator), whose header is found by -I.
//
// Fragments are passed by value. Their layouts are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16" (16-bit
// types) and "mma.m16n8k8" (.tf32), and of "ldmatrix".
#pragma once

#if defined(TTR_HOST)
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// NVRTC has no math.h.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#endif

struct f4 {
  float v[4];
};
struct u4 {
  unsigned v[4];
};

// TTR_SHARED(float, scratch, 32) declares a shared array; TTR_DYN_SMEM(float, tile) names the launch's dynamic shared
// memory, 128-byte aligned. Never a bare __shared__: the emulator watches what these declare.
#if defined(TTR_HOST)
#define TTR_SHARED(T, name, n) TTR_STATIC_SHARED_ALIGNED(T, name, n, 16)
#define TTR_DYN_SMEM(T, name) T* const name = reinterpret_cast<T*>(ttr_dyn_smem())
#else
#define TTR_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define TTR_DYN_SMEM(T, name)                                    \
  extern __shared__ __align__(128) unsigned char ttr_dynamic[]; \
  T* const name = reinterpret_cast<T*>(ttr_dynamic)
#endif

// c + a·b for a 16×16 a and a 16×8 b of 16-bit floats, summed in float32.
__device__ __forceinline__ f4 mma_bf16(u4 a, unsigned b0, unsigned b1, f4 c) {
#if defined(TTR_HOST)
  ttr_mma_m16n8k16_bf16(c.v, a.v, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
#endif
  return c;
}

__device__ __forceinline__ f4 mma_f16(u4 a, unsigned b0, unsigned b1, f4 c) {
#if defined(TTR_HOST)
  ttr_mma_m16n8k16_f16(c.v, a.v, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
#endif
  return c;
}

// c + a·b for a 16×8 a and an 8×8 b of TF32: float32 of which the tensor cores ignore the last 13 bits.
__device__ __forceinline__ f4 mma_tf32(u4 a, unsigned b0, unsigned b1, f4 c) {
#if defined(TTR_HOST)
  ttr_mma_m16n8k8_tf32(c.v, a.v, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
#endif
  return c;
}

// Four 8×8 matrices of 16-bit elements from shared memory. Lane i gives the address of row i mod 8 of matrix i div 8,
// 16-byte aligned; a lane receives of each matrix the two elements that a fragment of mma holds.
template <bool TRANS>
__device__ __forceinline__ u4 ldsm_x4(const void* row) {
  u4 r;
#if defined(TTR_HOST)
  ttr_ldmatrix_x4(r.v, row, TRANS);
#else
  const unsigned at = (unsigned)__cvta_generic_to_shared(row);
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
                 : "r"(at)
                 : "memory");
#endif
  return r;
}

// Start copying 16 bytes from global to shared memory, both 16-byte aligned; zeros where `inside` is false, and then
// `from` is not read (but must be a valid address).
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool inside) {
#if defined(TTR_HOST)
  ttr_cp_async(to, from, 16, inside ? 16 : 0);
#else
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#endif
}

// The copies started since the last commit form a group.
__device__ __forceinline__ void cp_async_commit() {
#if defined(TTR_HOST)
  ttr_cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most the N last groups of this thread are under way. Other threads see the copies after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if defined(TTR_HOST)
  ttr_cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Two floats rounded to nearest, `low` in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return (unsigned)__bfloat16_as_ushort(pair.x) | (unsigned)__bfloat16_as_ushort(pair.y) << 16;
}
__device__ __forceinline__ unsigned pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return (unsigned)__half_as_ushort(__low2half(pair)) | (unsigned)__half_as_ushort(__high2half(pair)) << 16;
}

// 2^x, log2(x) and 1/x as the special-function units give them: relative errors of 2^-22, 2^-22 (absolute near 1) and
// 2^-23; subnormal numbers count as zero. The standard functions add a few instructions each to mend that.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(TTR_HOST)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float log2_fast(float x) {
#if defined(TTR_HOST)
  return log2f(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(TTR_HOST)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
