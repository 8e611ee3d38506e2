// Numbers that stay on the GPU: how many targets count, the mean loss, and gradients times the upstream one.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR;
#if TTR_INDEX_BYTES == 8
typedef long long Index;
#else
typedef int Index;
#endif

// One block; *count = how many targets are not ignored.
extern "C" __global__ void __launch_bounds__(1024) count_targets(
    const Index* targets, long long stride, long long rows, long long ignore_index, int* count) {
  TTR_SHARED(int, scratch, 32);
  int counted = 0;
  for (long long row = threadIdx.x; row < rows; row += 1024) counted += targets[row * stride] != ignore_index;
  counted = block_sum<1024>(counted, scratch);
  if (threadIdx.x == 0) *count = counted;
}

// One block; *mean = Σ losses / *count, 0 if nothing counts.
extern "C" __global__ void __launch_bounds__(1024) mean_loss(
    const float* losses, long long rows, const int* count, float* mean) {
  TTR_SHARED(double, scratch, 32);
  double sum = 0.0;
  for (long long row = threadIdx.x; row < rows; row += 1024) sum += losses[row];
  sum = block_sum<1024>(sum, scratch);
  if (threadIdx.x == 0) *mean = float(sum / max(*count, 1));
}

// y = x · factor, or y += x · factor, over rows; the factor is *factor_at, or `factor` if that is null. y may be x.
extern "C" __global__ void __launch_bounds__(256) multiply(
    const T* x, long long x_stride, const float* factor_at, float factor, long long accumulate, T* y, long long y_stride,
    long long rows, long long width) {
  const long long column = ((long long)blockIdx.x * 256 + threadIdx.x) * VECTOR;
  if (column >= width) return;
  const float by = factor_at ? *factor_at : factor;
  for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
    float values[VECTOR], sums[VECTOR] = {};
    load_vec(x + row * x_stride + column, values);
    if (accumulate) load_vec(y + row * y_stride + column, sums);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sums[j] += values[j] * by;
    store_vec(y + row * y_stride + column, sums);
  }
}
