// Conversions, vector loads and stores, and sums over a warp or block in a fixed order.
#pragma once
#include "device.cuh"

constexpr unsigned FULL_WARP = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// N elements that one thread moves, in transfers of up to 16 bytes. The address must be a multiple of the transfer.
template <int N, class T>
struct Pack {
  static constexpr int BYTES = N * int(sizeof(T));
  static constexpr int TRANSFER = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : BYTES % 4 == 0 ? 4 : 2;
  static constexpr int PER_TRANSFER = TRANSFER / int(sizeof(T));
  struct alignas(TRANSFER) Transfer {
    T v[PER_TRANSFER];
  };
};

template <int N, class T>
__device__ __forceinline__ void load_vec(const T* from, float (&values)[N]) {
  using P = Pack<N, T>;
#pragma unroll
  for (int i = 0; i < N; i += P::PER_TRANSFER) {
    const typename P::Transfer transfer = *reinterpret_cast<const typename P::Transfer*>(from + i);
#pragma unroll
    for (int j = 0; j < P::PER_TRANSFER; ++j) values[i + j] = to_float(transfer.v[j]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_vec(T* to, const float (&values)[N]) {
  using P = Pack<N, T>;
#pragma unroll
  for (int i = 0; i < N; i += P::PER_TRANSFER) {
    typename P::Transfer transfer;
#pragma unroll
    for (int j = 0; j < P::PER_TRANSFER; ++j) transfer.v[j] = from_float<T>(values[i + j]);
    *reinterpret_cast<typename P::Transfer*>(to + i) = transfer;
  }
}

// Σ and maximum over the 32 lanes, the same bits in every lane. All lanes must call.
template <class F>
__device__ __forceinline__ F warp_sum(F value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, lanes));
  return value;
}

// Σ and maximum over a one-dimensional block of THREADS, the same bits in every thread. `scratch` has a place for each
// warp; it may be used again as soon as the call returns. All threads must call.
template <int THREADS, class F>
__device__ __forceinline__ F block_sum(F value, F* scratch) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
  value = warp_sum(value);
  if (THREADS == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  F total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}
template <int THREADS>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
  value = warp_max(value);
  if (THREADS == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) largest = fmaxf(largest, scratch[warp]);
  __syncthreads();
  return largest;
}
