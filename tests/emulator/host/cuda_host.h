// CUDA C++ for g++: what a .cu finds when it is compiled for the host (-DTTR_HOST, from device.cuh).
//
// Thread indices, shared memory, barriers, shuffles, votes, atomics and the names of CUDA's device functions. The ttr_*
// functions are the emulator's runtime; device.cuh calls those that stand for inline PTX (mma, ldmatrix, cp.async).
// Types and conversions of 16-bit floats are NVIDIA's own headers, which know the host.
#ifndef TTR_CUDA_HOST_H
#define TTR_CUDA_HOST_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A shared array must be carved from the emulator's memory, where it is watched.
#undef __shared__
#define __shared__ static_assert(false, "use TTR_SHARED or TTR_DYN_SMEM of device.cuh");
#undef __global__
#define __global__ __attribute__((noinline))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __constant__
#define __constant__
#undef __grid_constant__
#define __grid_constant__

extern "C" {
struct ttr_index {
  unsigned x, y, z;
};
// Constant for a thread's whole life, so that g++ may keep the result.
ttr_index ttr_threadIdx() __attribute__((const));
ttr_index ttr_blockIdx() __attribute__((const));
ttr_index ttr_blockDim() __attribute__((const));
ttr_index ttr_gridDim() __attribute__((const));
void* ttr_dyn_smem() __attribute__((const));
void* ttr_static_smem(const void* key, size_t bytes, size_t alignment);

void ttr_syncthreads(const char* file, int line);
int ttr_syncthreads_reduce(int predicate, int what, const char* file, int line);
void ttr_bar_sync(int id, int count);
void ttr_bar_arrive(int id, int count);

void ttr_syncwarp(unsigned mask);
uint64_t ttr_shfl(unsigned mask, uint64_t value, int source_lane);
unsigned ttr_ballot(unsigned mask, int predicate);
unsigned ttr_reduce(unsigned mask, unsigned value, int kind, int is_signed);

// c += a · b; registers as the PTX ISA lays them out.
void ttr_mma_m16n8k16_bf16(float* c, const unsigned* a, unsigned b0, unsigned b1);
void ttr_mma_m16n8k16_f16(float* c, const unsigned* a, unsigned b0, unsigned b1);
void ttr_mma_m16n8k8_tf32(float* c, const unsigned* a, unsigned b0, unsigned b1);
void ttr_ldmatrix_x1(unsigned* result, const void* row, bool transposed);
void ttr_ldmatrix_x2(unsigned* result, const void* row, bool transposed);
void ttr_ldmatrix_x4(unsigned* result, const void* row, bool transposed);
void ttr_cp_async(void* to, const void* from, int bytes, int from_source);  // bytes past from_source become zeros
void ttr_cp_async_commit();
void ttr_cp_async_wait(int groups_left);

void ttr_atomic_access(void* address, int bytes, int is_float);
[[noreturn]] void ttr_assertion_failed(const char* condition);
int ttr_run(void (*entry)(void*), void* arguments, const unsigned* grid, const unsigned* block, size_t dynamic_bytes,
            uint64_t seed, int checking, double seconds);
}

#define threadIdx ttr_threadIdx()
#define blockIdx ttr_blockIdx()
#define blockDim ttr_blockDim()
#define gridDim ttr_gridDim()
#define warpSize 32

// The address of a local static tells one array from another.
#define TTR_STATIC_SHARED_ALIGNED(T, name, n, alignment) \
  static char ttr_key_of_##name;                         \
  T* const name = static_cast<T*>(ttr_static_smem(&ttr_key_of_##name, sizeof(T) * (n), alignment))
#define TTR_STATIC_SHARED(T, name, n) TTR_STATIC_SHARED_ALIGNED(T, name, n, alignof(T))

#undef assert
#define assert(condition) ((condition) ? void(0) : ttr_assertion_failed(#condition))
#define __trap() ttr_assertion_failed("__trap()")
#define __builtin_assume(condition) void(0)
#define __CUDA_ALIGN__(n) __attribute__((aligned(n)))

// --- barriers. The place of the call tells whether threads stand at different ones.

__forceinline__ void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ttr_syncthreads(file, line);
}
__forceinline__ int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return ttr_syncthreads_reduce(predicate, 0, file, line);
}
__forceinline__ int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return ttr_syncthreads_reduce(predicate, 1, file, line);
}
__forceinline__ int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return ttr_syncthreads_reduce(predicate, 2, file, line);
}
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { ttr_syncwarp(mask); }
// These order a thread's own writes only; here every thread sees them in that order anyway.
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}

// --- warp

__forceinline__ int ttr_lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

template <class T>
__forceinline__ T ttr_shuffle(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles carry 32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = ttr_shfl(mask, bits, source_lane);
  memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}
