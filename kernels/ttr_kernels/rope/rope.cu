// Rotary embedding: each pair (a, b) of a head's features becomes (a cos θ − b sin θ, a sin θ + b cos θ), one pass over
// memory.
//
// A thread has a place in a row: PAIRS pairs of a head, or VECTOR features behind the pairs, which are copied. It serves
// that place in HEADS heads, for which it reads their cosines and sines once. Neighbouring threads have neighbouring
// pairs, then neighbouring heads.
#include "numeric.cuh"

typedef TTR_T T;
constexpr int VECTOR = TTR_VECTOR, PAIRS = TTR_PAIRS, HEADS = TTR_HEADS, THREADS = 128;
constexpr bool INTERLEAVED = TTR_INTERLEAVED;

// N features in accesses of VECTOR.
template <int N>
__device__ __forceinline__ void load(const T* from, float (&values)[N]) {
  static_assert(N % VECTOR == 0, "whole accesses");
#pragma unroll
  for (int i = 0; i < N; i += VECTOR) {
    float part[VECTOR];
    load_vec(from + i, part);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[i + j] = part[j];
  }
}
template <int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += VECTOR) {
    float part[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) part[j] = values[i + j];
    store_vec(to + i, part);
  }
}

struct Pairs {
  float a[PAIRS], b[PAIRS];
};

// The pairs from number `first` on: features (2j, 2j + 1), or (j, j + half).
__device__ __forceinline__ Pairs load_pairs(const T* head, int first, int half) {
  Pairs pairs;
  if constexpr (INTERLEAVED) {
    float both[2 * PAIRS];
    load(head + 2 * first, both);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      pairs.a[j] = both[2 * j];
      pairs.b[j] = both[2 * j + 1];
    }
  } else {
    load(head + first, pairs.a);
    load(head + half + first, pairs.b);
  }
  return pairs;
}
__device__ __forceinline__ void store_pairs(T* head, int first, int half, const Pairs& pairs) {
  if constexpr (INTERLEAVED) {
    float both[2 * PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      both[2 * j] = pairs.a[j];
      both[2 * j + 1] = pairs.b[j];
    }
    store(head + 2 * first, both);
  } else {
    store(head + first, pairs.a);
    store(head + half + first, pairs.b);
  }
}

// cosines and sines (table_rows, half); row i of x takes row i mod table_rows. `sign` −1 turns back. A head has `places`
// places; a thread takes heads `first`, first + groups, ... of which there are at most HEADS. out may be x.
extern "C" __global__ void __launch_bounds__(THREADS) rope(
    const T* x, long long x_stride, const float* __restrict__ cosines, const float* __restrict__ sines,
    long long table_rows, long long half_, float sign, T* out, long long out_stride, long long rows, long long heads_,
    long long dim_, long long places_, long long groups_) {
  const int half = int(half_), heads = int(heads_), dim = int(dim_), places = int(places_), groups = int(groups_);
  const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  const int at = int(blockIdx.y * blockDim.x + threadIdx.x), first = at / places, pair = at % places * PAIRS;
  if (row >= rows || first >= groups) return;
  x += row * x_stride;
  out += row * out_stride;
  if (pair >= half) {
    const int feature = 2 * half + (pair - half) / PAIRS * VECTOR;
    for (int head = first; head < heads; head += groups) {
      float values[VECTOR];
      load_vec(x + head * dim + feature, values);
      store_vec(out + head * dim + feature, values);
    }
    return;
  }
  Pairs in[HEADS];
#pragma unroll
  for (int k = 0; k < HEADS; ++k) {
    const int head = first + k * groups;
    if (head < heads) in[k] = load_pairs(x + head * dim, pair, half);
  }
  const long long entry = (row < table_rows ? row : row % table_rows) * half + pair;
  float c[PAIRS], s[PAIRS];
  load_vec(cosines + entry, c);
  load_vec(sines + entry, s);
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) s[j] *= sign;
#pragma unroll
  for (int k = 0; k < HEADS; ++k) {
    const int head = first + k * groups;
    if (head >= heads) break;
    Pairs turned;
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      turned.a[j] = in[k].a[j] * c[j] - in[k].b[j] * s[j];
      turned.b[j] = in[k].a[j] * s[j] + in[k].b[j] * c[j];
    }
    store_pairs(out + head * dim, pair, half, turned);
  }
}
