// What the kernels of a chunk read, as elements of matrices, and the products that forward and backward share.
#pragma once
#include "chunk.cuh"

typedef TTR_T T;

// Below this a normalizer has underflowed: its weights are rounding, and its inverse might overflow.
__device__ __forceinline__ float inverse_of(float normalizer) { return normalizer > 1e-30f ? 1.0f / normalizer : 0.0f; }

// Positions beyond a chunk's count are zeros.
struct Queries {
  const float* values;  // (rows, heads, features)
  long long heads;
  int head;
  long long features;
  __device__ __forceinline__ float phi(const Chunk& chunk, int i, int m) const {
    return i < chunk.count ? values[((chunk.row + i) * heads + head) * features + m] : 0.0f;
  }
};

struct Keys {
  const float* exponents;  // (rows, heads, features)
  const T* v;
  long long stride, heads, head, dim, features;
  __device__ __forceinline__ float phi(const Chunk& chunk, int j, int m) const {
    return j < chunk.count ? expf(exponents[((chunk.row + j) * heads + head) * features + m] - chunk.shift) : 0.0f;
  }
  // [v, 1]
  __device__ __forceinline__ float value(const Chunk& chunk, int j, int e) const {
    if (j >= chunk.count) return 0.0f;
    return e < dim ? to_float(v[(chunk.row + j) * stride + head * dim + e]) : 1.0f;
  }
};

// φ(q_i)·φ(k_j) of all pairs.
__device__ __forceinline__ Tile products(const Chunk& chunk, const Queries& queries, const Keys& keys, float* stage) {
  Tile tile = zeros();
  multiply<ALONG, ALONG>(
      tile, int(keys.features), [&](int i, int m) { return queries.phi(chunk, i, m); },
      [&](int j, int m) { return keys.phi(chunk, j, m); }, stage);
  return tile;
}

// The tile under decay and causality, in shared memory.
__device__ __forceinline__ void store_decayed(const Chunk& chunk, const Tile& tile, float* square) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int query = tile_row(i), key = tile_column(j);
      const bool visible = key <= query && query < chunk.count;
      square[query * SQUARE_ROW + key] = visible ? tile.v[i][j] * chunk.weight(chunk.gap(query, key)) : 0.0f;
    }
}

// sums (features, dim + 1) = Σ_j left(j, m) · right(j, e) over the chunk's positions. Blocks share it by tiles, blockIdx.z;
// the last column, which would mostly need a tile of its own, comes with the first ones.
template <class L, class R>
__device__ __forceinline__ void store_chunk_sums(
    const Chunk& chunk, long long dim, long long features, float* sums, L left, R right, float* stage) {
  const int tiles = int(dim + SIDE - 1) / SIDE, first = blockIdx.z / tiles * SIDE, column = blockIdx.z % tiles * SIDE;
  Tile tile = zeros();
  multiply<ACROSS, ACROSS>(
      tile, chunk.count, [&](int i, int j) { return first + i < features ? left(j, first + i) : 0.0f; },
      [&](int e, int j) { return column + e < dim ? right(j, column + e) : 0.0f; }, stage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int m = first + tile_row(i), e = column + tile_column(j);
      if (m < features && e < dim) sums[m * (dim + 1) + e] = tile.v[i][j];
    }
  const int m = first + threadIdx.x;
  if (column == 0 && threadIdx.x < SIDE && m < features) {
    float sum = 0.0f;
    for (int j = 0; j < chunk.count; ++j) sum = fmaf(left(j, m), right(j, int(dim)), sum);
    sums[m * (dim + 1) + dim] = sum;
  }
}
