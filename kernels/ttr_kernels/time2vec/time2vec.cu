// Time2Vec. A thread holds frequency and phase of TTR_VECTOR features and goes through rows; TTR_LANES threads share a row,
// so that a warp takes several rows where they are short.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR, LANES = TTR_LANES, THREADS = 256, LINES = THREADS / LANES;
static_assert(VECTOR * LANES <= THREADS, "a thread for each sum of a block");

// An angle in radians as a number of quarter turns and what is left of it, at most π/4, as float32.
struct Reduced {
  int quarter;
  float rest;
};

// For |angle| < 1e12. Adding 1.5 · 2^52 rounds to an integer, which then stands in the low bits: one addition in place of
// a conversion, of which a multiprocessor does far fewer.
__device__ __forceinline__ Reduced reduced(double angle) {
  constexpr double ROUNDING = 6755399441055744.0;
  const double shifted = fma(angle, 0.6366197723675814, ROUNDING), quarters = shifted - ROUNDING;
  // π/2 in two parts.
  const double rest = fma(-quarters, 6.123233995736766e-17, fma(-quarters, 1.5707963267948966, angle));
  return {__double2loint(shifted), float(rest)};
}

// sin(rest + (quarter + turned) · π/2), by the polynomials of common/vector_math.py: sinf and cosf would bring their
// own reduction of huge arguments along.
__device__ __forceinline__ float sine(Reduced angle, int turned) {
  const float r = angle.rest, s = r * r;
  const float p = ((2.7181215489e-06f * s - 1.9839312261e-04f) * s + 8.3333293048e-03f) * s - 1.6666666641e-01f;
  const float c = (2.4433156243e-05f * s - 1.3887316247e-03f) * s + 4.1666645683e-02f;
  const int quarter = angle.quarter + turned;
  const float value = quarter & 1 ? c * s * s + (1.0f - 0.5f * s) : p * s * r + r;
  return quarter & 2 ? -value : value;
}

// The waves of this thread's features, in float64: converted once, not for each row.
struct Waves {
  double frequency[VECTOR], phase[VECTOR];
  __device__ __forceinline__ double angle(int j, double time) const { return fma(time, frequency[j], phase[j]); }
};

__device__ __forceinline__ Waves load_waves(const float* frequency, const float* phase, long long column) {
  Waves waves;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    waves.frequency[j] = frequency[column + j];
    waves.phase[j] = phase[column + j];
  }
  return waves;
}

// The first feature of this thread, and the first of its rows; the next ones follow after as many as the grid holds.
__device__ __forceinline__ long long first_column() {
  return ((long long)blockIdx.y * LANES + threadIdx.x % LANES) * VECTOR;
}
__device__ __forceinline__ long long first_row() { return (long long)blockIdx.x * LINES + threadIdx.x / LANES; }
__device__ __forceinline__ long long next_row(long long row) { return row + (long long)gridDim.x * LINES; }

extern "C" __global__ void __launch_bounds__(THREADS) time2vec_forward(
    const double* __restrict__ times, const float* __restrict__ frequency, const float* __restrict__ phase, T* y,
    long long stride, long long rows, long long width) {
  const long long column = first_column();
  if (column >= width) return;
  const Waves waves = load_waves(frequency, phase, column);
  for (long long row = first_row(); row < rows; row = next_row(row)) {
    const double time = times[row];
    float features[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const double angle = waves.angle(j, time);
      features[j] = column + j == 0 ? float(angle) : sine(reduced(angle), 0);
    }
    store_vec(y + row * stride + column, features);
  }
}

// Store the sums of the block's lines, added in order, as its row of `partials`. All threads must call.
__device__ __forceinline__ void store_sums(
    const double (&sums)[VECTOR], double* partials, long long width, double* scratch) {
  __syncthreads();  // an earlier call's sums may still be read
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) scratch[j * THREADS + threadIdx.x] = sums[j];
  __syncthreads();
  // This thread adds up feature `element` of lane `lane`.
  const int lane = threadIdx.x % LANES, element = threadIdx.x / LANES;
  const long long column = first_column() + element;
  if (element >= VECTOR || column >= width) return;
  double total = 0.0;
#pragma unroll 4
  for (int line = 0; line < LINES; ++line) total += scratch[element * THREADS + line * LANES + lane];
  partials[blockIdx.x * width + column] = total;
}

// Of each block's rows, Σ dy · slope · time and Σ dy · slope, where the slope is the cosine (1 for feature 0): in float64,
// since times may be large and their products cancel.
extern "C" __global__ void __launch_bounds__(THREADS) time2vec_backward(
    const T* __restrict__ dy, long long stride, const double* __restrict__ times, const float* __restrict__ frequency,
    const float* __restrict__ phase, double* dfrequency, double* dphase, long long rows, long long width) {
  TTR_SHARED(double, scratch, VECTOR * THREADS);
  const long long column = first_column();
  double of_frequency[VECTOR], of_phase[VECTOR];
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) of_frequency[j] = of_phase[j] = 0.0;
  if (column < width) {
    const Waves waves = load_waves(frequency, phase, column);
    for (long long row = first_row(); row < rows; row = next_row(row)) {
      const double time = times[row];
      float gradients[VECTOR];
      load_vec(dy + row * stride + column, gradients);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        const float slope = column + j == 0 ? 1.0f : sine(reduced(waves.angle(j, time)), 1);
        const double product = gradients[j] * slope;
        of_frequency[j] = fma(product, time, of_frequency[j]);
        of_phase[j] += product;
      }
    }
  }
  store_sums(of_frequency, dfrequency, width, scratch);
  store_sums(of_phase, dphase, width, scratch);
}
