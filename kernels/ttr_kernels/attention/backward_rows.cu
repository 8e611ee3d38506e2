// The small kernels around the backward: what it needs of each row, and the sums of the bias gradients.
#include "numeric.cuh"

typedef TTR_T Element;
constexpr int THREADS = 128, LANES = 8, CHUNK = 16 / int(sizeof(Element));

// statistics[head, row] = (log2 of the row's normalizer, D = dout · out). A row that sees no key gets +infinity for the
// former, so that its recomputed weights exp2(logit − infinity) are zero. Eight lanes share a row of a head.
extern "C" __global__ void __launch_bounds__(THREADS) attention_row_statistics(
    const Element* __restrict__ dout, long long dout_stride, const Element* __restrict__ out, long long out_stride,
    const float* __restrict__ log_normalizer, float* __restrict__ statistics, long long rows, long long heads,
    long long dim) {
  const long long pair = (blockIdx.x * (long long)THREADS + threadIdx.x) / LANES;
  const long long row = pair / heads, head = pair % heads;
  const bool inside = row < rows;
  float sum = 0.0f;
  if (inside)
    for (int d = int(threadIdx.x) % LANES * CHUNK; d < int(dim); d += LANES * CHUNK) {
      float x[CHUNK], y[CHUNK];
      load_vec(dout + row * dout_stride + head * dim + d, x);
      load_vec(out + row * out_stride + head * dim + d, y);
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) sum = fmaf(x[i], y[i], sum);
    }
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
  if (inside && threadIdx.x % LANES == 0) {
    const float normalizer = log_normalizer[row * heads + head];
    statistics[2 * (head * rows + row)] = normalizer == -INFINITY ? INFINITY : 1.44269504088896f * normalizer;
    statistics[2 * (head * rows + row) + 1] = sum;
  }
}

// drate += −Σ dS · φ(u) and dtau += rate / tau · Σ dS · u · φ'(u), from the partial sums of all blocks of a head, in a fixed
// order. partial (heads, blocks, 2). One block per head.
extern "C" __global__ void __launch_bounds__(THREADS) attention_bias_gradients(
    const float* __restrict__ partial, long long blocks, const float* __restrict__ rates,
    const float* __restrict__ taus, float* __restrict__ drate, float* __restrict__ dtau) {
  TTR_SHARED(double, scratch, THREADS / 32);
  const int head = blockIdx.x;
  double for_rate = 0.0, for_tau = 0.0;
  for (long long i = threadIdx.x; i < blocks; i += THREADS) {
    for_rate += double(partial[2 * (head * blocks + i)]);
    for_tau += double(partial[2 * (head * blocks + i) + 1]);
  }
  for_rate = block_sum<THREADS>(for_rate, scratch);
  for_tau = block_sum<THREADS>(for_tau, scratch);
  if (threadIdx.x == 0) {
    drate[head] -= float(for_rate);
    dtau[head] += float(for_tau * (double(rates[head]) / double(taus[head])));
  }
}
