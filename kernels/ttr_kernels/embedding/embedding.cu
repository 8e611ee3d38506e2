// Embedding: rows of a table, gathered by index.
#include "numeric.cuh"

typedef TTR_T T;        // of the table
typedef TTR_RESULT Y;   // of what is gathered
constexpr int VECTOR = TTR_VECTOR;
#if TTR_INDEX_BYTES == 8
typedef long long Index;
#else
typedef int Index;
#endif

// y[i] = table[indices[i]], NaN where there is no such row. `lanes` threads, a power of two up to 256, share a row.
extern "C" __global__ void __launch_bounds__(256) embedding_gather(
    const Index* __restrict__ indices, long long rows, const T* __restrict__ table, long long stride,
    long long vocabulary, Y* y, long long y_stride, long long width, long long lanes) {
  const int thread = threadIdx.x, sharing = int(lanes);
  const long long row = blockIdx.x * (long long)(256 / sharing) + thread / sharing;
  if (row >= rows) return;
  const long long index = indices[row];
  const bool exists = index >= 0 && index < vocabulary;
  for (long long column = thread % sharing * VECTOR; column < width; column += sharing * VECTOR) {
    float values[VECTOR];
    if (exists) {
      load_vec(table + index * stride + column, values);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) values[j] = __int_as_float(0x7fffffff);
    }
    store_vec(y + row * y_stride + column, values);
  }
}
