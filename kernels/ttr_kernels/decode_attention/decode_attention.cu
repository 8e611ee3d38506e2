// Attention of one query per sequence over a ring of keys and values, in two steps.
//
// decode_attention_pieces: a block takes one piece of a sequence's visible positions and one key/value head; TTR_HEADS of
// the query heads of its group share what it loads. TTR_LANES threads hold a row (a team), and each team has a softmax of
// its own over every so-many-th key of the piece; they are merged in a fixed order.
// decode_attention_combine: pieces are combined through their largest logit and sum of weights, in a fixed order.
//
// Pieces are a fixed number of positions, so that a result does not depend on what else is in the batch.
// Logits are in units of log 2: exp2 is the instruction at hand.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR, LANES = TTR_LANES, ITEMS = TTR_ITEMS, HEADS = TTR_HEADS;
constexpr int ELEMENTS = ITEMS * VECTOR, WIDTH = LANES * ELEMENTS;
constexpr int PIECE = 128, THREADS = 128, WARPS = THREADS / 32, TEAMS = THREADS / LANES;
// Keys that a team has under way at once.
constexpr int TOGETHER = HEADS * ELEMENTS > 16 ? 2 : 4;
// Blocks of a multiprocessor: said, since the compiler would rather spill than have one fewer.
constexpr int BLOCKS = HEADS * ELEMENTS > 16 ? 2 : 4;
constexpr int LINEAR = 1, BIAS = TTR_BIAS;
constexpr float LOG2E = 1.44269504088896f;

// A thread's part of a row; zeros beyond its end.
__device__ __forceinline__ void load_part(const T* row, int lane, int dim, float (&part)[ELEMENTS]) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int at = (i * LANES + lane) * VECTOR;
    float values[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) values[e] = 0.0f;
    if (at < dim) load_vec(row + at, values);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) part[i * VECTOR + e] = values[e];
  }
}

// Σ over the threads of a team, the same bits in each.
__device__ __forceinline__ float team_sum(float value) {
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes >>= 1) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}

// What logits are relative to: their largest, or 0 where there is none, so that nothing is ∞ − ∞.
__device__ __forceinline__ float base_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// log(1 + u), in units of log 2. 16-bit inputs round far more than the special-function unit's 2^-22.
__device__ __forceinline__ float log2_of_1_plus(float u) {
  return sizeof(T) == 4 ? log1pf(u) * LOG2E : log2_fast(1.0f + u);
}

// partial (sequence, piece, head) rows of `width`: Σ of weighted values; statistics: (largest logit, Σ of weights) of each.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_attention_pieces(
    const T* __restrict__ q, long long q_stride, const T* __restrict__ k, long long k_stride, const T* __restrict__ v,
    long long v_stride, const long long* __restrict__ lengths, const long long* __restrict__ rings, float scale,
    long long capacity, long long span, long long heads, long long group, long long dim, long long pieces,
    float* partial, long long width, float* statistics
#if TTR_BIAS
    , const double* __restrict__ times, const double* __restrict__ key_times, const float* __restrict__ rate,
    const float* __restrict__ tau
#endif
) {
  const long long sequence = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const long long length = lengths[sequence], visible = min(length, span);
  const int count = int(min(visible - piece * PIECE, (long long)PIECE));
  if (count <= 0) return;
  const long long ring = rings[sequence] * capacity, first = (length - visible + piece * PIECE) % capacity;
  // Of the group, these query heads.
  const int tiles = int(group + HEADS - 1) / HEADS, kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles;
  const int head = kv_head * int(group) + tile * HEADS, own_heads = min(HEADS, int(group) - tile * HEADS);
  const int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;

  float query[HEADS][ELEMENTS], sum[HEADS][ELEMENTS], largest[HEADS], total[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    load_part(q + sequence * q_stride + (head + h) * dim, lane, h < own_heads ? int(dim) : 0, query[h]);
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
      query[h][e] *= scale * LOG2E;
      sum[h][e] = 0.0f;
    }
    largest[h] = -INFINITY;
    total[h] = 0.0f;
  }
#if TTR_BIAS
  // Relative to the newest key if linear: a softmax does not see the difference, float32 would if it is large.
  const double time = BIAS == LINEAR ? key_times[ring + (length - 1) % capacity] : times[sequence];
  float slope[HEADS], inverse_tau[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    slope[h] = h < own_heads ? rate[head + h] * (BIAS == LINEAR ? LOG2E : 1.0f) : 0.0f;
    inverse_tau[h] = h < own_heads ? 1.0f / tau[head + h] : 0.0f;
  }
#endif

  for (int j = team; j - team < count; j += TEAMS * TOGETHER) {
    float keys[TOGETHER][ELEMENTS], values[TOGETHER][ELEMENTS], logits[TOGETHER][HEADS];
    long long rows[TOGETHER];
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      const bool inside = j + t * TEAMS < count;
      const long long slot = first + j + t * TEAMS;
      rows[t] = ring + (slot < capacity ? slot : slot - capacity);
      load_part(k + rows[t] * k_stride + kv_head * dim, lane, inside ? int(dim) : 0, keys[t]);
      load_part(v + rows[t] * v_stride + kv_head * dim, lane, inside ? int(dim) : 0, values[t]);
    }
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      const bool inside = j + t * TEAMS < count;
#if TTR_BIAS
      const float gap = inside ? float(time - key_times[rows[t]]) : 0.0f;
#endif
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        float logit = 0.0f;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) logit = fmaf(query[h][e], keys[t][e], logit);
        logit = team_sum(logit);
