// The norm of many arrays: sums of squares of parts, in float64 and in an order that depends on sizes alone, then their sum.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int GROUP = 16 / int(sizeof(T));

// partials[block] = Σ x² over every gridDim.x-th run of 256 groups; x begins `shift` elements behind a multiple of 16 bytes.
extern "C" __global__ void __launch_bounds__(256) sums_of_squares(
    const T* __restrict__ x, long long size, long long shift, double* partials) {
  TTR_SHARED(double, scratch, 8);
  double sum = 0.0;
#pragma unroll 2
  for (long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * GROUP - shift; at < size;
       at += (long long)gridDim.x * 256 * GROUP) {
    if (at >= 0 && at + GROUP <= size) {
      float values[GROUP];
      load_vec(x + at, values);
#pragma unroll
      for (int j = 0; j < GROUP; ++j) sum += double(values[j]) * double(values[j]);
    } else {
#pragma unroll 1
      for (long long i = max(at, 0ll); i < min(at + GROUP, size); ++i) {
        const double value = to_float(x[i]);
        sum += value * value;
      }
    }
  }
  sum = block_sum<256>(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// *norm = sqrt(Σ partials), by one block.
extern "C" __global__ void __launch_bounds__(1024) root_of_sum(
    const double* __restrict__ partials, long long parts, double* norm) {
  TTR_SHARED(double, scratch, 32);
  double sum = 0.0;
  for (long long part = threadIdx.x; part < parts; part += 1024) sum += partials[part];
  sum = block_sum<1024>(sum, scratch);
  if (threadIdx.x == 0) *norm = sqrt(sum);
}
