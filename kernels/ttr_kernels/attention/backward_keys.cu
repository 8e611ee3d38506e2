// Attention, gradients of keys and values: a block takes KEYS keys of one key/value head, and the queries that see any of
// them pass by in tiles of QUERIES, for each of the query heads that share the key/value head, in order.
//
//   P = exp2(logit − normalizer)    dP = keep/(1−rate) · dout Vᵀ    dS = P · (dP − D)
//   dv = (P · keep/(1−rate))ᵀ dout  dk = scale · dSᵀ Q
//
// All products are formed transposed, with the keys as rows: Sᵀ = K Qᵀ and dPᵀ = V doutᵀ leave a warp with what it needs as
// left operands of dv += Pᵀ dout and dk += dSᵀ Q, in registers, and warps exchange nothing.
//
//   shared memory   K | V | Q of two stages | dout of two stages | normalizer, D, gaps (high, low) of two stages of queries
//   warp w          rows w·ROWS .. of the block's keys, all queries of the tile
//   registers       Sᵀ and dPᵀ (ROWS × QUERIES each), in place of them Pᵀ and dSᵀ; dk and dv (ROWS × COLUMNS each)
//
// Heads too wide for two results in registers are cut into slices: block z keeps the columns z·COLUMNS .. of both results.
#include "bias.cuh"
#include "dropout.cuh"
#include "numeric.cuh"
#include "sequence.cuh"
#include "tile.cuh"

constexpr int QUERIES = TTR_QUERIES, KEYS = TTR_KEYS, COLUMNS = WIDTH / TTR_SLICES;
constexpr int ROWS = KEYS / TTR_WARPS, M = ROWS / 16, N = QUERIES / 8;
static_assert(QUERIES <= THREADS && QUERIES % 16 == 0 && ROWS % 16 == 0 && COLUMNS % 16 == 0, "tile sizes");

extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys(
    const int* __restrict__ work, const Element* __restrict__ q, long long q_stride, const Element* __restrict__ k,
    long long k_stride, const Element* __restrict__ v, long long v_stride, const Element* __restrict__ dout,
    long long dout_stride, const float* __restrict__ statistics, long long total, Element* __restrict__ dk,
    long long dk_stride, Element* __restrict__ dv, long long dv_stride, long long group, long long head_dim, float scale,
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
  Element* const keys = shared;
  Element* const values = keys + KEYS * WIDTH;
  Element* const queries = values + KEYS * WIDTH;
  Element* const douts = queries + 2 * QUERIES * WIDTH;
  float* const normalizers = reinterpret_cast<float*>(douts + 2 * QUERIES * WIDTH);
  float* const dots = normalizers + 2 * QUERIES;

  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = int(threadIdx.x >> 5) * ROWS;
  const int kv_head = blockIdx.y, dim = int(head_dim), heads = int(gridDim.y) * int(group);
  const Sequence at(work, causal, window);
  if (at.key_length == 0) return;
  const int count = min(KEYS, at.key_length - at.first);
  const int begin = at.first_query(at.first), end = at.last_query(at.first + count - 1);
  const int key_row = at.key_row + at.first;
  const int tiles = begin < end ? (end - begin + QUERIES - 1) / QUERIES : 0;
  const int mine = threadIdx.x;  // the query of a tile whose numbers this thread fetches
  const float scale2 = scale * LOG2E;

  f4 acc_k[M][COLUMNS / 8], acc_v[M][COLUMNS / 8];
  clear(acc_k);
  clear(acc_v);

#if TTR_BIAS
  float* const gap_high = dots + 2 * QUERIES;
  float* const gap_low = gap_high + 2 * QUERIES;
  // The keys stay, and so does the base; the keys' gaps are in units of time here, since tau changes with the head.
  const double base = key_times[key_row + count - 1];
  double inverse_tau = 0.0, next_time = 0.0;
  float slope = 0.0f;
  Gap gaps[M][2];
#endif
  float next_normalizer = INFINITY, next_dot = 0.0f;

  // Start fetching tile `tile` of query head `head` into a stage, and what it needs of its rows into registers.
  auto fetch = [&](int head, int tile, int stage) {
    const int first = begin + tile * QUERIES, inside = end - first;
    const int query_row = at.query_row + first;
    load_tile<QUERIES>(
        queries + stage * QUERIES * WIDTH, q + query_row * q_stride + head * dim, q_stride, inside, dim);
    load_tile<QUERIES>(
        douts + stage * QUERIES * WIDTH, dout + query_row * dout_stride + head * dim, dout_stride, inside, dim);
    cp_async_commit();
    if (mine < QUERIES) {
      const float* const pair = statistics + 2 * (head * total + query_row + mine);
      next_normalizer = mine < inside ? pair[0] : INFINITY;  // queries past the end have no weights
      next_dot = mine < inside ? pair[1] : 0.0f;
#if TTR_BIAS
      next_time = times[query_row + min(mine, inside - 1)];
#endif
    }
  };

  if (tiles > 0) {
    load_tile<KEYS>(keys, k + key_row * k_stride + kv_head * dim, k_stride, count, dim);
    load_tile<KEYS>(values, v + key_row * v_stride + kv_head * dim, v_stride, count, dim);
    fetch(kv_head * int(group), 0, 0);
  }

  for (int step = 0, tile = 0, head = kv_head * int(group); step < tiles * int(group); ++step) {
    const int stage = step & 1;
#if TTR_BIAS
    if (tile == 0) {
      inverse_tau = 1.0 / double(taus[head]);
      slope = bias_slope(rates[head], scale);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          gaps[m][h] = gap(key_times[key_row + min(row + 16 * m + 8 * h + g, count - 1)], base, inverse_tau);
    }
#endif
    if (mine < QUERIES) {
      normalizers[stage * QUERIES + mine] = next_normalizer;
      dots[stage * QUERIES + mine] = next_dot;
#if TTR_BIAS
      const Gap gap_of_query = gap(next_time, base, inverse_tau);
      gap_high[stage * QUERIES + mine] = gap_of_query.high;
      gap_low[stage * QUERIES + mine] = gap_of_query.low;
#endif
    }
    cp_async_wait<0>();
    __syncthreads();
    const bool last = tile + 1 == tiles;
    if (step + 1 < tiles * int(group)) fetch(last ? head + 1 : head, last ? 0 : tile + 1, stage ^ 1);

    f4 p[M][N], ds[M][N];
    clear(p);
    clear(ds);
    multiply_rows(p, keys, row, queries + stage * QUERIES * WIDTH);
    multiply_rows(ds, values, row, douts + stage * QUERIES * WIDTH);

    const int first = begin + tile * QUERIES;
    const bool whole = at.whole(first, QUERIES, at.first, KEYS);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int column = stage * QUERIES + 8 * n + 2 * t;
#pragma unroll
      for (int m = 0; m < M; ++m) {
#if TTR_DROPOUT
        // A call's four words belong to keys g & ~1 and the next, of both halves. Of the two lanes that hold those keys the
        // even one draws for query 2t, the odd one for 2t + 1, and each hands the other the words of its key.
        const Mask mask = {threshold, keep_scale, key0, key1, offset0, offset1, first_counter};
        const bool odd = g & 1;
        const unsigned query_row = unsigned(at.query_row + first + 8 * n + 2 * t) + odd;
        const unsigned call = unsigned((at.first + row) / 4 + 4 * m + (g >> 1));
        const u4 drawn = mask.words(call, query_row * heads + head);
        const unsigned low = __shfl_xor_sync(FULL_WARP, odd ? drawn.v[0] : drawn.v[1], 4);
        const unsigned high = __shfl_xor_sync(FULL_WARP, odd ? drawn.v[2] : drawn.v[3], 4);
        // [half of the key block][query 2t, 2t + 1]
        const unsigned words[2][2] = {{odd ? low : drawn.v[0], odd ? drawn.v[1] : low},
                                      {odd ? high : drawn.v[2], odd ? drawn.v[3] : high}};
#endif
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float x = p[m][n].v[2 * h + e];
#if TTR_BIAS
            const Gap query = {gap_high[column + e], whole ? 0.0f : gap_low[column + e]};
            const float u = whole ? query.high - gaps[m][h].high : age(query, gaps[m][h]);
            x = fmaf(-slope, decay(u), x);
#endif
            float weight = exp2_fast(fmaf(x, scale2, -normalizers[column + e]));
            if (!whole && !at.sees(first + 8 * n + 2 * t + e, at.first + row + 16 * m + 8 * h + g)) weight = 0.0f;
            float factor = 1.0f;
#if TTR_DROPOUT
            factor = mask.factor(words[h][e]);
#endif
            p[m][n].v[2 * h + e] = weight * factor;
            ds[m][n].v[2 * h + e] = weight * (ds[m][n].v[2 * h + e] * factor - dots[column + e]);
          }
      }
    }
    multiply_columns(acc_v, p, douts + stage * QUERIES * WIDTH, int(blockIdx.z) * COLUMNS);
    multiply_columns(acc_k, ds, queries + stage * QUERIES * WIDTH, int(blockIdx.z) * COLUMNS);
    tile = last ? 0 : tile + 1;
    head += last;
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int d = 0; d < COLUMNS / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_k[m][d].v[e] *= scale;
  // Keys and values are no longer needed, and a warp reads no other rows of them than its own.
  const int column = int(blockIdx.z) * COLUMNS;
  store_tile(dk + key_row * dk_stride + kv_head * dim, dk_stride, count, dim, acc_k, keys, row, column);
  store_tile(dv + key_row * dv_stride + kv_head * dim, dv_stride, count, dim, acc_v, values, row, column);
}
