// Chunks of at most 64 positions of one sequence, and how weights decay inside one and from chunk to chunk.
#pragma once
#include "tile.cuh"

// Of the positions of one chunk for one head. TTR_DECAYS 0: nothing decays, and there are no times.
struct Chunk {
  long long row;  // first of its positions
  int count;
  float shift;    // features of keys are relative to exp(shift)
  float rescale;  // of what was relative to the shift of the chunk before
  float rate;     // of decay
  float span;     // time from the chunk before to the last position
  const double* times;
  double base, last;  // the chunk before's last time, this one's

  __device__ __forceinline__ float weight(float gap) const { return TTR_DECAYS ? expf(-rate * gap) : 1.0f; }
  // Time since the chunk before, until the chunk's last position, and between two positions.
  __device__ __forceinline__ float age(int i) const { return TTR_DECAYS ? float(times[row + i] - base) : 0.0f; }
  __device__ __forceinline__ float left(int j) const { return TTR_DECAYS ? float(last - times[row + j]) : 0.0f; }
  __device__ __forceinline__ float gap(int i, int j) const {
    return TTR_DECAYS ? float(times[row + i] - times[row + j]) : 0.0f;
  }
  __device__ __forceinline__ float through() const { return weight(span); }
};

// table (chunks, 3): first row, count, sequence. shifts: of each sequence one line of heads before its first chunk, and
// one after each chunk. bases (chunks, heads).
__device__ __forceinline__ Chunk load_chunk(
    const long long* table, long long chunk, const float* shifts, long long heads, int head, const double* times,
    const double* bases, const float* rates) {
  Chunk c;
  c.row = table[3 * chunk];
  c.count = int(table[3 * chunk + 1]);
  const float* shift = shifts + (chunk + table[3 * chunk + 2]) * heads + head;
  c.shift = shift[heads];
  c.rescale = expf(shift[0] - c.shift);
  c.times = times;
  c.rate = TTR_DECAYS ? rates[head] : 0.0f;
  c.base = TTR_DECAYS ? bases[chunk * heads + head] : 0.0;
  c.last = TTR_DECAYS ? times[c.row + c.count - 1] : 0.0;
  c.span = float(c.last - c.base);
  return c;
}
