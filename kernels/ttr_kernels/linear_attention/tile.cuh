// A product of two matrices for a 64×64 tile of the result, by 256 threads of 4×4 each, in float32.
#pragma once
#include "numeric.cuh"

constexpr int SIDE = 64, THREADS = 256, DEPTH = 16;
// Blocks of a multiprocessor: said, since the compiler would rather spill than have one fewer.
constexpr int BLOCKS = 3;
// Rows of staged operands are padded: neighbours in depth fall into different banks, and vectors stay aligned.
constexpr int STAGE_ROW = SIDE + 4, STAGE = 2 * DEPTH * STAGE_ROW;
// A tile in shared memory, read along rows and columns.
constexpr int SQUARE_ROW = SIDE + 1, SQUARE = SIDE * SQUARE_ROW;

struct Tile {
  float v[4][4];
};

// Where this thread's element (i, j) lies in the tile.
__device__ __forceinline__ int tile_row(int i) { return threadIdx.x / 16 * 4 + i; }
__device__ __forceinline__ int tile_column(int j) { return threadIdx.x % 16 * 4 + j; }

__device__ __forceinline__ Tile zeros() {
  Tile tile;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) tile.v[i][j] = 0.0f;
  return tile;
}

// How an operand lies in memory: its rows run along the depth or across it. Neighbouring threads load neighbours there.
enum Layout { ALONG, ACROSS };

// stage[k][i] = element(i, first + k), zeros beyond the depth.
template <Layout LAYOUT, class F>
__device__ __forceinline__ void fill_stage(float* stage, int first, int depth, F element) {
#pragma unroll
  for (int n = threadIdx.x; n < SIDE * DEPTH; n += THREADS) {
    const int i = LAYOUT == ALONG ? n / DEPTH : n % SIDE, k = LAYOUT == ALONG ? n % DEPTH : n / SIDE;
    stage[k * STAGE_ROW + i] = first + k < depth ? element(i, first + k) : 0.0f;
  }
}

// tile += Σ_k a(i, k) · b(j, k) for k < depth; both are zero beyond their rows. `stage` is for STAGE floats. All threads
// must call; what they wrote to shared memory before, a and b may read.
template <Layout A_LAYOUT, Layout B_LAYOUT, class A, class B>
__device__ __forceinline__ void multiply(Tile& tile, int depth, A a, B b, float* stage) {
  for (int first = 0; first < depth; first += DEPTH) {
    __syncthreads();
    fill_stage<A_LAYOUT>(stage, first, depth, a);
    fill_stage<B_LAYOUT>(stage + DEPTH * STAGE_ROW, first, depth, b);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
      float left[4], right[4];
      load_vec(stage + k * STAGE_ROW + tile_row(0), left);
      load_vec(stage + (DEPTH + k) * STAGE_ROW + tile_column(0), right);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) tile.v[i][j] = fmaf(left[i], right[j], tile.v[i][j]);
    }
  }
}

// Four threads share a row of the tile: Σ over n < count of value(row, n), the same bits in all four.
template <class F>
__device__ __forceinline__ float row_total(int count, F value) {
  float sum = 0.0f;
  for (int n = threadIdx.x % 4; n < count; n += 4) sum += value(int(threadIdx.x / 4), n);
  sum += __shfl_xor_sync(FULL_WARP, sum, 1);
  return sum + __shfl_xor_sync(FULL_WARP, sum, 2);
}
