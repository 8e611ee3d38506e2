// The time bias −rate · φ(u), u = (t_i − t_j) / tau, φ(u) = u (TTR_BIAS 1) or log(1 + u) (2), exact at UNIX times.
//
// Times are float64 in global memory. For a tile of keys the kernels subtract one time of that tile, its base (the time of
// its last key), from the times of both sides, in float64, once per row or column, and go on in float32:
//  - Every query sees the whole tile: then t_j <= base <= t_i, so that u = (t_i − base)/tau − (t_j − base)/tau adds two
//    terms of one sign, nothing cancels, and u has float32's relative accuracy after a single subtraction per logit.
//  - Otherwise (tiles on the diagonal or at the window's edge) the terms may cancel: each is a pair of float32, high and
//    low, and u keeps 2^-47 of the time that the tile spans: two subtractions and one addition per logit.
#pragma once
#include "device.cuh"

constexpr int LINEAR = 1, LOG = 2, BIAS = TTR_BIAS;
constexpr float LN2 = 0.693147180559945f, LOG2E = 1.44269504088896f;

// A time relative to the base, in units of tau.
struct Gap { float high, low; };

__device__ __forceinline__ Gap gap(double time, double base, double inverse_tau) {
  const double x = (time - base) * inverse_tau;
  const float high = float(x);
  return Gap{high, float(x - double(high))};
}

// u where terms may cancel. Keys that are not visible may lie in the future, but φ must be finite.
__device__ __forceinline__ float age(Gap query, Gap key) {
  return fmaxf((query.high - key.high) + (query.low - key.low), 0.0f);
}

// Logits are kept in the unit of q·k. There the bias is −slope · decay(u): `decay` is φ, or log2(1 + u) where that is the
// instruction at hand (16-bit types: 2^-22 of absolute error in a logit is far below the rounding of the inputs).
constexpr bool NATURAL = sizeof(TTR_T) == 4;
__device__ __forceinline__ float bias_slope(float rate, float scale) {
  return rate / scale * (BIAS == LOG && !NATURAL ? LN2 : 1.0f);
}
__device__ __forceinline__ float decay(float u) {
  if (BIAS == LINEAR) return u;
  return NATURAL ? log1pf(u) : log2_fast(1.0f + u);
}

__device__ __forceinline__ float reciprocal(float x) { return NATURAL ? 1.0f / x : reciprocal_fast(x); }

// φ(u) from decay(u), for the gradient of rate: there small ages count by their relative error.
__device__ __forceinline__ float phi(float u, float decay) {
  if (BIAS == LINEAR || NATURAL) return decay;
  const float series = u * fmaf(u, fmaf(u, fmaf(u, -0.25f, 1.0f / 3.0f), -0.5f), 1.0f);
  return u < 0.0625f ? series : decay * LN2;
}
