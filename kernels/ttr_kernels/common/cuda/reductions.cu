// Sums over the rows of a matrix, in an order that depends on its size alone.
#include "numeric.cuh"

constexpr int LINES = 32;

// total[c] += Σ partials[p][c] over p, for 32 columns c per block of 32 × 32 threads; partials (parts, width).
template <class F>
__device__ __forceinline__ void add_parts(
    const F* __restrict__ partials, long long parts, long long width, float* total, long long stride, F* sums) {
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32;
  const long long column = (long long)blockIdx.x * 32 + lane;
  F sum = 0;
  if (column < width)
    for (long long part = line; part < parts; part += LINES) sum += partials[part * width + column];
  // Each line of the block has a row of 33 places, so that a warp reads a column of them from 32 banks.
  sums[line * 33 + lane] = sum;
  __syncthreads();
  const F all = warp_sum(sums[lane * 33 + line]);
  const long long summed = (long long)blockIdx.x * 32 + line;
  if (lane == 0 && summed < width) total[summed * stride] += float(all);
}

extern "C" __global__ void __launch_bounds__(1024) add_partials(
    const float* __restrict__ partials, long long parts, long long width, float* total, long long stride) {
  TTR_SHARED(float, sums, 32 * 33);
  add_parts(partials, parts, width, total, stride, sums);
}

extern "C" __global__ void __launch_bounds__(1024) add_partials_double(
    const double* __restrict__ partials, long long parts, long long width, float* total, long long stride) {
  TTR_SHARED(double, sums, 32 * 33);
  add_parts(partials, parts, width, total, stride, sums);
}

// partials[blockIdx.y][c] = Σ x[row][c] over the rows of part blockIdx.y, for 32 · TTR_VECTOR columns per block of 8 warps.
extern "C" __global__ void __launch_bounds__(256) column_sums(
    const TTR_T* __restrict__ x, long long stride, long long rows, long long rows_per_part, long long width,
    float* partials) {
  constexpr int VECTOR = TTR_VECTOR, WARPS = 8;
  TTR_SHARED(float, sums, WARPS * VECTOR * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long column = ((long long)blockIdx.x * 32 + lane) * VECTOR;
  const long long first = blockIdx.y * rows_per_part, last = min(first + rows_per_part, rows);
  float sum[VECTOR];
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) sum[j] = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (long long row = first + warp; row < last; row += WARPS) {
      float values[VECTOR];
      load_vec(x + row * stride + column, values);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sum[j] += values[j];
    }
  }
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) sums[(warp * VECTOR + j) * 32 + lane] = sum[j];
  __syncthreads();
  for (int i = threadIdx.x; i < VECTOR * 32; i += 256) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += sums[w * VECTOR * 32 + i];
    // Place i holds element i / 32 of the vector of lane i % 32.
    const long long at = ((long long)blockIdx.x * 32 + i % 32) * VECTOR + i / 32;
    if (at < width) partials[blockIdx.y * width + at] = all;
  }
}
