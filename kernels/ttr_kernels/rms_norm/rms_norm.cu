// RMS normalisation: a row is read once, held in registers, and written once.
#include "rows.cuh"

typedef TTR_T T;

// y = s · r · weight with r = 1 / sqrt(mean(s²) + eps); s = x, or x + residual as it is stored in `total`.
template <bool RESIDUAL>
__device__ __forceinline__ void forward(
    const T* x, long long x_stride, const T* residual, long long residual_stride, const float* __restrict__ weight,
    float eps, T* y, long long y_stride, T* total, long long total_stride, float* inverse_rms, long long rows, int width) {
  TTR_SHARED(float, scratch, 32);
  const long long row = (long long)blockIdx.x * BLOCK_ROWS + row_in_block();
  if (row >= rows) return;
  Row s = load_row(x + row * x_stride, width);
  if (RESIDUAL) {
    s = rounded_sum<T>(s, load_row(residual + row * residual_stride, width));
    store_row(total + row * total_stride, width, s);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) squares += s.v[i][j] * s.v[i][j];
  const float r = 1.0f / sqrtf(row_sum(squares, scratch) / float(width) + eps);
  if (place_in_row() == 0) inverse_rms[row] = r;
  const Row w = load_row(weight, width);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) s.v[i][j] *= r * w.v[i][j];
  store_row(y + row * y_stride, width, s);
}

extern "C" __global__ void __launch_bounds__(BLOCK) rms_norm_forward(
    const T* x, long long x_stride, const float* __restrict__ weight, float eps, T* y, long long y_stride,
    float* inverse_rms, long long rows, long long width) {
  forward<false>(x, x_stride, nullptr, 0, weight, eps, y, y_stride, nullptr, 0, inverse_rms, rows, int(width));
}

extern "C" __global__ void __launch_bounds__(BLOCK) rms_norm_forward_residual(
    const T* x, long long x_stride, const T* residual, long long residual_stride, const float* __restrict__ weight,
    float eps, T* y, long long y_stride, T* total, long long total_stride, float* inverse_rms, long long rows,
    long long width) {
  forward<true>(x, x_stride, residual, residual_stride, weight, eps, y, y_stride, total, total_stride, inverse_rms, rows,
                int(width));
}

// With n = x · r and g = dy · weight:  dx = r · (g − n · mean(g·n)) + dsum, and Σ dy·n over the block's rows, of which each
// block takes every gridDim.x-th few. dsum is not read if its stride is 0.
extern "C" __global__ void __launch_bounds__(BLOCK) rms_norm_backward(
    const T* dy, long long dy_stride, const T* x, long long x_stride, const float* __restrict__ weight,
    const float* __restrict__ inverse_rms, const T* dsum, long long dsum_stride, T* dx, long long dx_stride,
    float* partials, long long rows, long long width_) {
  TTR_SHARED(float, scratch, 32);
  TTR_SHARED(float, combined, COMBINE);
  const int width = int(width_);
  const Row w = load_row(weight, width);
  Row dweight = {};
  for (long long first = (long long)blockIdx.x * BLOCK_ROWS; first < rows; first += (long long)gridDim.x * BLOCK_ROWS) {
    const long long row = first + row_in_block();
    if (row >= rows) break;
    const float r = inverse_rms[row];
    Row n = load_row(x + row * x_stride, width);
    Row g = load_row(dy + row * dy_stride, width);
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        n.v[i][j] *= r;
        dweight.v[i][j] += g.v[i][j] * n.v[i][j];
        g.v[i][j] *= w.v[i][j];
        dot += g.v[i][j] * n.v[i][j];
      }
    const float mean = row_sum(dot, scratch) / float(width);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) g.v[i][j] = r * (g.v[i][j] - n.v[i][j] * mean);
    if (dsum_stride > 0) add_to(g, load_row(dsum + row * dsum_stride, width));
    store_row(dx + row * dx_stride, width, g);
  }
  store_partials(partials, width, dweight, combined);
}
