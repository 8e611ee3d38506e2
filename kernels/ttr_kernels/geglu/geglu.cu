// GeGLU, one pass over memory each way: y = gelu(gate) · value. A row of x holds `width` gates and then as many values.
//
// A thread has a place in a row, VECTOR gates and the values that belong to them, and goes down the rows from its own in
// steps of the grid's. With TTR_BIAS (2 · width,) is added to each row of x first.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR, THREADS = 256;
constexpr bool EXACT = TTR_EXACT, BIAS = TTR_BIAS;

struct Phi {
  float share, slope;
};

// Φ(x) and its derivative: exactly, or by the tanh formula, where with u = √(2/π) (x + 0.044715 x³)
// Φ = ½ (1 + tanh u) = 1 / (1 + e^(−2u)).
__device__ __forceinline__ Phi phi(float x) {
  constexpr float LOG2_E = 1.4426950408889634f, ROOT_2_OVER_PI = 0.7978845608028654f, CUBE = 0.044715f;
  if (EXACT) {
    const float density = 0.3989422804014327f * exp2_fast(-0.5f * LOG2_E * x * x);
    return {0.5f + 0.5f * erff(x * 0.7071067811865476f), density};
  }
  // From |x| = 10 on Φ is 0 or 1 and its slope 0; an infinite square would make that 0 · ∞.
  const float square = fminf(x * x, 1e4f);
  const float exponent = 2.0f * LOG2_E * ROOT_2_OVER_PI * (x + CUBE * square * x);
  // Of e^(2u) and e^(−2u) the one that does not overflow.
  const float power = exp2_fast(-fabsf(exponent)), r = reciprocal_fast(1.0f + power);
  return {exponent < 0.0f ? power * r : r, 2.0f * ROOT_2_OVER_PI * power * r * r * (1.0f + 3.0f * CUBE * square)};
}

struct Columns {
  float gate[VECTOR], value[VECTOR];
};

template <class F>
__device__ __forceinline__ Columns load_columns(const F* row, int width, int column) {
  Columns columns;
  load_vec(row + column, columns.gate);
  load_vec(row + width + column, columns.value);
  return columns;
}
template <class F>
__device__ __forceinline__ void store_columns(F* row, int width, int column, const Columns& columns) {
  store_vec(row + column, columns.gate);
  store_vec(row + width + column, columns.value);
}
__device__ __forceinline__ void add_to(Columns& sum, const Columns& columns) {
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    sum.gate[j] += columns.gate[j];
    sum.value[j] += columns.value[j];
  }
}

__device__ __forceinline__ int first_column() { return int(blockIdx.y * blockDim.x + threadIdx.x) * VECTOR; }
__device__ __forceinline__ long long first_row() { return (long long)blockIdx.x * blockDim.y + threadIdx.y; }
__device__ __forceinline__ long long row_step() { return (long long)gridDim.x * blockDim.y; }

// y may be a part of x.
extern "C" __global__ void __launch_bounds__(THREADS) geglu_forward(
    const T* x, long long x_stride, const float* __restrict__ bias, T* y, long long y_stride, long long rows,
    long long width_) {
  const int width = int(width_), column = first_column();
  if (column >= width) return;
  Columns shift = {};
  if (BIAS) shift = load_columns(bias, width, column);
  for (long long row = first_row(); row < rows; row += row_step()) {
    Columns in = load_columns(x + row * x_stride, width, column);
    if (BIAS) add_to(in, shift);
    float result[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) result[j] = in.gate[j] * phi(in.gate[j]).share * in.value[j];
    store_vec(y + row * y_stride + column, result);
  }
}

// dgate = dy · value · (Φ + gate · Φ')    dvalue = dy · gate · Φ; with a bias also partials[blockIdx.x] = their sums over
// the block's rows, before they are rounded. dx may be x.
extern "C" __global__ void __launch_bounds__(THREADS) geglu_backward(
    const T* dy, long long dy_stride, const T* x, long long x_stride, const float* __restrict__ bias, T* dx,
    long long dx_stride, float* partials, long long rows, long long width_) {
  const int width = int(width_), column = first_column();
  const bool inside = column < width;
  Columns shift = {}, sums = {};
  if (BIAS && inside) shift = load_columns(bias, width, column);
  for (long long row = first_row(); inside && row < rows; row += row_step()) {
    Columns in = load_columns(x + row * x_stride, width, column), out;
    float g[VECTOR];
    load_vec(dy + row * dy_stride + column, g);
    if (BIAS) add_to(in, shift);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const float gate = in.gate[j];
      const Phi p = phi(gate);
      out.gate[j] = g[j] * in.value[j] * (p.share + gate * p.slope);
      out.value[j] = g[j] * gate * p.share;
    }
    store_columns(dx + row * dx_stride, width, column, out);
    if (BIAS) add_to(sums, out);
  }
  if (BIAS) {
    // The block's first line of threads adds up what the others have, in order.
    TTR_SHARED(float, scratch, 2 * VECTOR * THREADS);
    const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      scratch[2 * j * THREADS + thread] = sums.gate[j];
      scratch[(2 * j + 1) * THREADS + thread] = sums.value[j];
    }
    __syncthreads();
    if (threadIdx.y > 0 || !inside) return;
    for (int other = thread + int(blockDim.x); other < int(blockDim.x * blockDim.y); other += int(blockDim.x)) {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        sums.gate[j] += scratch[2 * j * THREADS + other];
        sums.value[j] += scratch[(2 * j + 1) * THREADS + other];
      }
    }
    store_columns(partials + blockIdx.x * 2ll * width, width, column, sums);
  }
}