#if TTR_BIAS
        const float u = gap * inverse_tau[h];
        logit -= slope[h] * (BIAS == LINEAR ? u : log2_of_1_plus(u));
#endif
        logits[t][h] = inside ? logit : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float larger = largest[h];
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) larger = fmaxf(larger, logits[t][h]);
      const float base = base_of(larger), factor = exp2_fast(largest[h] - base);
      largest[h] = larger;
      total[h] *= factor;
#pragma unroll
      for (int e = 0; e < ELEMENTS; ++e) sum[h][e] *= factor;
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        const float weight = exp2_fast(logits[t][h] - base);
        total[h] += weight;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) sum[h][e] = fmaf(weight, values[t][e], sum[h][e]);
      }
    }
  }

  // The teams of a warp; a + b and b + a are the same bits in both partners.
#pragma unroll
  for (int lanes = LANES; lanes < 32; lanes <<= 1) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const float larger = fmaxf(largest[h], __shfl_xor_sync(FULL_WARP, largest[h], lanes));
      const float factor = exp2_fast(largest[h] - base_of(larger));
      largest[h] = larger;
      total[h] *= factor;
      total[h] += __shfl_xor_sync(FULL_WARP, total[h], lanes);
#pragma unroll
      for (int e = 0; e < ELEMENTS; ++e) {
        sum[h][e] *= factor;
        sum[h][e] += __shfl_xor_sync(FULL_WARP, sum[h][e], lanes);
      }
    }
  }

  // The block's warps, in order.
  TTR_SHARED(float, maxima, WARPS * HEADS);
  TTR_SHARED(float, totals, WARPS * HEADS);
  TTR_SHARED(float, sums, WARPS * HEADS * WIDTH);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) maxima[warp * HEADS + h] = largest[h];
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    float larger = maxima[h];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) larger = fmaxf(larger, maxima[w * HEADS + h]);
    const float factor = exp2_fast(largest[h] - base_of(larger));
    if (threadIdx.x % 32 == 0) totals[warp * HEADS + h] = total[h] * factor;
    if (threadIdx.x % 32 < LANES) {
#pragma unroll
      for (int e = 0; e < ELEMENTS; ++e)
        sums[(warp * HEADS + h) * WIDTH + ((e / VECTOR) * LANES + lane) * VECTOR + e % VECTOR] = sum[h][e] * factor;
    }
  }
  __syncthreads();
  const long long row = (long long)blockIdx.x * heads + head;
  for (int i = threadIdx.x; i < own_heads * WIDTH; i += THREADS) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += sums[w * HEADS * WIDTH + i];
    if (i % WIDTH < dim) partial[(row + i / WIDTH) * width + i % WIDTH] = all;
  }
  if (threadIdx.x < own_heads) {
    const int h = threadIdx.x;
    float larger = maxima[h], all = totals[h];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
      larger = fmaxf(larger, maxima[w * HEADS + h]);
      all += totals[w * HEADS + h];
    }
    statistics[2 * (row + h)] = larger;
    statistics[2 * (row + h) + 1] = all;
  }
}

// A block for each sequence and head. Its warps take turns with the pieces, 128 elements of a row at a time.
constexpr int COMBINERS = 8, STRIP = 128;
extern "C" __global__ void __launch_bounds__(32 * COMBINERS) decode_attention_combine(
    const float* __restrict__ partial, long long width, const float* __restrict__ statistics,
    const long long* __restrict__ lengths, long long span, long long heads, long long dim, long long pieces, T* out,
    long long stride) {
  TTR_SHARED(float, scratch, COMBINERS);
  TTR_SHARED(float, sums, COMBINERS * STRIP);
  const long long sequence = blockIdx.x / heads, head = blockIdx.x % heads, row = sequence * pieces * heads + head;
  const int filled = int((min(lengths[sequence], span) + PIECE - 1) / PIECE);
  float largest = -INFINITY, total = 0.0f;
  for (int p = threadIdx.x; p < filled; p += 32 * COMBINERS) largest = fmaxf(largest, statistics[2 * (row + p * heads)]);
  const float base = base_of(block_max<32 * COMBINERS>(largest, scratch));
  for (int p = threadIdx.x; p < filled; p += 32 * COMBINERS) {
    const float* of_piece = statistics + 2 * (row + p * heads);
    total = fmaf(exp2_fast(of_piece[0] - base), of_piece[1], total);
  }
  total = block_sum<32 * COMBINERS>(total, scratch);
  // Nothing is visible: zeros.
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int strip = 0; strip < dim; strip += STRIP) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    // Rows of partial results are padded to whole vectors.
    if (strip + 4 * lane < dim) {
#pragma unroll 4
      for (int p = warp; p < filled; p += COMBINERS) {
        const float weight = exp2_fast(statistics[2 * (row + p * heads)] - base);
        float values[4];
        load_vec(partial + (row + p * heads) * width + strip + 4 * lane, values);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = fmaf(weight, values[e], sum[e]);
      }
    }
    store_vec(sums + warp * STRIP + 4 * lane, sum);
    __syncthreads();
    if (threadIdx.x < STRIP && strip + threadIdx.x < dim) {
      float all = 0.0f;
#pragma unroll
      for (int w = 0; w < COMBINERS; ++w) all += sums[w * STRIP + threadIdx.x];
      out[sequence * stride + head * dim + strip + threadIdx.x] = from_float<T>(all * inverse);
    }
    __syncthreads();
  }
}
