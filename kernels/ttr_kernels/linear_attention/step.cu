// One new position of each sequence: the recurrence as it stands. Reads and writes every sum once.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int THREADS = 256, WARPS = THREADS / 32, PER_LANE = 4, STRIP = 32 * PER_LANE;

// A block for each sequence and head. phi_q (rows, heads, M), exponents (rows, kv_heads, M) and the largest of them are
// those of features.cu. Warps take turns with the features, lanes share the columns.
extern "C" __global__ void __launch_bounds__(THREADS) linear_attention_step(
    const float* __restrict__ phi_q, const float* __restrict__ exponents, const float* __restrict__ largest,
    const T* __restrict__ v, long long v_stride, const double* __restrict__ times, const float* __restrict__ rates,
    const long long* __restrict__ rings, float* state_sums, float* state_shift, const double* __restrict__ state_times,
    long long heads, long long group, long long dim, long long features, T* out, long long out_stride) {
  TTR_SHARED(float, scratch, WARPS);
  TTR_SHARED(float, parts, WARPS * STRIP);
  const long long row = blockIdx.x, ring = rings[row];
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long key_line = row * (heads / group) + head / group;
  const float* queries = phi_q + (row * heads + head) * features;
  const float* keys = exponents + key_line * features;
  const T* values = v + row * v_stride + head / group * dim;
  float* sums = state_sums + (ring * heads + head) * features * (dim + 1);

  const float before = state_shift[ring * heads + head], shift = fmaxf(before, largest[key_line]);
  float factor = expf(before - shift);
  // Without a past there is nothing to decay, and no time that it began.
  if (TTR_DECAYS && before > -INFINITY) factor *= expf(-rates[head] * float(times[row] - state_times[ring]));

  float part = 0.0f;
  for (long long m = threadIdx.x; m < features; m += THREADS)
    part = fmaf(queries[m], fmaf(sums[m * (dim + 1) + dim], factor, expf(keys[m] - shift)), part);
  const float over = block_sum<THREADS>(part, scratch), inverse = over > 1e-30f ? 1.0f / over : 0.0f;
  if (threadIdx.x == 0) state_shift[ring * heads + head] = shift;

  for (long long strip = 0; strip <= dim; strip += STRIP) {
    float value[PER_LANE], result[PER_LANE];
#pragma unroll
    for (int n = 0; n < PER_LANE; ++n) {
      const long long e = strip + 32 * n + lane;
      value[n] = e < dim ? to_float(values[e]) : 1.0f;
      result[n] = 0.0f;
    }
    for (long long m = warp; m < features; m += WARPS) {
      const float query = queries[m], key = expf(keys[m] - shift);
#pragma unroll
      for (int n = 0; n < PER_LANE; ++n) {
        const long long e = strip + 32 * n + lane;
        if (e > dim) continue;
        float* sum = sums + m * (dim + 1) + e;
        const float now = fmaf(*sum, factor, key * value[n]);
        *sum = now;
        result[n] = fmaf(query, now, result[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < PER_LANE; ++n) parts[warp * STRIP + 32 * n + lane] = result[n];
    __syncthreads();
    if (threadIdx.x < STRIP && strip + threadIdx.x < dim) {
      float all = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) all += parts[w * STRIP + threadIdx.x];
      out[row * out_stride + head * dim + strip + threadIdx.x] = from_float<T>(all * inverse);
    }
    __syncthreads();
  }
}
