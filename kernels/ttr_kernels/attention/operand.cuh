// The shape of a tile in shared memory, and what the tensor cores take from it, for each element type.
//
// A tile holds rows of WIDTH elements (the head dim, padded with zeros). Its unit is the chunk of 16 bytes, which is what
// cp.async copies and what one row of an ldmatrix reads. Chunks of a row are permuted (`place`), so that the 8 rows of an
// ldmatrix, at the same chunk, touch all 32 banks once.
//
// Fragments are those of mma.sync m16n8k16 (16-bit types) and m16n8k8 (float32, as TF32), PTX ISA, "Matrix fragments".
// With lane = 4·g + t, an accumulator f4 of a 16×8 tile holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). Counted in
// chunks the operands of both instructions are alike: a step of the contraction takes two chunks, 16 or 8 elements.
#pragma once
#include "device.cuh"

typedef TTR_T Element;
constexpr int WIDTH = TTR_HEAD_DIM;
constexpr int CHUNK = 16 / int(sizeof(Element));  // elements of a chunk
constexpr int CHUNKS = WIDTH / CHUNK;             // chunks of a row
static_assert(CHUNKS % 4 == 0, "a row is a multiple of 64 bytes");

// Index of the first element of a chunk. Rows of a multiple of 128 bytes begin at the same bank: 8 rows need 8 different
// chunks. Rows of an odd multiple of 64 bytes alternate between two halves of the banks: 4 different chunks suffice.
__device__ __forceinline__ int place(int row, int chunk) {
  const int turn = CHUNKS % 8 == 0 ? row & 7 : (row >> 1) & 3;
  return (row * CHUNKS + (chunk ^ turn)) * CHUNK;
}

// Left: 16 rows × 2 chunks. Right: 2 chunks × 8 columns. STEP: 8-column accumulators that make up the left operand of the
// next product.
template <class T>
struct Operand {
  static constexpr int STEP = 2;
  struct Left { u4 v; };
  struct Right { unsigned v[2]; };
  static __device__ __forceinline__ Left left(u4 raw) { return Left{raw}; }
  static __device__ __forceinline__ Right right(unsigned k0, unsigned k1) { return Right{{k0, k1}}; }
  static __device__ __forceinline__ unsigned pack(float low, float high, __nv_bfloat16) { return pack_bf16(low, high); }
  static __device__ __forceinline__ unsigned pack(float low, float high, __half) { return pack_f16(low, high); }
  static __device__ __forceinline__ Left left(f4 x, f4 y) {
    return Left{u4{{pack(x.v[0], x.v[1], T()), pack(x.v[2], x.v[3], T()),
                    pack(y.v[0], y.v[1], T()), pack(y.v[2], y.v[3], T())}}};
  }
  // Columns `column` .. + 16 of the rows from `row` on, as two right operands: the transposing ldmatrix.
  static __device__ __forceinline__ void columns(const T* tile, int row, int column, Right& b0, Right& b1) {
    const int lane = threadIdx.x & 31;
    const u4 b = ldsm_x4<true>(tile + place(row + (lane & 15), column / CHUNK + (lane >> 4)));
    b0 = right(b.v[0], b.v[1]);
    b1 = right(b.v[2], b.v[3]);
  }
};

// float32 goes through TF32 three times: x = high + low, both TF32, and a·b ≈ low·high + high·low + high·high, which
// leaves a relative error of about 2^-22 per product.
template <>
struct Operand<float> {
  static constexpr int STEP = 1;
  struct Left { u4 high, low; };
  struct Right { unsigned high[2], low[2]; };
  // The nearest TF32 (ties away from zero); the tensor cores do not look at the other 13 bits.
  static __device__ __forceinline__ unsigned nearest(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }
  static __device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
    high = nearest(x);
    low = nearest(x - __uint_as_float(high));
  }
  static __device__ __forceinline__ Left left(u4 raw) {
    Left a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(__uint_as_float(raw.v[i]), a.high.v[i], a.low.v[i]);
    return a;
  }
  static __device__ __forceinline__ Right right(float k0, float k1) {
    Right b;
    split(k0, b.high[0], b.low[0]);
    split(k1, b.high[1], b.low[1]);
    return b;
  }
  static __device__ __forceinline__ Right right(unsigned k0, unsigned k1) {
    return right(__uint_as_float(k0), __uint_as_float(k1));
  }
  // An accumulator holds columns 2t and 2t+1 where a left operand wants t and t+4. The order of a contraction is free, so
  // column 2t is taken for t and 2t+1 for t+4; `columns` takes its rows in the same order.
  static __device__ __forceinline__ Left left(f4 x, f4) {
    Left a;
    split(x.v[0], a.high.v[0], a.low.v[0]);
    split(x.v[2], a.high.v[1], a.low.v[1]);
    split(x.v[1], a.high.v[2], a.low.v[2]);
    split(x.v[3], a.high.v[3], a.low.v[3]);
    return a;
  }
  // ldmatrix transposes 16-bit elements only: plain loads, which the permutation keeps free of bank conflicts.
  static __device__ __forceinline__ void columns(const float* tile, int row, int column, Right& b0, Right& b1) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int even = row + 2 * t, chunk = column / CHUNK + (g >> 2), rest = g & 3;
    b0 = right(tile[place(even, chunk) + rest], tile[place(even + 1, chunk) + rest]);
    b1 = right(tile[place(even, chunk + 2) + rest], tile[place(even + 1, chunk + 2) + rest]);
  }
};

__device__ __forceinline__ f4 multiply_add(Operand<__nv_bfloat16>::Left a, Operand<__nv_bfloat16>::Right b, f4 c) {
  return mma_bf16(a.v, b.v[0], b.v[1], c);
}
__device__ __forceinline__ f4 multiply_add(Operand<__half>::Left a, Operand<__half>::Right b, f4 c) {
  return mma_f16(a.v, b.v[0], b.v[1], c);
}
__device__ __forceinline__ f4 multiply_add(Operand<float>::Left a, Operand<float>::Right b, f4 c) {
  c = mma_tf32(a.low, b.high[0], b.high[1], c);
  c = mma_tf32(a.high, b.low[0], b.low[1], c);
  return mma_tf32(a.high, b.high[0], b.high[1], c);
}
