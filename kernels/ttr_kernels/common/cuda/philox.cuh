// Philox4x32-10 (Salmon et al. 2011), bit for bit that of common/philox.py: see there what key and counter mean.
#pragma once
#include "device.cuh"

// The four words of a 64-bit position under a key (the seed) and an offset.
__device__ __forceinline__ u4 philox(
    unsigned long long position, unsigned key_low, unsigned key_high, unsigned offset_low, unsigned offset_high) {
  unsigned c0 = (unsigned)position, c1 = (unsigned)(position >> 32), c2 = offset_low, c3 = offset_high;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key_low;
    c1 = low1;
    c2 = high0 ^ c3 ^ key_high;
    c3 = low0;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return u4{{c0, c1, c2, c3}};
}

// `offset_at` holds a number that is added to the offset, or is null: so that a captured graph can be replayed with others.
__device__ __forceinline__ void add_to_offset(
    const unsigned long long* offset_at, unsigned& offset_low, unsigned& offset_high) {
  if (!offset_at) return;
  const unsigned long long sum = ((unsigned long long)offset_high << 32 | offset_low) + *offset_at;
  offset_low = (unsigned)sum;
  offset_high = (unsigned)(sum >> 32);
}

// An element is kept iff its word is at least the threshold of common/philox.py:keep_threshold.
__device__ __forceinline__ bool is_kept(unsigned word, unsigned threshold) { return word >= threshold; }
