// Rows that are held in registers: TTR_THREADS threads share a row, each holds TTR_ITEMS vectors of TTR_VECTOR elements of
// it (see rows.py, which chooses the three). A row is one warp's work, four rows to a block, or a whole block's.
#pragma once
#include "numeric.cuh"

constexpr int VECTOR = TTR_VECTOR, ITEMS = TTR_ITEMS, ROW_THREADS = TTR_THREADS;
constexpr int BLOCK = ROW_THREADS == 32 ? 128 : ROW_THREADS;
constexpr int BLOCK_ROWS = BLOCK / ROW_THREADS;

struct Row {
  float v[ITEMS][VECTOR];
};

// Which of its block's rows this thread works on, and its number among the threads of that row.
__device__ __forceinline__ int row_in_block() { return threadIdx.x / ROW_THREADS; }
__device__ __forceinline__ int place_in_row() { return threadIdx.x % ROW_THREADS; }
// The first element of this thread's vector `item`; it is beyond the row's end if not below the row's width.
__device__ __forceinline__ int element_of(int item) { return (item * ROW_THREADS + place_in_row()) * VECTOR; }

// The thread's part of a row; zeros beyond its end.
template <class T>
__device__ __forceinline__ Row load_row(const T* from, int width) {
  Row row;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int at = element_of(i);
    if (at < width) {
      load_vec(from + at, row.v[i]);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) row.v[i][j] = 0.0f;
    }
  }
  return row;
}

template <class T>
__device__ __forceinline__ void store_row(T* to, int width, const Row& row) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int at = element_of(i);
    if (at < width) store_vec(to + at, row.v[i]);
  }
}

__device__ __forceinline__ void add_to(Row& sum, const Row& row) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum.v[i][j] += row.v[i][j];
}

// a + b, rounded to T as it would be stored.
template <class T>
__device__ __forceinline__ Row rounded_sum(const Row& a, const Row& b) {
  Row sum;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum.v[i][j] = to_float(from_float<T>(a.v[i][j] + b.v[i][j]));
  return sum;
}

// Σ over the threads of a row, the same bits in all of them. `scratch` has 32 places.
__device__ __forceinline__ float row_sum(float value, float* scratch) { return block_sum<ROW_THREADS>(value, scratch); }

// Add up what each of the block's rows has summed, in order, and store it as the block's line of `partials`.
// `scratch` has as many places as COMBINE says. All threads must call.
constexpr int COMBINE = BLOCK_ROWS == 1 ? 1 : (BLOCK_ROWS - 1) * ROW_THREADS * ITEMS * VECTOR;
__device__ __forceinline__ void store_partials(float* partials, int width, Row& sums, float* scratch) {
  if (BLOCK_ROWS > 1) {
    constexpr int ROW = ROW_THREADS * ITEMS * VECTOR;
    __syncthreads();  // an earlier call's sums may still be read
    // A thread's places are ROW_THREADS apart, so that a warp's fall into different banks.
    if (row_in_block() > 0) {
#pragma unroll
      for (int i = 0; i < ITEMS * VECTOR; ++i)
        scratch[(row_in_block() - 1) * ROW + i * ROW_THREADS + place_in_row()] = sums.v[i / VECTOR][i % VECTOR];
    }
    __syncthreads();
    if (row_in_block() > 0) return;
#pragma unroll
    for (int row = 0; row < BLOCK_ROWS - 1; ++row)
#pragma unroll
      for (int i = 0; i < ITEMS * VECTOR; ++i)
        sums.v[i / VECTOR][i % VECTOR] += scratch[row * ROW + i * ROW_THREADS + place_in_row()];
  }
  float* line = partials + (long long)blockIdx.x * width;
  store_row(line, width, sums);
}
