// Attention, gradient of the queries: a block takes QUERIES rows of one head, and the keys that any of them sees pass by in
// tiles of KEYS, as in forward.cu. Weights are recomputed from the row statistics of backward_rows.cu.
//
//   P = exp2(logit − normalizer)    dP = keep/(1−rate) · dout Vᵀ    dS = P · (dP − D)    dq = scale · dS K
//
//   shared memory   Q | dout | K of two stages | V of two stages | key gaps of two stages | query times
//   warp w          rows w·ROWS .. of the block's queries, all keys of the tile
//   registers       S and dP (ROWS × KEYS each), dS in place of dP; dq (ROWS × WIDTH); normalizer and D of each row
//
// With a time bias the block also writes its sums Σ dS · φ(u) and Σ dS · u · φ'(u): all heads are queries' heads, so that
// one block serves one rate and tau. They are summed per tile in float32, over tiles in float64.
#include "bias.cuh"
#include "dropout.cuh"
#include "numeric.cuh"
#include "sequence.cuh"
#include "tile.cuh"

constexpr int QUERIES = TTR_QUERIES, KEYS = TTR_KEYS;
constexpr int ROWS = QUERIES / TTR_WARPS, M = ROWS / 16, N = KEYS / 8;
static_assert(KEYS <= THREADS && KEYS % 16 == 0 && ROWS % 16 == 0, "tile sizes");

extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries(
    const int* __restrict__ work, const Element* __restrict__ q, long long q_stride, const Element* __restrict__ k,
    long long k_stride, const Element* __restrict__ v, long long v_stride, const Element* __restrict__ dout,
    long long dout_stride, const float* __restrict__ statistics, long long total, Element* __restrict__ dq,
    long long dq_stride, long long group, long long head_dim, float scale, float dq_scale, long long causal,
    long long window
#if TTR_BIAS
    , const double* __restrict__ times, const double* __restrict__ key_times, const float* __restrict__ rates,
    const float* __restrict__ taus
#endif
#if TTR_DROPOUT
    , unsigned threshold, float keep_scale, unsigned key0, unsigned key1, unsigned offset0, unsigned offset1,
    unsigned first_counter, const unsigned long long* __restrict__ offset_at
#endif
#if TTR_BIAS
    , float* __restrict__ partial
#endif
) {
#if TTR_DROPOUT
  add_to_offset(offset_at, offset0, offset1);
#endif
  TTR_DYN_SMEM(Element, shared);
  Element* const queries = shared;
  Element* const douts = queries + QUERIES * WIDTH;
  Element* const keys = douts + QUERIES * WIDTH;
  Element* const values = keys + 2 * KEYS * WIDTH;

  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = int(threadIdx.x >> 5) * ROWS;
  const int head = blockIdx.y, dim = int(head_dim);
  const Sequence at(work, causal, window);
  const int count = min(QUERIES, at.length - at.first);
  const int query_row = at.query_row + at.first;
  const int begin = at.low(at.first) / KEYS * KEYS;
  const int end = at.high(at.first + count - 1);
  const int kv = head / int(group) * dim;
  k += at.key_row * k_stride + kv;
  v += at.key_row * v_stride + kv;

  f4 acc[M][WIDTH / 8];
  clear(acc);
  // Rows past the end of the sequence have no weights.
  float normalizer[M][2], dot[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 16 * m + 8 * h + g;
      const float* const pair = statistics + 2 * (head * total + query_row + i);
      normalizer[m][h] = i < count ? pair[0] : INFINITY;
      dot[m][h] = i < count ? pair[1] : 0.0f;
    }
  const float scale2 = scale * LOG2E;

#if TTR_BIAS
  float* const gap_high = reinterpret_cast<float*>(values + 2 * KEYS * WIDTH);
  float* const gap_low = gap_high + 2 * KEYS;
  double* const query_times = reinterpret_cast<double*>(gap_low + 2 * KEYS);
  key_times += at.key_row;
  const double inverse_tau = 1.0 / double(taus[head]);
  const float slope = bias_slope(rates[head], scale);
  double base = 0.0, next_base = 0.0, next_time = 0.0, sum_rate = 0.0, sum_tau = 0.0;
#endif
  if (begin < end) {
    load_tile<QUERIES>(queries, q + query_row * q_stride + head * dim, q_stride, count, dim);
    load_tile<QUERIES>(douts, dout + query_row * dout_stride + head * dim, dout_stride, count, dim);
    load_tile<KEYS>(keys, k + begin * k_stride, k_stride, at.key_length - begin, dim);
    load_tile<KEYS>(values, v + begin * v_stride, v_stride, at.key_length - begin, dim);
    cp_async_commit();
#if TTR_BIAS
    for (int i = threadIdx.x; i < QUERIES; i += THREADS) query_times[i] = times[query_row + min(i, count - 1)];
    next_base = key_times[min(begin + KEYS, at.key_length) - 1];
    if (threadIdx.x < KEYS) next_time = key_times[min(begin + int(threadIdx.x), at.key_length - 1)];
#endif
  }

  for (int key = begin, stage = 0; key < end; key += KEYS, stage ^= 1) {
#if TTR_BIAS
    base = next_base;
    if (threadIdx.x < KEYS) {
      const Gap gap_of_key = gap(next_time, base, inverse_tau);
      gap_high[stage * KEYS + threadIdx.x] = gap_of_key.high;
      gap_low[stage * KEYS + threadIdx.x] = gap_of_key.low;
    }
#endif
    cp_async_wait<0>();
    __syncthreads();
    const int next = key + KEYS;
    if (next < end) {
      const int other = (stage ^ 1) * KEYS * WIDTH;
      load_tile<KEYS>(keys + other, k + next * k_stride, k_stride, at.key_length - next, dim);
      load_tile<KEYS>(values + other, v + next * v_stride, v_stride, at.key_length - next, dim);
      cp_async_commit();
#if TTR_BIAS
      next_base = key_times[min(next + KEYS, at.key_length) - 1];
      if (threadIdx.x < KEYS) next_time = key_times[min(next + int(threadIdx.x), at.key_length - 1)];
#endif
    }

    f4 s[M][N], ds[M][N];
    clear(s);
    clear(ds);
    multiply_rows(s, queries, row, keys + stage * KEYS * WIDTH);
    multiply_rows(ds, douts, row, values + stage * KEYS * WIDTH);

    const bool whole = at.whole(at.first, QUERIES, key, KEYS);
#if TTR_BIAS
    float tile_rate = 0.0f, tile_tau = 0.0f;
#endif
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = row + 16 * m + 8 * h + g;
        const int from = at.low(at.first + i) - key, to = at.high(at.first + i) - key;
#if TTR_BIAS
        const Gap query = gap(query_times[i], base, inverse_tau);
#endif
#pragma unroll
        for (int n = 0; n < N; ++n) {
#if TTR_DROPOUT
          // Words 0, 1 are those of an even n, 2, 3 of the odd one after it.
          const Mask mask = {threshold, keep_scale, key0, key1, offset0, offset1, first_counter};
          u4 words;
          if (n % 2 == 0) words = mask.words(unsigned(key / 4 + 2 * n + t), unsigned(query_row + i) * gridDim.y + head);
#endif
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * n + 2 * t + e;
            float x = s[m][n].v[2 * h + e];
#if TTR_BIAS
            const Gap gap_of_key = {gap_high[stage * KEYS + column], whole ? 0.0f : gap_low[stage * KEYS + column]};
            const float u = whole ? query.high - gap_of_key.high : age(query, gap_of_key);
            const float decayed = decay(u);
            x = fmaf(-slope, decayed, x);
#endif
            float weight = exp2_fast(fmaf(x, scale2, -normalizer[m][h]));
            if (!whole && (column < from || column >= to)) weight = 0.0f;
            float gradient = ds[m][n].v[2 * h + e];
#if TTR_DROPOUT
            gradient *= mask.factor(words.v[2 * (n % 2) + e]);
#endif
            gradient = weight * (gradient - dot[m][h]);
            ds[m][n].v[2 * h + e] = gradient;
#if TTR_BIAS
            tile_rate = fmaf(gradient, phi(u, decayed), tile_rate);
            if (BIAS == LOG) tile_tau = fmaf(gradient, u * reciprocal(1.0f + u), tile_tau);
#endif
          }
        }
      }
#if TTR_BIAS
    sum_rate += double(tile_rate);
    sum_tau += double(BIAS == LOG ? tile_tau : tile_rate);
#endif
    multiply_columns(acc, ds, keys + stage * KEYS * WIDTH, 0);
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int d = 0; d < WIDTH / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][d].v[e] *= dq_scale;
  // The queries are no longer needed, and a warp reads no other rows of them than its own.
  store_tile(dq + query_row * dq_stride + head * dim, dq_stride, count, dim, acc, queries, row, 0);

#if TTR_BIAS
  TTR_SHARED(double, scratch, TTR_WARPS);
  sum_rate = block_sum<THREADS>(sum_rate, scratch);
  sum_tau = block_sum<THREADS>(sum_tau, scratch);
  if (threadIdx.x == 0) {
    float* const pair = partial + 2 * ((long long)head * gridDim.x + blockIdx.x);
    pair[0] = float(sum_rate);
    pair[1] = float(sum_tau);
  }
#endif
}
