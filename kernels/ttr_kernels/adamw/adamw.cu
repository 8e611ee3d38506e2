// AdamW: each element of the four arrays is read once, and three of them written once.
#include "numeric.cuh"

constexpr int GROUP = TTR_VECTOR;  // elements that a thread takes: 16 bytes

// The update of ../adamw/__init__.py, with gradients times `scale`.
struct Update {
  float rate, root, keep, scale, beta1, rest1, beta2, rest2, eps;

  __device__ __forceinline__ void operator()(float& parameter, float gradient, float& first, float& second) const {
    const float g = gradient * scale;
    first = beta1 * first + rest1 * g;
    second = beta2 * second + rest2 * g * g;
    parameter = keep * parameter - rate * first / (sqrtf(second) * root + eps);
  }
};

// `schedule` holds (learning rate, 1 − β₁ᵗ, 1 − β₂ᵗ) and takes the place of the three numbers, `scale_at` that of `scale`,
// unless they are null: so that a captured graph can be replayed with others. With a NaN there, nothing is changed. restᵢ is 1 − βᵢ, rounded once.
//
// The arrays begin `shift` elements behind multiples of 16 bytes; −1 if they do not all begin alike, and then elements
// are moved one by one.
extern "C" __global__ void __launch_bounds__(256) adamw(
    float* parameter, const float* gradient, float* first, float* second, long long size, long long shift,
    float learning_rate, float correction1, float correction2, const float* schedule, float scale, const double* scale_at,
    float beta1, float rest1, float beta2, float rest2, float eps, float weight_decay) {
  if (schedule) {
    learning_rate = schedule[0];
    correction1 = schedule[1];
    correction2 = schedule[2];
  }
  if (scale_at) scale = float(*scale_at);
  if (isnan(scale)) return;
  const Update update = {learning_rate / correction1,
                         1.0f / sqrtf(correction2),
                         1.0f - learning_rate * weight_decay,
                         scale, beta1, rest1, beta2, rest2, eps};
  const long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * GROUP - max(shift, 0ll);
  if (shift >= 0 && at >= 0 && at + GROUP <= size) {
    float p[GROUP], g[GROUP], m[GROUP], v[GROUP];
    load_vec(parameter + at, p);
    load_vec(gradient + at, g);
    load_vec(first + at, m);
    load_vec(second + at, v);
#pragma unroll
    for (int j = 0; j < GROUP; ++j) update(p[j], g[j], m[j], v[j]);
    store_vec(parameter + at, p);
    store_vec(first + at, m);
    store_vec(second + at, v);
  } else {
    for (long long i = max(at, 0ll); i < min(at + GROUP, size); ++i) update(parameter[i], gradient[i], first[i], second[i]);
  }
}
