// Loads, products and stores of tiles (their layout: operand.cuh). Products leave their result in registers, as
// accumulators [m][n] of 16 rows × 8 columns each; the accumulators of one product are the left operand of the next.
#pragma once
#include "operand.cuh"

constexpr int THREADS = 32 * TTR_WARPS;

// Start copying rows 0 .. count of global memory into a tile of ROWS rows; what lies beyond `count` or `dim` becomes zero.
// Where a round of all threads is a multiple of 8 rows, a thread's address moves by constants from round to round.
template <int ROWS>
__device__ __forceinline__ void load_tile(Element* tile, const Element* rows, long long stride, int count, int dim) {
  constexpr int ROUND = THREADS / CHUNKS;
  static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies in every round");
  if (THREADS % CHUNKS == 0 && ROUND % 8 == 0) {
    const int row = int(threadIdx.x) / CHUNKS, chunk = int(threadIdx.x) % CHUNKS;
    const Element* from = rows + row * stride + chunk * CHUNK;
    Element* const to = tile + place(row, chunk);
    const int valid = chunk * CHUNK < dim ? count - row : 0;
#pragma unroll
    for (int begin = 0; begin < ROWS; begin += ROUND) {
      cp_async16(to + begin * WIDTH, begin < valid ? from : rows, begin < valid);
      from += ROUND * stride;
    }
  } else {
#pragma unroll
    for (int begin = 0; begin < ROWS * CHUNKS; begin += THREADS) {
      const int i = begin + int(threadIdx.x);
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const bool inside = row < count && chunk * CHUNK < dim;
      cp_async16(tile + place(row, chunk), inside ? rows + row * stride + chunk * CHUNK : rows, inside);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(f4 (&acc)[M][N]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) acc[m][n] = f4{{0.0f, 0.0f, 0.0f, 0.0f}};
}

// acc += left · rightᵀ, contracted over WIDTH: 16·M rows of the left tile from `row` on, the first 8·N of the right one.
template <int M, int N>
__device__ __forceinline__ void multiply_rows(f4 (&acc)[M][N], const Element* left, int row, const Element* right) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < CHUNKS; k += 2) {
    Operand<Element>::Left a[M];
#pragma unroll
    for (int m = 0; m < M; ++m)
      a[m] = Operand<Element>::left(ldsm_x4<false>(left + place(row + 16 * m + (lane & 15), k + (lane >> 4))));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      // Matrices of the load: rows 0-7 at both chunks, rows 8-15 at both chunks.
      const u4 b = ldsm_x4<false>(right + place(8 * n + 8 * (lane >> 4) + (lane & 7), k + ((lane >> 3) & 1)));
      const Operand<Element>::Right b0 = Operand<Element>::right(b.v[0], b.v[1]);
      const Operand<Element>::Right b1 = Operand<Element>::right(b.v[2], b.v[3]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        acc[m][n] = multiply_add(a[m], b0, acc[m][n]);
        acc[m][n + 1] = multiply_add(a[m], b1, acc[m][n + 1]);
      }
    }
  }
}

// acc += left · right, contracted over the 8·K rows of `right`: left is the result of an earlier product, and of `right`
// the 8·N columns from `column` on are taken.
template <int M, int K, int N>
__device__ __forceinline__ void multiply_columns(
    f4 (&acc)[M][N], const f4 (&left)[M][K], const Element* right, int column) {
  constexpr int STEP = Operand<Element>::STEP;
#pragma unroll
  for (int k = 0; k < K; k += STEP) {
    Operand<Element>::Left a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = Operand<Element>::left(left[m][k], left[m][k + STEP - 1]);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      Operand<Element>::Right b0, b1;
      Operand<Element>::columns(right, 8 * k, column + 8 * n, b0, b1);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        acc[m][n] = multiply_add(a[m], b0, acc[m][n]);
        acc[m][n + 1] = multiply_add(a[m], b1, acc[m][n + 1]);
      }
    }
  }
}

__device__ __forceinline__ void put_pair(__nv_bfloat16* at, float x, float y) {
  *reinterpret_cast<unsigned*>(at) = pack_bf16(x, y);
}
__device__ __forceinline__ void put_pair(__half* at, float x, float y) {
  *reinterpret_cast<unsigned*>(at) = pack_f16(x, y);
}
__device__ __forceinline__ void put_pair(float* at, float x, float y) {
  *reinterpret_cast<float2*>(at) = make_float2(x, y);
}

// Store the warp's 16·M rows, columns `column` .. + 8·N, to global memory, where row 0 of the tile is `rows`: through the
// rows of `tile` from `row` on, which no other warp may use, so that the stores are chunks and whole lines.
template <int M, int N>
__device__ __forceinline__ void store_tile(
    Element* rows, long long stride, int count, int dim, const f4 (&acc)[M][N], Element* tile, int row, int column) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  __syncwarp(0xffffffffu);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int at = column + 8 * n + 2 * t;
      put_pair(tile + place(row + 16 * m + g, at / CHUNK) + at % CHUNK, acc[m][n].v[0], acc[m][n].v[1]);
      put_pair(tile + place(row + 16 * m + g + 8, at / CHUNK) + at % CHUNK, acc[m][n].v[2], acc[m][n].v[3]);
    }
  __syncwarp(0xffffffffu);
  constexpr int PER_ROW = 8 * N / CHUNK;
#pragma unroll
  for (int begin = 0; begin < 16 * M * PER_ROW; begin += 32) {
    const int i = begin + lane, r = row + i / PER_ROW, chunk = column / CHUNK + i % PER_ROW;
    if (r < count && chunk * CHUNK < dim)
      *reinterpret_cast<uint4*>(rows + r * stride + chunk * CHUNK) =
          *reinterpret_cast<const uint4*>(tile + place(r, chunk));
  }
}
