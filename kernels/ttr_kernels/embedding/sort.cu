// A stable sort of indices by eight bits at a time, lowest first: what stands in which place, without a wait for the host
// (unlike CuPy's argsort), so that it can be part of a CUDA graph.
//
// Each pass counts how often each digit occurs in each block of 1024 places, sums the counts up to where the digit of the
// block begins in the result, and moves. Only integers are added, so the order of additions does not matter.
#include "numeric.cuh"

#if TTR_INDEX_BYTES == 8
typedef long long Index;
#else
typedef int Index;
#endif
constexpr int BLOCK = 1024, WARPS = BLOCK / 32, DIGITS = 256;

// What is sorted: `keys`, or in the first pass, where that is null, the indices; all that are no row of the table stand
// behind those that are.
__device__ __forceinline__ unsigned key_at(
    const Index* indices, const unsigned* keys, long long place, long long vocabulary) {
  if (keys) return keys[place];
  // A negative index is a large number.
  return unsigned(min((unsigned long long)indices[place], (unsigned long long)vocabulary));
}

// counts (DIGITS, blocks)
extern "C" __global__ void __launch_bounds__(BLOCK) sort_count(
    const Index* __restrict__ indices, const unsigned* __restrict__ keys, long long size, long long vocabulary,
    long long shift, int* counts) {
  TTR_SHARED(int, histogram, DIGITS);
  const int thread = threadIdx.x;
  const long long place = (long long)blockIdx.x * BLOCK + thread;
  if (thread < DIGITS) histogram[thread] = 0;
  __syncthreads();
  if (place < size) atomicAdd(&histogram[key_at(indices, keys, place, vocabulary) >> shift & (DIGITS - 1)], 1);
  __syncthreads();
  if (thread < DIGITS) counts[(long long)thread * gridDim.x + blockIdx.x] = histogram[thread];
}

// counts[i] becomes Σ of all before it. One block, of which each thread takes consecutive ones.
extern "C" __global__ void __launch_bounds__(BLOCK) sort_sum(int* counts, long long size) {
  TTR_SHARED(int, sums, WARPS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long each = (size + BLOCK - 1) / BLOCK, begin = threadIdx.x * each, end = min(begin + each, size);
  int sum = 0;
  for (long long i = begin; i < end; ++i) sum += counts[i];
  int before = sum;  // and then: the sum up to and with this thread
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes <<= 1) {
    const int other = __shfl_up_sync(FULL_WARP, before, lanes);
    if (lane >= lanes) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  before -= sum;
  for (int i = 0; i < warp; ++i) before += sums[i];
  for (long long i = begin; i < end; ++i) {
    const int count = counts[i];
    counts[i] = before;
    before += count;
  }
}

// Move keys and the places where they stood at first (null in the first pass) to where the digit's turn is.
extern "C" __global__ void __launch_bounds__(BLOCK) sort_move(
    const Index* __restrict__ indices, const unsigned* __restrict__ keys, const unsigned* __restrict__ places,
    long long size, long long vocabulary, long long shift, const int* __restrict__ counts, unsigned* keys_to,
    unsigned* places_to) {
  TTR_SHARED(int, turn, WARPS * DIGITS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const long long place = (long long)blockIdx.x * BLOCK + thread;
  const bool inside = place < size;
  const unsigned key = inside ? key_at(indices, keys, place, vocabulary) : 0u;
  const unsigned digit = key >> shift & (DIGITS - 1);
  for (int i = thread; i < WARPS * DIGITS; i += BLOCK) turn[i] = 0;
  // The lanes of this warp with the same digit.
  unsigned same = __ballot_sync(FULL_WARP, inside);
#pragma unroll
  for (int bit = 0; bit < 8; ++bit) {
    const bool one = digit >> bit & 1;
    const unsigned ones = __ballot_sync(FULL_WARP, one);
    same &= one ? ones : ~ones;
  }
  const int earlier = __popc(same & ((1u << lane) - 1));
  __syncthreads();
  if (inside && earlier == 0) turn[warp * DIGITS + digit] = __popc(same);
  __syncthreads();
  if (thread < DIGITS) {
    int next = counts[(long long)thread * gridDim.x + blockIdx.x];
#pragma unroll 8
    for (int w = 0; w < WARPS; ++w) {
      const int count = turn[w * DIGITS + thread];
      turn[w * DIGITS + thread] = next;
      next += count;
    }
  }
  __syncthreads();
  if (!inside) return;
  const int to = turn[warp * DIGITS + digit] + earlier;
  keys_to[to] = key;
  places_to[to] = places ? places[place] : unsigned(place);
}
