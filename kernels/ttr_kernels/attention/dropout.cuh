// Dropout of weights: the mask of reference._keep, drawn anew wherever it is needed.
//
// Key j of a query row and head takes word 2·(bit 3 of j) + (bit 0 of j) of call 4·(j / 16) + (j / 2) % 4, so that the four
// weights which a lane holds of one row, in two neighbouring accumulators (keys 2t, 2t+1, 2t+8, 2t+9 of a block of 16),
// are the four words of one call.
#pragma once
#include "philox.cuh"

struct Mask {
  unsigned threshold;  // a weight is dropped iff its word is below it
  float keep_scale;    // 1 / (1 − rate)
  unsigned key0, key1, offset0, offset1;
  unsigned first;  // of the first query row and head, of the rows and heads that the mask is drawn for

  // `counter`: query row · heads + head, from the first row that there is.
  __device__ __forceinline__ u4 words(unsigned call, unsigned counter) const {
    return philox((unsigned long long)(first + counter) << 32 | call, key0, key1, offset0, offset1);
  }
  __device__ __forceinline__ float factor(unsigned word) const { return word >= threshold ? keep_scale : 0.0f; }
};
