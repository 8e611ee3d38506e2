// The bias of a linear layer, added to every row.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR;

// y[r] += bias; a thread keeps its columns of the bias and goes through the rows. Rows begin every `stride` elements.
extern "C" __global__ void __launch_bounds__(256) add_bias(
    T* y, long long rows, long long stride, const float* __restrict__ bias, long long width) {
  const long long column = ((long long)blockIdx.x * 256 + threadIdx.x) * VECTOR;
  if (column >= width) return;
  float added[VECTOR];
  load_vec(bias + column, added);
  for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
    float values[VECTOR];
    T* at = y + row * stride + column;
    load_vec(at, values);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] += added[j];
    store_vec(at, values);
  }
}
