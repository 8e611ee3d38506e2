// Attention, forward (Dao 2023, FlashAttention-2, alg. 1): a block takes QUERIES rows of one head of one sequence, and the
// keys that any of them sees pass by in tiles of KEYS.
//
//   shared memory   Q | K of two stages | V of two stages | key gaps of two stages | query times
//   warp w          rows w·ROWS .. of the block's queries, all keys of the tile
//   registers       S = Q Kᵀ (ROWS × KEYS) becomes P in place; out (ROWS × WIDTH); largest logit and sum of each row
//
// One iteration, one barrier: wait for this tile's copies; barrier (everybody's copies have landed, and everybody has
// finished with the other stage); start copying the next tile into the other stage; S, bias, mask, softmax, dropout;
// out += P V. Tiles that no query of the block sees are not visited; tiles that all of them see whole are not masked.
#include "bias.cuh"
#include "dropout.cuh"
#include "sequence.cuh"
#include "softmax.cuh"
#include "tile.cuh"

constexpr int QUERIES = TTR_QUERIES, KEYS = TTR_KEYS;
constexpr int ROWS = QUERIES / TTR_WARPS, M = ROWS / 16, N = KEYS / 8;
static_assert(KEYS <= THREADS && KEYS % 16 == 0 && ROWS % 16 == 0, "tile sizes");

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    const int* __restrict__ work, const Element* __restrict__ q, long long q_stride, const Element* __restrict__ k,
    long long k_stride, const Element* __restrict__ v, long long v_stride, Element* __restrict__ out,
    long long out_stride, float* __restrict__ log_normalizer, long long group, long long head_dim, float scale,
    long long causal, long long window
#if TTR_BIAS
    , const double* __restrict__ times, const double* __restrict__ key_times, const float* __restrict__ rates,
    const float* __restrict__ taus
#endif
#if TTR_DROPOUT
    , unsigned threshold, float keep_scale, unsigned key0, unsigned key1, unsigned offset0, unsigned offset1,
    unsigned first_counter, const unsigned long long* __restrict__ offset_at
#endif
) {
#if TTR_DROPOUT
  add_to_offset(offset_at, offset0, offset1);
#endif
  TTR_DYN_SMEM(Element, shared);
  Element* const queries = shared;
  Element* const keys = queries + QUERIES * WIDTH;
  Element* const values = keys + 2 * KEYS * WIDTH;
  float* const gap_high = reinterpret_cast<float*>(values + 2 * KEYS * WIDTH);
  float* const gap_low = gap_high + 2 * KEYS;
  double* const query_times = reinterpret_cast<double*>(gap_low + 2 * KEYS);

  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = int(threadIdx.x >> 5) * ROWS;
  const int head = blockIdx.y, heads = gridDim.y, dim = int(head_dim);
  const Sequence at(work, causal, window);
  const int count = min(QUERIES, at.length - at.first);
  const int begin = at.low(at.first) / KEYS * KEYS;
  const int end = at.high(at.first + count - 1);
  const int kv = head / int(group) * dim;
  k += at.key_row * k_stride + kv;
  v += at.key_row * v_stride + kv;

  f4 acc[M][WIDTH / 8];
  clear(acc);
  float largest[M][2], total[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) largest[m][h] = -INFINITY, total[m][h] = 0.0f;
  const float scale2 = scale * LOG2E;

#if TTR_BIAS
  key_times += at.key_row;
  const double inverse_tau = 1.0 / double(taus[head]);
  const float slope = bias_slope(rates[head], scale);
  double base = 0.0, next_base = 0.0, next_time = 0.0;
#endif
  if (begin < end) {
    load_tile<QUERIES>(queries, q + (at.query_row + at.first) * q_stride + head * dim, q_stride, count, dim);
    load_tile<KEYS>(keys, k + begin * k_stride, k_stride, at.key_length - begin, dim);
    load_tile<KEYS>(values, v + begin * v_stride, v_stride, at.key_length - begin, dim);
    cp_async_commit();
#if TTR_BIAS
    for (int i = threadIdx.x; i < QUERIES; i += THREADS)
      query_times[i] = times[at.query_row + at.first + min(i, count - 1)];
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

    f4 s[M][N];
    clear(s);
    multiply_rows(s, queries, row, keys + stage * KEYS * WIDTH);

    const bool whole = at.whole(at.first, QUERIES, key, KEYS);
    float lag[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        lag[m][h] = 0.0f;
#if TTR_BIAS
        const Gap query = gap(query_times[row + 16 * m + 8 * h + g], base, inverse_tau);
        const float* const high = gap_high + stage * KEYS + 2 * t;
        const float* const low = gap_low + stage * KEYS + 2 * t;
        if (whole) {
          // The linear bias of the row itself is left to the softmax: no more than one operation per logit.
          if (BIAS == LINEAR) lag[m][h] = slope * scale2 * query.high;
          const float from = BIAS == LINEAR ? 0.0f : query.high;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const float2 gaps = *reinterpret_cast<const float2*>(high + 8 * n);
            float* const x = &s[m][n].v[2 * h];
            x[0] = fmaf(-slope, decay(from - gaps.x), x[0]);
            x[1] = fmaf(-slope, decay(from - gaps.y), x[1]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float u = age(query, Gap{high[8 * n + e], low[8 * n + e]});
              s[m][n].v[2 * h + e] = fmaf(-slope, decay(u), s[m][n].v[2 * h + e]);
            }
        }
#endif
        if (!whole) {
          const int i = at.first + row + 16 * m + 8 * h + g;
          const int from = at.low(i) - key, to = at.high(i) - key;
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = 8 * n + 2 * t + e;
              if (column < from || column >= to) s[m][n].v[2 * h + e] = -INFINITY;
            }
        }
      }

    softmax_step(s, acc, largest, total, lag, scale2);

#if TTR_DROPOUT
    const Mask mask = {threshold, keep_scale, key0, key1, offset0, offset1, first_counter};
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned counter = unsigned(at.query_row + at.first + row + 16 * m + 8 * h + g) * heads + head;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
          const u4 words = mask.words(unsigned(key / 4 + 2 * n + t), counter);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (words.v[e] < threshold) s[m][n + e / 2].v[2 * h + e % 2] = 0.0f;
        }
      }
#endif
    multiply_columns(acc, s, values + stage * KEYS * WIDTH, 0);
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = row_sum(total[m][h]);
      float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
#if TTR_DROPOUT
      factor *= keep_scale;
#endif
#pragma unroll
      for (int d = 0; d < WIDTH / 8; ++d) {
        acc[m][d].v[2 * h] *= factor;
        acc[m][d].v[2 * h + 1] *= factor;
      }
      const int i = row + 16 * m + 8 * h + g;
      if (t == 0 && i < count)
        log_normalizer[(long long)(at.query_row + at.first + i) * heads + head] =
            sum > 0.0f ? LN2 * (largest[m][h] + log2f(sum)) : -INFINITY;
    }
  // The queries are no longer needed, and a warp reads no other rows of them than its own.
  Element* const rows = out + (at.query_row + at.first) * out_stride + head * dim;
  store_tile(rows, out_stride, count, dim, acc, queries, row, 0);
}
