// Dropout and residual addition. A thread takes a group of consecutive elements: 16 bytes, and one or two calls of Philox.
#include "numeric.cuh"
#include "philox.cuh"

typedef TTR_T T;
constexpr int GROUP = 16 / int(sizeof(T));
static_assert(GROUP % 4 == 0, "a call of Philox decides on four elements");

// y = keep · x · scale + residual, over `size` elements, of which the first is element `mask_first` of the mask; residual may
// be null, and y may be x or residual. With a threshold of 0 nothing is dropped and nothing drawn. `aligned` says that all
// arrays begin at multiples of 16 bytes, and mask_first is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) dropout_add(
    const T* x, const T* residual, T* y, long long size, long long mask_first, long long aligned, unsigned threshold,
    float scale, unsigned key_low, unsigned key_high, unsigned offset_low, unsigned offset_high,
    const unsigned long long* offset_at) {
  // The first group begins with the call of Philox that decides on x[0], and so up to three elements before it.
  const long long group = (long long)blockIdx.x * 256 + threadIdx.x, first = group * GROUP - (mask_first & 3);
  if (first >= size) return;
  add_to_offset(offset_at, offset_low, offset_high);
  const bool whole = aligned && first + GROUP <= size;
  const auto is_there = [=](int j) { return (unsigned long long)(first + j) < (unsigned long long)size; };
  float values[GROUP], others[GROUP];
  if (whole) {
    load_vec(x + first, values);
    if (residual) load_vec(residual + first, others);
  } else {
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
      values[j] = is_there(j) ? to_float(x[first + j]) : 0.0f;
      others[j] = residual && is_there(j) ? to_float(residual[first + j]) : 0.0f;
    }
  }
#pragma unroll
  for (int call = 0; call < GROUP / 4; ++call) {
    u4 words = {};
    if (threshold) words = philox((mask_first >> 2) + group * (GROUP / 4) + call, key_low, key_high, offset_low, offset_high);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // A dropped infinity or NaN is dropped, not multiplied by zero.
      float& value = values[4 * call + j];
      value = is_kept(words.v[j], threshold) ? value * scale : 0.0f;
      if (residual) value += others[4 * call + j];
    }
  }
  if (whole) {
    store_vec(y + first, values);
  } else {
#pragma unroll
    for (int j = 0; j < GROUP; ++j)
      if (is_there(j)) y[first + j] = from_float<T>(values[j]);
  }
}
