// Log-normal mixture. TTR_LANES threads share a row, each takes TTR_VECTOR components at a time: many rows to a block,
// since mixtures have few components. The backward reads a row twice, the second time from the cache.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR, LANES = TTR_LANES, THREADS = 256, BLOCK_ROWS = THREADS / LANES;
constexpr float HALF_LOG_2PI = 0.9189385332046727f;

// Σ and maximum over the threads of a row, the same bits in all of them. All lanes of the warp must call.
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes >>= 1) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}
__device__ __forceinline__ float row_max(float value) {
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, lanes));
  return value;
}

// Σ exp(x) = sum · exp(largest), of numbers that come a few at a time.
struct ExpSum {
  float largest, sum;
};

// What to subtract from the numbers: nothing while all are −∞, which would give NaN.
__device__ __forceinline__ float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

__device__ __forceinline__ void add(ExpSum& total, const float (&x)[VECTOR]) {
  float largest = total.largest;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) largest = fmaxf(largest, x[j]);
  const float shift = shift_of(largest);
  float sum = total.sum * expf(total.largest - shift);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) sum += expf(x[j] - shift);
  total = {largest, sum};
}

__device__ __forceinline__ ExpSum over_row(ExpSum part) {
  const float largest = row_max(part.largest);
  return {largest, row_sum(part.sum * expf(part.largest - shift_of(largest)))};
}

// A row's parameters.
struct Mixture {
  const T *weight_logits, *means, *log_scales;
};

// Of VECTOR components: the logit of the weight, z = (log gap − mean) / scale, 1 / scale, and log(weight · density) but for
// a constant.
struct Components {
  float logit[VECTOR], z[VECTOR], inverse[VECTOR], joint[VECTOR];
};

__device__ __forceinline__ Components load(const Mixture& row, int first, float log_gap) {
  Components c;
  float means[VECTOR], log_scales[VECTOR];
  load_vec(row.weight_logits + first, c.logit);
  load_vec(row.means + first, means);
  load_vec(row.log_scales + first, log_scales);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    c.inverse[j] = expf(-log_scales[j]);
    c.z[j] = (log_gap - means[j]) * c.inverse[j];
    c.joint[j] = c.logit[j] - 0.5f * c.z[j] * c.z[j] - log_scales[j];
  }
  return c;
}

// The row of this thread, and the first component it takes of it. Threads beyond the last row take none, but stay: sums
// over a row need all lanes of the warp.
__device__ __forceinline__ long long row_of_thread() {
  return (long long)blockIdx.x * BLOCK_ROWS + threadIdx.x / LANES;
}
__device__ __forceinline__ int first_component() { return threadIdx.x % LANES * VECTOR; }

// The sums of exp over a row, of the weights' logits and of the joint logarithms.
__device__ __forceinline__ void sums_of(const Mixture& row, int width, float log_gap, ExpSum& weights, ExpSum& joint) {
  weights = joint = {-INFINITY, 0.0f};
  for (int k = first_component(); k < width; k += LANES * VECTOR) {
    const Components c = load(row, k, log_gap);
    add(weights, c.logit);
    add(joint, c.joint);
  }
  weights = over_row(weights);
  joint = over_row(joint);
}

extern "C" __global__ void __launch_bounds__(THREADS) log_normal_mixture_forward(
    const double* __restrict__ log_gaps, const T* weight_logits, long long weight_stride, const T* means,
    long long mean_stride, const T* log_scales, long long scale_stride, float* nll, long long nll_stride, long long rows,
    long long width) {
  const long long row = row_of_thread();
  const bool inside = row < rows;
  const Mixture mixture = {weight_logits + row * weight_stride, means + row * mean_stride, log_scales + row * scale_stride};
  const float log_gap = inside ? float(log_gaps[row]) : 0.0f;
  ExpSum weights, joint;
  sums_of(mixture, inside ? int(width) : 0, log_gap, weights, joint);
  // log p(log gap) = log Σ exp(joint) − log Σ exp(logit) − ½ log 2π
  const float total = (joint.largest + logf(joint.sum)) - (weights.largest + logf(weights.sum));
  if (inside && threadIdx.x % LANES == 0) nll[row * nll_stride] = log_gap + HALF_LOG_2PI - total;
}

extern "C" __global__ void __launch_bounds__(THREADS) log_normal_mixture_backward(
    const float* __restrict__ dnll, const double* __restrict__ log_gaps, const T* weight_logits, long long weight_stride,
    const T* means, long long mean_stride, const T* log_scales, long long scale_stride, T* dweight_logits,
    long long dweight_stride, T* dmeans, long long dmean_stride, T* dlog_scales, long long dscale_stride, long long rows,
    long long width) {
  const long long row = row_of_thread();
  const bool inside = row < rows;
  const Mixture mixture = {weight_logits + row * weight_stride, means + row * mean_stride, log_scales + row * scale_stride};
  const float log_gap = inside ? float(log_gaps[row]) : 0.0f;
  ExpSum weights, joint;
  sums_of(mixture, inside ? int(width) : 0, log_gap, weights, joint);
  if (!inside) return;
  const float d = dnll[row], inverse_weights = 1.0f / weights.sum, inverse_joint = 1.0f / joint.sum;
  for (int k = first_component(); k < width; k += LANES * VECTOR) {
    const Components c = load(mixture, k, log_gap);
    float dweight[VECTOR], dmean[VECTOR], dscale[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const float weight = expf(c.logit[j] - weights.largest) * inverse_weights;
      const float share = expf(c.joint[j] - joint.largest) * inverse_joint;
      // A component so far away that it has no share has no gradient either, though z may be infinite.
      const bool none = share == 0.0f;
      dweight[j] = d * (weight - share);
      dmean[j] = none ? 0.0f : -d * share * c.z[j] * c.inverse[j];
      dscale[j] = none ? 0.0f : d * share * (1.0f - c.z[j] * c.z[j]);
    }
    store_vec(dweight_logits + row * dweight_stride + k, dweight);
    store_vec(dmeans + row * dmean_stride + k, dmean);
    store_vec(dlog_scales + row * dscale_stride + k, dscale);
  }
}
