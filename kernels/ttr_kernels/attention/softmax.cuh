// Online softmax in base 2 over accumulators [m][n]: a lane holds rows g and g + 8 of each m, of each row 2·N logits.
#pragma once
#include "device.cuh"

// The largest and the sum over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Logits x, in base 2 x·scale − lag, become weights relative to the row's largest logit so far; what was summed relative
// to the old largest one (`total`, of the lane's own columns, and `acc`) is rescaled. scale > 0.
template <int M, int N, int D>
__device__ __forceinline__ void softmax_step(
    f4 (&x)[M][N], f4 (&acc)[M][D], float (&largest)[M][2], float (&total)[M][2], const float (&lag)[M][2],
    float scale) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(x[m][n].v[2 * h], x[m][n].v[2 * h + 1]));
      top = fmaxf(largest[m][h], row_max(top) * scale - lag[m][h]);
      // Without any visible key so far, all weights are exp2(−inf − 0).
      const float zero = top == -INFINITY ? 0.0f : top;
      const float factor = exp2_fast(largest[m][h] - zero);
      const float from = zero + lag[m][h];
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = exp2_fast(fmaf(x[m][n].v[2 * h + e], scale, -from));
          x[m][n].v[2 * h + e] = weight;
          sum += weight;
        }
      largest[m][h] = top;
      total[m][h] = total[m][h] * factor + sum;
#pragma unroll
      for (int d = 0; d < D; ++d) {
        acc[m][d].v[2 * h] *= factor;
        acc[m][d].v[2 * h + 1] *= factor;
      }
    }
}
