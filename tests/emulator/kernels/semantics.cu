// One kernel for each thing whose meaning the emulator must share with a GPU; test_semantics.py says what to expect.
#include "device.cuh"

// Registers as they come from memory: lane l's are a[4l ..], b[2l ..], c[4l ..].
#define TTR_MMA_KERNEL(name, instruction)                                                                          \
  extern "C" __global__ void name(const unsigned* a, const unsigned* b, const float* c, float* out) {              \
    const int lane = threadIdx.x;                                                                                  \
    u4 left;                                                                                                       \
    f4 sum;                                                                                                        \
    for (int i = 0; i < 4; ++i) left.v[i] = a[4 * lane + i], sum.v[i] = c[4 * lane + i];                           \
    sum = instruction(left, b[2 * lane], b[2 * lane + 1], sum);                                                    \
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = sum.v[i];                                                      \
  }
TTR_MMA_KERNEL(multiply_bf16, mma_bf16)
TTR_MMA_KERNEL(multiply_f16, mma_f16)
TTR_MMA_KERNEL(multiply_tf32, mma_tf32)

// 32 rows of 8 elements; lane l gives the address of row rows[l].
extern "C" __global__ void load_matrices(const unsigned short* tile, const int* rows, unsigned* out, long long trans) {
  TTR_SHARED(unsigned short, shared, 32 * 8);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = tile[lane * 8 + i];
  __syncwarp();
  const unsigned short* row = shared + rows[lane] * 8;
  const u4 r = trans ? ldsm_x4<true>(row) : ldsm_x4<false>(row);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r.v[i];
}

// Each thread copies 16 bytes in each of three groups, zeros where `inside` is 0, and waits until one group is left.
extern "C" __global__ void copy_async(const int* from, const int* inside, int* out) {
  TTR_DYN_SMEM(int, shared);
  const int thread = threadIdx.x, count = 4 * blockDim.x;
  for (int group = 0; group < 3; ++group) {
    const int at = group * count + 4 * thread;
    cp_async16(shared + at, from + at, inside[group * blockDim.x + thread] != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  for (int i = thread; i < 2 * count; i += blockDim.x) out[i] = shared[i];
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 2 * count + thread; i < 3 * count; i += blockDim.x) out[i] = shared[i];
}

// Nine results a lane: the four shuffles whole, then in segments of eight, then of a 64-bit value.
extern "C" __global__ void shuffle(const int* value, const int* source, int* out) {
  const int lane = threadIdx.x;
  const int v = value[lane], s = source[lane];
  out[9 * lane] = __shfl_sync(0xffffffffu, v, s);
  out[9 * lane + 1] = __shfl_xor_sync(0xffffffffu, v, 5);
  out[9 * lane + 2] = __shfl_up_sync(0xffffffffu, v, 3);
  out[9 * lane + 3] = __shfl_down_sync(0xffffffffu, v, 3);
  out[9 * lane + 4] = __shfl_sync(0xffffffffu, v, s, 8);
  out[9 * lane + 5] = __shfl_xor_sync(0xffffffffu, v, 9, 8);
  out[9 * lane + 6] = __shfl_up_sync(0xffffffffu, v, 3, 8);
  out[9 * lane + 7] = __shfl_down_sync(0xffffffffu, v, 3, 8);
  const double wide = __shfl_sync(0xffffffffu, (double)v + 1e9, 31 - lane);
  out[9 * lane + 8] = (int)(wide - 1e9);
}

// The odd lanes and the even ones vote apart, at the same time.
extern "C" __global__ void vote(const int* value, unsigned* out) {
  const int lane = threadIdx.x;
  const int v = value[lane];
  const unsigned mask = lane & 1 ? 0xaaaaaaaau : 0x55555555u;
  if (lane & 1) {
    out[4 * lane] = __ballot_sync(mask, v > 0);
    out[4 * lane + 1] = __any_sync(mask, v > 90);
  } else {
    out[4 * lane] = __ballot_sync(mask, v < 0);
    out[4 * lane + 1] = __all_sync(mask, v > -101);
  }
  __syncwarp();
  out[4 * lane + 2] = (unsigned)__reduce_add_sync(0xffffffffu, v);
  out[4 * lane + 3] = (unsigned)__reduce_min_sync(0xffffffffu, v);
}

// Each step adds the left neighbour's value of the step before; two buffers, one barrier a step.
extern "C" __global__ void barriers(const int* value, int* out, long long steps) {
  TTR_SHARED(int, shared, 2 * 96);
  const int thread = threadIdx.x, count = blockDim.x;
  shared[thread] = value[thread];
  int total = 0;
  for (int step = 0; step < (int)steps; ++step) {
    __syncthreads();
    const int* from = shared + step % 2 * 96;
    shared[(step + 1) % 2 * 96 + thread] = from[thread] + from[(thread + count - 1) % count];
  }
  total += __syncthreads_count(thread % 3 == 0);
  total += 1000 * __syncthreads_and(thread < count);
  total += 10000 * __syncthreads_or(thread == count);
  out[thread] = shared[(int)steps % 2 * 96 + thread];
  out[count + thread] = total;
}

// Every thread of a 3-D grid of 3-D blocks writes its own number, once.
extern "C" __global__ void indices(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] =
      blockIdx.z * 100000 + blockIdx.y * 10000 + blockIdx.x * 1000 + threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x;
}

// Integer atomics, from all blocks.
extern "C" __global__ void atomics(int* out, unsigned long long* wide) {
  const int number = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(out, number);
  atomicMax(out + 1, number);
  atomicMin(out + 2, -number);
  atomicOr(out + 3, 1 << number % 31);
  atomicCAS(out + 4, 0, number + 1);
  atomicAdd(wide, 1ull << 40);
}

// Bits and rounding: what Philox, hi/lo pairs and quantised stores lean on.
extern "C" __global__ void arithmetic(const float* x, const unsigned* u, double* out) {
  const int i = threadIdx.x;
  double* r = out + 12 * i;
  r[0] = __umulhi(u[i], 0xD2511F53u);
  r[1] = __float_as_uint(x[i]);
  r[2] = __fmaf_rn(x[i], x[i], -1.0f);
  r[3] = __bfloat162float(__float2bfloat16(x[i]));
  r[4] = __half2float(__float2half(x[i]));
  r[5] = __low2float(__floats2bfloat162_rn(x[i], 0.0f)) - __high2float(__floats2half2_rn(0.0f, x[i]));
  r[6] = rsqrtf(fabsf(x[i]) + 1.0f);
  r[7] = exp2f(x[i]);
  r[8] = __float2int_rn(x[i]);
  r[9] = max(x[i], 0.5f) + min((long long)u[i], 7);
  r[10] = __popc(u[i]) + 100 * __clz((int)u[i]);
  r[11] = (double)__ldg(x + i) * (double)x[i];
}
