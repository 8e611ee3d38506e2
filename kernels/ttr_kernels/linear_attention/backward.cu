// Gradients of linear attention, with the notation of __init__.py; past, phi_q and exponents are those of the forward.
//
// G_ij = u_i·[v_j, 1], w_ij the weights. What a chunk's keys do to the chunks after it is again a matrix per head,
// `future` (chunks, heads, M, D + 1): Σ_i decay · φ(q_i) u_iᵀ, scanned backwards.
//
// The gradient of a head's rate of decay, −Σ (t_i − t_j) w_ij G_ij, cuts every gap at the chunks' ends, so that no two
// large times cancel: pairs inside a chunk; queries back to their chunk's start; keys on to their chunk's end; and chunks
// that lie between. Each block writes its share of one of these sums to `parts`, (blocks, heads) float64.
#include "chunk.cuh"
#include "products.cuh"

// u = [dout, −dout·out] / normalizer, (rows, heads, dim + 1). A warp for each row and head.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_upstream(
    const T* __restrict__ dout, long long dout_stride, const T* __restrict__ out, long long out_stride,
    const float* __restrict__ normalizer, long long rows, long long heads, long long dim, float* u) {
  const long long line = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (line >= rows * heads) return;
  const int lane = threadIdx.x % 32;
  const T* given = dout + line / heads * dout_stride + line % heads * dim;
  const T* result = out + line / heads * out_stride + line % heads * dim;
  const float inverse = inverse_of(normalizer[line]);
  float dot = 0.0f;
  for (int d = lane; d < dim; d += 32) {
    const float gradient = to_float(given[d]);
    dot = fmaf(gradient, to_float(result[d]), dot);
    u[line * (dim + 1) + d] = gradient * inverse;
  }
  dot = warp_sum(dot);
  if (lane == 0) u[line * (dim + 1) + dim] = -dot * inverse;
}

struct Upstream {
  const float* values;  // (rows, heads, dim + 1)
  long long heads;
  int head;
  long long dim;
  __device__ __forceinline__ float at(const Chunk& chunk, int i, int e) const {
    return i < chunk.count ? values[((chunk.row + i) * heads + head) * (dim + 1) + e] : 0.0f;
  }
};

// G of all pairs.
__device__ __forceinline__ Tile gradients_of_weights(
    const Chunk& chunk, const Upstream& u, const Keys& keys, float* stage) {
  Tile tile = zeros();
  multiply<ALONG, ALONG>(
      tile, int(keys.dim) + 1, [&](int i, int e) { return u.at(chunk, i, e); },
      [&](int j, int e) { return keys.value(chunk, j, e); }, stage);
  return tile;
}

// This block's share of the gradient of the rate, Σ over its threads. All threads must call.
__device__ __forceinline__ void store_part(double part, double* parts, long long line, long long heads, double* scratch) {
  part = block_sum<THREADS>(part, scratch);
  if (threadIdx.x == 0) parts[line * heads + blockIdx.y] = part;
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_query_sums(
    const float* __restrict__ phi_q, const float* __restrict__ u, const long long* __restrict__ table,
    const float* __restrict__ shifts, const double* __restrict__ times, const double* __restrict__ bases,
    const float* __restrict__ rates, long long heads, long long dim, long long features, float* future) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, since, SIDE);
  const int head = blockIdx.y;
  const Chunk chunk = load_chunk(table, blockIdx.x, shifts, heads, head, times, bases, rates);
  const Queries queries = {phi_q, heads, head, features};
  const Upstream upstream = {u, heads, head, dim};
  if (threadIdx.x < chunk.count) since[threadIdx.x] = chunk.weight(chunk.age(threadIdx.x));
  store_chunk_sums(
      chunk, dim, features, future + ((long long)blockIdx.x * heads + head) * features * (dim + 1),
      [&](int i, int m) { return queries.phi(chunk, i, m) * since[i]; },
      [&](int i, int e) { return upstream.at(chunk, i, e); }, stage);
}

// A thread for each of the M · (D + 1) sums of a sequence and head, the last chunk first.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_scan_back(
    float* future, const float* __restrict__ past, const long long* __restrict__ table,
    const long long* __restrict__ chunks_of, const float* __restrict__ shifts, const double* __restrict__ times,
    const double* __restrict__ bases, const float* __restrict__ rates, long long heads, long long sums, double* parts) {
  TTR_SHARED(double, scratch, THREADS / 32);
  const long long sequence = blockIdx.x, at = (long long)blockIdx.z * THREADS + threadIdx.x;
  const int head = blockIdx.y;
  float sum = 0.0f;
  double part = 0.0;
  for (long long c = chunks_of[sequence + 1] - 1; c >= chunks_of[sequence] && at < sums; --c) {
    const Chunk chunk = load_chunk(table, c, shifts, heads, head, times, bases, rates);
    const long long place = (c * heads + head) * sums + at;
    const float added = future[place], through = chunk.through();
    future[place] = sum;
    if (TTR_DECAYS) part += double(chunk.span * through * past[place]) * sum;
    sum = fmaf(sum, through, added) * chunk.rescale;
  }
  if (TTR_DECAYS) store_part(part, parts, blockIdx.x * (long long)gridDim.z + blockIdx.z, heads, scratch);
}

