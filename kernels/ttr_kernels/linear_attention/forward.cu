// The past of every chunk, chunk by chunk, and the outputs of all chunks at once.
//
// exponents (rows, kv_heads, M) and phi_q (rows, heads, M) are those of features.cu. past (chunks, heads, M, D + 1) is first
// what each chunk adds to the sums, Σ_j decay · φ(k_j) [v_j, 1]ᵀ, and then what each chunk sees of those before it.
#include "chunk.cuh"
#include "products.cuh"

// A warp for each sequence and head: the largest exponent of a key so far, and when the chunk before ended.
extern "C" __global__ void __launch_bounds__(32) linear_attention_shifts(
    const float* __restrict__ largest, const long long* __restrict__ table, const long long* __restrict__ chunks_of,
    long long heads, long long group, float* shifts, const double* __restrict__ times, double* bases,
    const long long* __restrict__ rings, float* state_shift, const double* __restrict__ state_times) {
  const long long sequence = blockIdx.x, first = chunks_of[sequence];
  const int head = blockIdx.y;
  const long long kv_heads = heads / group, kv_head = head / group;
  const long long ring = state_shift ? rings[sequence] : 0;
  float shift = state_shift ? state_shift[ring * heads + head] : -INFINITY;
  if (threadIdx.x == 0) shifts[(first + sequence) * heads + head] = shift;
  for (long long chunk = first; chunk < chunks_of[sequence + 1]; ++chunk) {
    const long long row = table[3 * chunk], count = table[3 * chunk + 1];
    float top = -INFINITY;
    for (long long i = threadIdx.x; i < count; i += 32) top = fmaxf(top, largest[(row + i) * kv_heads + kv_head]);
    // Without a past there is nothing to decay, and no time that it began.
    if (TTR_DECAYS && threadIdx.x == 0)
      bases[chunk * heads + head] = chunk > first ? times[row - 1] : shift > -INFINITY ? state_times[ring] : times[row];
    shift = fmaxf(shift, warp_max(top));
    if (threadIdx.x == 0) shifts[(chunk + sequence + 1) * heads + head] = shift;
  }
  // Every lane has read it: a sequence without new positions came here without a shuffle.
  __syncwarp();
  if (state_shift && threadIdx.x == 0) state_shift[ring * heads + head] = shift;
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_key_sums(
    const float* __restrict__ exponents, const T* __restrict__ v, long long v_stride,
    const long long* __restrict__ table, const float* __restrict__ shifts, const double* __restrict__ times,
    const double* __restrict__ bases, const float* __restrict__ rates, long long heads, long long group, long long dim,
    long long features, float* past) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, until, SIDE);
  const Chunk chunk = load_chunk(table, blockIdx.x, shifts, heads, blockIdx.y, times, bases, rates);
  const Keys keys = {exponents, v, v_stride, heads / group, blockIdx.y / group, dim, features};
  if (threadIdx.x < chunk.count) until[threadIdx.x] = chunk.weight(chunk.left(threadIdx.x));
  store_chunk_sums(
      chunk, dim, features, past + ((long long)blockIdx.x * heads + blockIdx.y) * features * (dim + 1),
      [&](int j, int m) { return keys.phi(chunk, j, m) * until[j]; }, [&](int j, int e) { return keys.value(chunk, j, e); },
      stage);
}

// A thread for each of the M · (D + 1) sums of a sequence and head.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_scan(
    float* past, const long long* __restrict__ table, const long long* __restrict__ chunks_of,
    const float* __restrict__ shifts, const double* __restrict__ times, const double* __restrict__ bases,
    const float* __restrict__ rates, long long heads, long long sums, const long long* __restrict__ rings,
    float* state_sums) {
  const long long sequence = blockIdx.x / heads, at = (long long)blockIdx.y * THREADS + threadIdx.x;
  const int head = blockIdx.x % heads;
  if (at >= sums) return;
  float* state = state_sums ? state_sums + (rings[sequence] * heads + head) * sums + at : nullptr;
  float sum = state ? *state : 0.0f;
  for (long long c = chunks_of[sequence]; c < chunks_of[sequence + 1]; ++c) {
    const Chunk chunk = load_chunk(table, c, shifts, heads, head, times, bases, rates);
    float* place = past + (c * heads + head) * sums + at;
    const float added = *place, seen = sum * chunk.rescale;
    *place = seen;
    sum = fmaf(seen, chunk.through(), added);
  }
  if (state) *state = sum;
}

// A block for each chunk, head and 64 columns of the result.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_attention_outputs(
    const float* __restrict__ phi_q, const float* __restrict__ exponents, const T* __restrict__ v, long long v_stride,
    const float* __restrict__ past, const long long* __restrict__ table, const float* __restrict__ shifts,
    const double* __restrict__ times, const double* __restrict__ bases, const float* __restrict__ rates,
    long long heads, long long group, long long dim, long long features, T* out, long long out_stride,
    float* normalizer) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, weights, SQUARE);
  TTR_SHARED(float, since, SIDE);
  TTR_SHARED(float, over, SIDE);
  const int head = blockIdx.y, column = blockIdx.z * SIDE;
  const Chunk chunk = load_chunk(table, blockIdx.x, shifts, heads, head, times, bases, rates);
  const Keys keys = {exponents, v, v_stride, heads / group, head / group, dim, features};
  const Queries queries = {phi_q, heads, head, features};
  const float* sums = past + ((long long)blockIdx.x * heads + head) * features * (dim + 1);
  if (threadIdx.x < SIDE) since[threadIdx.x] = threadIdx.x < chunk.count ? chunk.weight(chunk.age(threadIdx.x)) : 0.0f;
  Tile pairs = products(chunk, queries, keys, stage);
  store_decayed(chunk, pairs, weights);
  __syncthreads();
  const float inside = row_total(SIDE, [&](int i, int j) { return weights[i * SQUARE_ROW + j]; });
  const float before = row_total(
      int(features), [&](int i, int m) { return queries.phi(chunk, i, m) * sums[m * (dim + 1) + dim]; });
  if (threadIdx.x % 4 == 0) over[threadIdx.x / 4] = inside + since[threadIdx.x / 4] * before;

  Tile tile = zeros();
  multiply<ALONG, ACROSS>(
      tile, chunk.count, [&](int i, int j) { return weights[i * SQUARE_ROW + j]; },
      [&](int e, int j) { return keys.value(chunk, j, column + e); }, stage);
  multiply<ALONG, ACROSS>(
      tile, int(features), [&](int i, int m) { return queries.phi(chunk, i, m) * since[i]; },
      [&](int e, int m) { return column + e < dim ? sums[m * (dim + 1) + column + e] : 0.0f; }, stage);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (tile_row(i) >= chunk.count) continue;
    const long long row = chunk.row + tile_row(i);
    const float total = over[tile_row(i)], inverse = inverse_of(total);
    if (blockIdx.z == 0 && threadIdx.x % 16 == 0) normalizer[row * heads + head] = total;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int e = column + tile_column(j);
      if (e < dim) out[row * out_stride + head * dim + e] = from_float<T>(tile.v[i][j] * inverse);
    }
  }
}