// A warp is cut into segments of `width` lanes; a source outside the segment leaves a lane its own value.
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return ttr_shuffle(mask, value, (ttr_lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  int lane = ttr_lane(), source = lane ^ lanes, segment_end = (lane & ~(width - 1)) + width;
  return ttr_shuffle(mask, value, source < segment_end ? source : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  int lane = ttr_lane(), room = width - 1 - (lane & (width - 1));
  return ttr_shuffle(mask, value, static_cast<int>(lanes) <= room ? lane + static_cast<int>(lanes) : lane);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  int lane = ttr_lane(), room = lane & (width - 1);
  return ttr_shuffle(mask, value, static_cast<int>(lanes) <= room ? lane - static_cast<int>(lanes) : lane);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return ttr_ballot(mask, predicate); }
__forceinline__ int __any_sync(unsigned mask, int predicate) { return ttr_ballot(mask, predicate) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return ttr_ballot(mask, !predicate) == 0; }

__forceinline__ unsigned __reduce_add_sync(unsigned mask, unsigned value) { return ttr_reduce(mask, value, '+', 0); }
__forceinline__ unsigned __reduce_min_sync(unsigned mask, unsigned value) { return ttr_reduce(mask, value, '<', 0); }
__forceinline__ unsigned __reduce_max_sync(unsigned mask, unsigned value) { return ttr_reduce(mask, value, '>', 0); }
__forceinline__ int __reduce_add_sync(unsigned mask, int value) { return (int)ttr_reduce(mask, (unsigned)value, '+', 1); }
__forceinline__ int __reduce_min_sync(unsigned mask, int value) { return (int)ttr_reduce(mask, (unsigned)value, '<', 1); }
__forceinline__ int __reduce_max_sync(unsigned mask, int value) { return (int)ttr_reduce(mask, (unsigned)value, '>', 1); }
__forceinline__ unsigned __reduce_and_sync(unsigned mask, unsigned value) { return ttr_reduce(mask, value, '&', 0); }
__forceinline__ unsigned __reduce_or_sync(unsigned mask, unsigned value) { return ttr_reduce(mask, value, '|', 0); }
__forceinline__ unsigned __reduce_xor_sync(unsigned mask, unsigned value) { return ttr_reduce(mask, value, '^', 0); }

// --- atomics: checked as such by the runtime, so not instrumented

#define TTR_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

template <class T, class Change>
static TTR_UNWATCHED T ttr_exchange(T* address, Change change) {
  T old = *address;
  *address = change(old);
  return old;
}
template <class T, class Change>
__forceinline__ T ttr_atomic(T* address, Change change) {
  ttr_atomic_access(address, sizeof(T), !std::is_integral<T>::value);
  return ttr_exchange(address, change);
}
#define TTR_ATOMIC(name, result)                                         \
  template <class T>                                                     \
  __forceinline__ T name(T* address, std::common_type_t<T> value) {        \
    return ttr_atomic(address, [&](T old) { return (T)(result); });      \
  }
TTR_ATOMIC(atomicAdd, old + value)
TTR_ATOMIC(atomicSub, old - value)
TTR_ATOMIC(atomicExch, ((void)old, value))
TTR_ATOMIC(atomicMin, value < old ? value : old)
TTR_ATOMIC(atomicMax, value > old ? value : old)
TTR_ATOMIC(atomicAnd, old & value)
TTR_ATOMIC(atomicOr, old | value)
TTR_ATOMIC(atomicXor, old ^ value)
TTR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
TTR_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
template <class T>
__forceinline__ T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return ttr_atomic(address, [&](T old) { return old == expected ? value : old; });
}

#include "cuda_math.h"

// --- how emulator.py launches a kernel: by the addresses of its arguments, and after a look at their types

// f d h b: float, double, half, bfloat16; c s i q: integers of 1, 2, 4, 8 bytes, capital when unsigned; *: others.
template <class T>
constexpr char ttr_type_code() {
  using U = std::remove_cv_t<T>;
  if (std::is_same<U, float>::value) return 'f';
  if (std::is_same<U, double>::value) return 'd';
  if (std::is_same<U, __half>::value) return 'h';
  if (std::is_same<U, __nv_bfloat16>::value) return 'b';
  if (!std::is_integral<U>::value) return '*';
  char code = sizeof(U) == 1 ? 'c' : sizeof(U) == 2 ? 's' : sizeof(U) == 4 ? 'i' : 'q';
  return static_cast<char>(std::is_signed<U>::value ? code : code - 'a' + 'A');
}
// Two letters for each parameter: "pf" a pointer to floats, "=q" a long long.
template <class T>
__forceinline__ void ttr_append_code(char*& text) {
  *text++ = std::is_pointer<std::remove_cv_t<T>>::value ? 'p' : '=';
  *text++ = ttr_type_code<std::remove_pointer_t<std::remove_cv_t<T>>>();
}

template <class... T>
struct ttr_launcher {
  void (*kernel)(T...);
  void** arguments;

  template <size_t... I>
  __attribute__((no_sanitize("thread"))) void call(std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<T>*>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread"))) static void entry(void* self) {
    static_cast<ttr_launcher*>(self)->call(std::index_sequence_for<T...>{});
  }
};
template <class... T>
int ttr_launch(void (*kernel)(T...), void** arguments, const unsigned* grid, const unsigned* block, size_t dynamic_bytes,
               uint64_t seed, int checking, double seconds) {
  ttr_launcher<T...> launcher{kernel, arguments};
  return ttr_run(&ttr_launcher<T...>::entry, &launcher, grid, block, dynamic_bytes, seed, checking, seconds);
}
template <class... T>
const char* ttr_signature(void (*)(T...)) {
  static char text[2 * sizeof...(T) + 1];
  char* end = text;
  (ttr_append_code<T>(end), ...);
  return text;
}
#define TTR_EXPORT(name)                                                                                               \
  extern "C" __attribute__((visibility("default"))) int ttr_launch_##name(                                             \
      void** arguments, const unsigned* grid, const unsigned* block, size_t bytes, uint64_t seed, int checking,        \
      double seconds) {                                                                                                \
    return ttr_launch(&name, arguments, grid, block, bytes, seed, checking, seconds);                                  \
  }                                                                                                                    \
  extern "C" __attribute__((visibility("default"))) const char* ttr_signature_##name() { return ttr_signature(&name); }

#endif