// dvalues (rows, heads, dim): the gradient of values by each query head. A block for each chunk, head and 64 columns.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_attention_dvalues(
    const float* __restrict__ phi_q, const float* __restrict__ exponents, const T* __restrict__ v, long long v_stride,
    const float* __restrict__ u, const float* __restrict__ future, const long long* __restrict__ table,
    const float* __restrict__ shifts, const double* __restrict__ times, const double* __restrict__ bases,
    const float* __restrict__ rates, long long heads, long long group, long long dim, long long features,
    float* dvalues, double* parts) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, weights, SQUARE);
  TTR_SHARED(float, until, SIDE);
  TTR_SHARED(double, scratch, THREADS / 32);
  const int head = blockIdx.y, column = blockIdx.z * SIDE;
  const Chunk chunk = load_chunk(table, blockIdx.x, shifts, heads, head, times, bases, rates);
  const Keys keys = {exponents, v, v_stride, heads / group, head / group, dim, features};
  const Queries queries = {phi_q, heads, head, features};
  const Upstream upstream = {u, heads, head, dim};
  const float* after = future + ((long long)blockIdx.x * heads + head) * features * (dim + 1);
  if (threadIdx.x < SIDE) until[threadIdx.x] = threadIdx.x < chunk.count ? chunk.weight(chunk.left(threadIdx.x)) : 0.0f;
  const Tile pairs = products(chunk, queries, keys, stage);
  store_decayed(chunk, pairs, weights);
  if (TTR_DECAYS && blockIdx.z == 0) {
    const Tile gradients = gradients_of_weights(chunk, upstream, keys, stage);
    double part = 0.0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int query = tile_row(i), key = tile_column(j);
        if (key < query && query < chunk.count)
          part += double(weights[query * SQUARE_ROW + key] * chunk.gap(query, key)) * gradients.v[i][j];
      }
    store_part(part, parts, blockIdx.x, heads, scratch);
  }
  Tile tile = zeros();
  multiply<ACROSS, ACROSS>(
      tile, chunk.count, [&](int j, int i) { return weights[i * SQUARE_ROW + j]; },
      [&](int e, int i) { return column + e < dim ? upstream.at(chunk, i, column + e) : 0.0f; }, stage);
  multiply<ALONG, ACROSS>(
      tile, int(features), [&](int j, int m) { return keys.phi(chunk, j, m) * until[j]; },
      [&](int e, int m) { return column + e < dim ? after[m * (dim + 1) + column + e] : 0.0f; }, stage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = tile_row(i), e = column + tile_column(j);
      if (key < chunk.count && e < dim) dvalues[((chunk.row + key) * heads + head) * dim + e] = tile.v[i][j];
    }
}

// dexponents (rows, heads, features): of keys, by each query head. A block for each chunk, head and 64 features. With three
// blocks of a multiprocessor it would spill for sm_100a, and so would linear_attention_dqueries.
extern "C" __global__ void __launch_bounds__(THREADS, 2) linear_attention_dkeys(
    const float* __restrict__ phi_q, const float* __restrict__ exponents, const T* __restrict__ v, long long v_stride,
    const float* __restrict__ u, const float* __restrict__ future, const long long* __restrict__ table,
    const float* __restrict__ shifts, const double* __restrict__ times, const double* __restrict__ bases,
    const float* __restrict__ rates, long long heads, long long group, long long dim, long long features,
    float* dexponents, double* parts) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, decayed, SQUARE);
  TTR_SHARED(double, scratch, THREADS / 32);
  const int head = blockIdx.y, first = blockIdx.z * SIDE;
  const Chunk chunk = load_chunk(table, blockIdx.x, shifts, heads, head, times, bases, rates);
  const Keys keys = {exponents, v, v_stride, heads / group, head / group, dim, features};
  const Queries queries = {phi_q, heads, head, features};
  const Upstream upstream = {u, heads, head, dim};
  const float* after = future + ((long long)blockIdx.x * heads + head) * features * (dim + 1);
  const Tile gradients = gradients_of_weights(chunk, upstream, keys, stage);
  store_decayed(chunk, gradients, decayed);
  Tile tile = zeros();
  multiply<ALONG, ALONG>(
      tile, int(dim) + 1, [&](int j, int e) { return keys.value(chunk, j, e); },
      [&](int m, int e) { return first + m < features ? after[(first + m) * (dim + 1) + e] : 0.0f; }, stage);
  double part = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = tile_row(i);
    if (key >= chunk.count) continue;
    const float left = chunk.left(key), until = chunk.weight(left);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tile.v[i][j] *= until;
      const int m = first + tile_column(j);
      if (TTR_DECAYS && m < features) part += double(keys.phi(chunk, key, m) * left) * tile.v[i][j];
    }
  }
  multiply<ACROSS, ACROSS>(
      tile, chunk.count, [&](int j, int i) { return decayed[i * SQUARE_ROW + j]; },
      [&](int m, int i) { return first + m < features ? queries.phi(chunk, i, first + m) : 0.0f; }, stage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = tile_row(i), m = first + tile_column(j);
      if (key < chunk.count && m < features)
        dexponents[((chunk.row + key) * heads + head) * features + m] = tile.v[i][j] * keys.phi(chunk, key, m);
    }
  if (TTR_DECAYS) store_part(part, parts, blockIdx.x * (long long)gridDim.z + blockIdx.z, heads, scratch);
}

