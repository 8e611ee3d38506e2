// From rows of queries and keys to their random features, and back from the features' gradients.
#include "tile.cuh"

typedef TTR_T T;

// result (rows, heads, count): of keys the exponents ω·x̂ − |x̂|²/2, with the largest of each row; of queries φ, relative to
// the largest of its row. `directions` is ω transposed, (dim, count). 64 rows of one head per block.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_attention_features(
    const T* __restrict__ x, long long stride, long long rows, long long heads, long long dim,
    const float* __restrict__ directions, long long count, float root, float* result, float* largest,
    long long queries) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, squares, SIDE);
  const long long first = (long long)blockIdx.x * SIDE;
  const int head = blockIdx.y;
  const auto scaled = [&](int i, int d) {
    return first + i < rows ? to_float(x[(first + i) * stride + head * dim + d]) * root : 0.0f;
  };
  const float square = row_total(int(dim), [&](int i, int d) { return scaled(i, d) * scaled(i, d); });
  if (threadIdx.x % 4 == 0) squares[threadIdx.x / 4] = square;
  float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int m = 0; m < count; m += SIDE) {
    Tile tile = zeros();
    multiply<ALONG, ACROSS>(
        tile, int(dim), scaled, [&](int j, int d) { return m + j < count ? directions[d * count + m + j] : 0.0f; },
        stage);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const long long row = first + tile_row(i);
        const int column = m + tile_column(j);
        if (row >= rows || column >= count) continue;
        const float exponent = tile.v[i][j] - (queries ? 0.0f : 0.5f * squares[tile_row(i)]);
        top[i] = fmaxf(top[i], exponent);
        result[(row * heads + head) * count + column] = exponent;
      }
  }
  // Sixteen neighbouring threads share their rows.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes >>= 1) top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], lanes));
    const long long row = first + tile_row(i);
    if (row >= rows) continue;
    if (!queries) {
      if (threadIdx.x % 16 == 0) largest[row * heads + head] = top[i];
      continue;
    }
    // Each thread reads what it has written itself.
    for (int m = 0; m < count; m += SIDE)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* value = result + (row * heads + head) * count + m + tile_column(j);
        if (m + tile_column(j) < count) *value = expf(*value - top[i]);
      }
  }
}

// dx = root · (ωᵀ dE − x̂ Σ_r dE_r), dE the sum of dexponents (rows, heads · group, count) over the group of each head. A
// block has 64 rows and 64 columns of one head.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_through_features(
    const float* __restrict__ dexponents, const T* __restrict__ x, long long stride, long long rows, long long heads,
    long long group, long long dim, const float* __restrict__ features, long long count, float root, T* dx,
    long long dx_stride) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, totals, SIDE);
  const long long first = (long long)blockIdx.x * SIDE;
  const int head = blockIdx.y, column = blockIdx.z * SIDE;
  const auto summed = [&](int i, int m) {
    float sum = 0.0f;
    if (first + i < rows)
      for (int g = 0; g < group; ++g)
        sum += dexponents[((first + i) * heads * group + head * group + g) * count + m];
    return sum;
  };
  const float total = row_total(int(count), summed);
  if (threadIdx.x % 4 == 0) totals[threadIdx.x / 4] = total;
  Tile tile = zeros();
  multiply<ALONG, ACROSS>(
      tile, int(count), summed, [&](int j, int m) { return column + j < dim ? features[m * dim + column + j] : 0.0f; },
      stage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const long long row = first + tile_row(i);
      const int d = column + tile_column(j);
      if (row >= rows || d >= dim) continue;
      const float scaled = to_float(x[row * stride + head * dim + d]) * root;
      dx[row * dx_stride + head * dim + d] = from_float<T>(root * (tile.v[i][j] - scaled * totals[tile_row(i)]));
    }
}
