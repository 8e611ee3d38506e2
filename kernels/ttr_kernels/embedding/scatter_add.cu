// The gradient of an embedding: rows of dy added to the rows of a table, without atomics.
//
// The indices have been sorted, so the rows to be added to one row of the table are a run. Runs are cut at every
// CHUNK-th place, whatever their lengths, so that a frequent index is shared by many. A run inside a chunk is added to the
// table at once; parts of a run that is cut are added up by a second kernel. The order of all sums follows from the
// indices alone.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR, CHUNK = 32, AHEAD = 4, BLOCK = 128, WARPS = 8;
static_assert(CHUNK % AHEAD == 0, "a chunk is worked on AHEAD places at a time");

// One chunk. keys (size): the sorted indices, all from `vocabulary` on at the end; places (size): where they stood.
// partials (chunks, 2, width): the sum of the run that goes on from the chunk before, and of the run that begins here and
// goes on in the next. `lanes` threads, a power of two up to BLOCK, share a chunk, in a block and along the grid's y.
extern "C" __global__ void __launch_bounds__(BLOCK) add_chunks(
    const unsigned* __restrict__ keys, const unsigned* __restrict__ places, long long size, long long vocabulary,
    const T* __restrict__ dy, long long stride, float* table, long long table_stride, float* partials, long long width,
    long long lanes) {
  const int thread = threadIdx.x, sharing = int(lanes);
  const long long chunk = blockIdx.x * (long long)(BLOCK / sharing) + thread / sharing;
  const long long column = (blockIdx.y * lanes + thread % sharing) * VECTOR;
  const long long begin = chunk * CHUNK, end = begin + CHUNK;
  if (begin >= size || column >= width) return;
  bool goes_on = begin > 0 && keys[begin - 1] == keys[begin];  // whether the present run began before the chunk
  float sum[VECTOR] = {};
  for (long long first = begin; first < end; first += AHEAD) {
    unsigned key[AHEAD + 1];  // `vocabulary`, of which nothing is added, behind the last
    // Whether a row of the table is complete here; no later one is the same row, so it may be read ahead.
    bool complete[AHEAD];
    float values[AHEAD][VECTOR], old[AHEAD][VECTOR];
#pragma unroll
    for (int i = 0; i <= AHEAD; ++i) key[i] = first + i < size ? keys[first + i] : unsigned(vocabulary);
    bool began_before = goes_on;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const bool counts = key[i] < vocabulary, ends = key[i + 1] != key[i];
      complete[i] = counts && ends && !began_before;
      if (ends) began_before = false;
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) values[i][j] = old[i][j] = 0.0f;
      if (counts) load_vec(dy + places[first + i] * stride + column, values[i]);
      if (complete[i]) load_vec(table + key[i] * table_stride + column, old[i]);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const bool ends = key[i + 1] != key[i];
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sum[j] += values[i][j];
      if (!ends && first + i + 1 < end) continue;
      if (complete[i]) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum[j] += old[i][j];
        store_vec(table + key[i] * table_stride + column, sum);
      } else {
        store_vec(partials + (2 * chunk + !goes_on) * width + column, sum);
      }
      goes_on = false;
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sum[j] = 0.0f;
    }
  }
}

// Of the run that begins in chunk blockIdx.x, which is not the last, and goes on in the next: the parts, added to the
// table's row. A block has 32 vectors of columns, and of each WARPS threads that take every WARPS-th part.
extern "C" __global__ void __launch_bounds__(32 * WARPS) add_cut_runs(
    const unsigned* __restrict__ keys, long long size, long long vocabulary, const float* __restrict__ partials,
    float* table, long long table_stride, long long width) {
  TTR_SHARED(float, sums, WARPS * VECTOR * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long chunk = blockIdx.x, begin = chunk * CHUNK, end = begin + CHUNK;
  const unsigned key = keys[end - 1];
  if (key >= vocabulary || keys[end] != key || (begin > 0 && keys[begin - 1] == key)) return;
  // The last chunk that begins with this key: it is `low` or lies below `high`.
  long long low = chunk + 1, high = (size + CHUNK - 1) / CHUNK;
  while (high - low > 1) {
    const long long middle = (low + high) / 2;
    if (keys[middle * CHUNK] == key) low = middle;
    else high = middle;
  }
  const long long column = ((long long)blockIdx.y * 32 + lane) * VECTOR;
  float sum[VECTOR] = {};
  if (column < width) {
    if (warp == 0) load_vec(partials + (2 * chunk + 1) * width + column, sum);
#pragma unroll 4
    for (long long part = chunk + 1 + warp; part <= low; part += WARPS) {
      float values[VECTOR];
      load_vec(partials + 2 * part * width + column, values);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) sum[j] += values[j];
    }
  }
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) sums[(warp * VECTOR + j) * 32 + lane] = sum[j];
  __syncthreads();
  if (warp > 0 || column >= width) return;
  float total[VECTOR];
  load_vec(table + key * table_stride + column, total);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += sums[(w * VECTOR + j) * 32 + lane];
    total[j] += all;
  }
  store_vec(table + key * table_stride + column, total);
}
