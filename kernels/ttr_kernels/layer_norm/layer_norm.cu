// Layer normalisation: a row is read once, held in registers, and written once.
#include "rows.cuh"

typedef TTR_T T;

// Mean and r = 1 / sqrt(var + eps) of a row. The variance is that of deviations, not E[x²] − E[x]², which cancels where the
// mean is large.
__device__ __forceinline__ void statistics(const Row& s, int width, float eps, float* scratch, float& mean, float& r) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) total += s.v[i][j];
  mean = row_sum(total, scratch) / float(width);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    if (element_of(i) >= width) break;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) squares += (s.v[i][j] - mean) * (s.v[i][j] - mean);
  }
  r = 1.0f / sqrtf(row_sum(squares, scratch) / float(width) + eps);
}

// y = (s − mean) · r · weight + bias; s = x, or x + residual as it is stored in `total`. `bias` may be null.
template <bool RESIDUAL>
__device__ __forceinline__ void forward(
    const T* x, long long x_stride, const T* residual, long long residual_stride, const float* __restrict__ weight,
    const float* __restrict__ bias, float eps, T* y, long long y_stride, T* total, long long total_stride, float* means,
    float* inverses, long long rows, int width) {
  TTR_SHARED(float, scratch, 32);
  const long long row = (long long)blockIdx.x * BLOCK_ROWS + row_in_block();
  if (row >= rows) return;
  Row s = load_row(x + row * x_stride, width);
  if (RESIDUAL) {
    s = rounded_sum<T>(s, load_row(residual + row * residual_stride, width));
    store_row(total + row * total_stride, width, s);
  }
  float mean, r;
  statistics(s, width, eps, scratch, mean, r);
  if (place_in_row() == 0) {
    means[row] = mean;
    inverses[row] = r;
  }
  const Row w = load_row(weight, width);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) s.v[i][j] = (s.v[i][j] - mean) * r * w.v[i][j];
  if (bias) {
    const Row b = load_row(bias, width);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) s.v[i][j] += b.v[i][j];
  }
  store_row(y + row * y_stride, width, s);
}

extern "C" __global__ void __launch_bounds__(BLOCK) layer_norm_forward(
    const T* x, long long x_stride, const float* __restrict__ weight, const float* __restrict__ bias, float eps, T* y,
    long long y_stride, float* means, float* inverses, long long rows, long long width) {
  forward<false>(x, x_stride, nullptr, 0, weight, bias, eps, y, y_stride, nullptr, 0, means, inverses, rows, int(width));
}

extern "C" __global__ void __launch_bounds__(BLOCK) layer_norm_forward_residual(
    const T* x, long long x_stride, const T* residual, long long residual_stride, const float* __restrict__ weight,
    const float* __restrict__ bias, float eps, T* y, long long y_stride, T* total, long long total_stride, float* means,
    float* inverses, long long rows, long long width) {
  forward<true>(x, x_stride, residual, residual_stride, weight, bias, eps, y, y_stride, total, total_stride, means,
                inverses, rows, int(width));
}

// With n = (x − mean) · r and g = dy · weight:  dx = r · (g − mean(g) − n · mean(g·n)) + dsum, and Σ dy·n and Σ dy over the
// block's rows, of which each block takes every gridDim.x-th few. dsum is not read if its stride is 0.
extern "C" __global__ void __launch_bounds__(BLOCK) layer_norm_backward(
    const T* dy, long long dy_stride, const T* x, long long x_stride, const float* __restrict__ weight,
    const float* __restrict__ means, const float* __restrict__ inverses, const T* dsum, long long dsum_stride, T* dx,
    long long dx_stride, float* weight_partials, float* bias_partials, long long rows, long long width_) {
  TTR_SHARED(float, scratch, 32);
  TTR_SHARED(float, combined, COMBINE);
  const int width = int(width_);
  const Row w = load_row(weight, width);
  Row dweight = {}, dbias = {};
  for (long long first = (long long)blockIdx.x * BLOCK_ROWS; first < rows; first += (long long)gridDim.x * BLOCK_ROWS) {
    const long long row = first + row_in_block();
    if (row >= rows) break;
    const float mean = means[row], r = inverses[row];
    Row n = load_row(x + row * x_stride, width);
    Row g = load_row(dy + row * dy_stride, width);
    float total = 0.0f, dot = 0.0f;
    // Beyond the row's end dy is zero, and with it every term.
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        n.v[i][j] = (n.v[i][j] - mean) * r;
        dweight.v[i][j] += g.v[i][j] * n.v[i][j];
        dbias.v[i][j] += g.v[i][j];
        g.v[i][j] *= w.v[i][j];
        total += g.v[i][j];
        dot += g.v[i][j] * n.v[i][j];
      }
    const float mean_g = row_sum(total, scratch) / float(width), mean_gn = row_sum(dot, scratch) / float(width);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) g.v[i][j] = r * (g.v[i][j] - mean_g - n.v[i][j] * mean_gn);
    if (dsum_stride > 0) add_to(g, load_row(dsum + row * dsum_stride, width));
    store_row(dx + row * dx_stride, width, g);
  }
  store_partials(weight_partials, width, dweight, combined);
  store_partials(bias_partials, width, dbias, combined);
}
