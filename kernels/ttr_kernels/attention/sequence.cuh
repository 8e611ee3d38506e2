// What a block works on, and which keys a query sees.
//
// The work list has one row of five integers per tile of queries (forward, dq) or keys (dk, dv), in all sequences: the
// first row of the sequence's queries and how many, the same for its keys, and where in the sequence the tile begins.
// gpu.py sorts it, the longest work first. A list of a fixed length ends with tiles of sequences without rows.
#pragma once
#include "device.cuh"

struct Sequence {
  int query_row, length, key_row, key_length, first;
  int shift;   // key_length − length: query i stands beside key i + shift
  int window;  // 0: none
  bool causal;

  __device__ __forceinline__ Sequence(const int* work, long long causal, long long window)
      : query_row(work[5 * blockIdx.x]), length(work[5 * blockIdx.x + 1]), key_row(work[5 * blockIdx.x + 2]),
        key_length(work[5 * blockIdx.x + 3]), first(work[5 * blockIdx.x + 4]), shift(key_length - length),
        window(int(window)), causal(causal != 0) {}

  // Query i sees the keys [low(i), high(i)).
  __device__ __forceinline__ int low(int query) const { return window > 0 ? max(0, query + shift - window + 1) : 0; }
  __device__ __forceinline__ int high(int query) const {
    return causal ? min(key_length, query + shift + 1) : key_length;
  }
  // Key j is seen by the queries [first_query(j), last_query(j)).
  __device__ __forceinline__ int first_query(int key) const { return causal ? max(0, key - shift) : 0; }
  __device__ __forceinline__ int last_query(int key) const {
    return window > 0 ? min(length, key - shift + window) : length;
  }
  // Does each of these queries see each of these keys?
  __device__ __forceinline__ bool whole(int query, int queries, int key, int keys) const {
    return key >= low(query + queries - 1) && key + keys <= high(query);
  }
  __device__ __forceinline__ bool sees(int query, int key) const { return key >= low(query) && key < high(query); }
};