// phi_q becomes the gradient of the queries' exponents. A block for each chunk, head and 64 features; it reads no others.
extern "C" __global__ void __launch_bounds__(THREADS, 2) linear_attention_dqueries(
    float* phi_q, const float* __restrict__ exponents, const T* __restrict__ v, long long v_stride,
    const float* __restrict__ u, const float* __restrict__ past, const long long* __restrict__ table,
    const float* __restrict__ shifts, const double* __restrict__ times, const double* __restrict__ bases,
    const float* __restrict__ rates, long long heads, long long group, long long dim, long long features,
    double* parts) {
  TTR_SHARED(float, stage, STAGE);
  TTR_SHARED(float, decayed, SQUARE);
  TTR_SHARED(double, scratch, THREADS / 32);
  const int head = blockIdx.y, first = blockIdx.z * SIDE;
  const Chunk chunk = load_chunk(table, blockIdx.x, shifts, heads, head, times, bases, rates);
  const Keys keys = {exponents, v, v_stride, heads / group, head / group, dim, features};
  const Upstream upstream = {u, heads, head, dim};
  const float* before = past + ((long long)blockIdx.x * heads + head) * features * (dim + 1);
  const Tile gradients = gradients_of_weights(chunk, upstream, keys, stage);
  store_decayed(chunk, gradients, decayed);
  Tile tile = zeros();
  multiply<ALONG, ALONG>(
      tile, int(dim) + 1, [&](int i, int e) { return upstream.at(chunk, i, e); },
      [&](int m, int e) { return first + m < features ? before[(first + m) * (dim + 1) + e] : 0.0f; }, stage);
  float* own = phi_q + (chunk.row * heads + head) * features + first;
  double part = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = tile_row(i);
    if (query >= chunk.count) continue;
    const float age = chunk.age(query), since = chunk.weight(age);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tile.v[i][j] *= since;
      const int m = tile_column(j);
      if (TTR_DECAYS && first + m < features) part += double(own[query * heads * features + m] * age) * tile.v[i][j];
    }
  }
  multiply<ALONG, ACROSS>(
      tile, chunk.count, [&](int i, int j) { return decayed[i * SQUARE_ROW + j]; },
      [&](int m, int j) { return first + m < features ? keys.phi(chunk, j, first + m) : 0.0f; }, stage);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int query = tile_row(i), m = tile_column(j);
      if (query < chunk.count && first + m < features) own[query * heads * features + m] *= tile.v[i][j];
    }
  if (TTR_DECAYS) store_part(part, parts, blockIdx.x * (long long)gridDim.z + blockIdx.z, heads, scratch);
}

// dv = Σ over the query heads of a group. A thread for each element.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_sum_groups(
    const float* __restrict__ dvalues, long long rows, long long kv_heads, long long group, long long dim, T* dv,
    long long stride) {
  const long long at = (long long)blockIdx.x * THREADS + threadIdx.x, line = at / dim;
  if (line >= rows * kv_heads) return;
  float sum = 0.0f;
  for (int g = 0; g < group; ++g) sum += dvalues[(line * group + g) * dim + at % dim];
  dv[line / kv_heads * stride + line % kv_heads * dim + at % dim] = from_float<T>(sum);
}

// rates[h] −= Σ parts[:, h]. A block for each head.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_rates(
    const double* __restrict__ parts, long long count, long long heads, double* rates) {
  TTR_SHARED(double, scratch, THREADS / 32);
  double sum = 0.0;
  for (long long part = threadIdx.x; part < count; part += THREADS) sum += parts[part * heads + blockIdx.x];
  sum = block_sum<THREADS>(sum, scratch);
  if (threadIdx.x == 0) rates[blockIdx.x] -= sum;
}
