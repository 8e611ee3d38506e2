// Kernels with one fault each, present where `broken` is 1 and mended where it is 0; test_faults.py names what the
// emulator must say of them. All run with 64 threads and 256 bytes of dynamic shared memory; out has 64 elements.
#include "device.cuh"

#define TTR_KERNEL extern "C" __global__ void
constexpr unsigned ALL = 0xffffffffu;

TTR_KERNEL read_past_end(const float* x, float* out, long long broken) {
  out[threadIdx.x] = x[threadIdx.x + (broken ? 1 : 0)];
}

TTR_KERNEL write_before_begin(const float* x, float* out, long long broken) {
  if (threadIdx.x < 63) out[(int)threadIdx.x - (broken ? 1 : 0)] = x[threadIdx.x];
}

TTR_KERNEL write_past_dynamic_shared(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  shared[threadIdx.x + (broken ? 1 : 0)] = x[threadIdx.x];
  if (threadIdx.x == 5) out[5] = shared[5 + (broken ? 1 : 0)];
}

TTR_KERNEL write_past_static_shared(const float* x, float* out, long long broken) {
  TTR_SHARED(float, first, 63);
  TTR_SHARED(float, second, 63);
  if (threadIdx.x < 63) second[threadIdx.x] = 0.0f;
  if (threadIdx.x < 63 + (broken ? 1 : 0)) first[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 63) out[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x];
}

TTR_KERNEL too_much_static_shared(const float* x, float* out, long long broken) {
  if (broken) {
    TTR_SHARED(float, large, 12289);
    large[threadIdx.x] = x[threadIdx.x];
  }
  out[threadIdx.x] = 0.0f;
}

TTR_KERNEL copy_past_end(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  if (threadIdx.x < 16) cp_async16(shared + 4 * threadIdx.x, x + 4 * (threadIdx.x + 1), threadIdx.x < 15 || broken);
  cp_async_commit();
  cp_async_wait<0>();
  if (threadIdx.x < 16) out[threadIdx.x] = shared[4 * threadIdx.x];
}

TTR_KERNEL read_unwritten(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  if (threadIdx.x < 63 || !broken) shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

TTR_KERNEL wait_too_little(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  if (threadIdx.x < 8) cp_async16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  cp_async_commit();
  if (threadIdx.x < 8) cp_async16(shared + 32 + 4 * threadIdx.x, x + 32 + 4 * threadIdx.x, true);
  cp_async_commit();
  if (broken) cp_async_wait<1>();
  else cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
  cp_async_wait<0>();
}

TTR_KERNEL never_wait(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  if (threadIdx.x < 16) cp_async16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  cp_async_commit();
  if (!broken) cp_async_wait<0>();
  out[threadIdx.x] = 0.0f;
}

TTR_KERNEL no_barrier_after_write(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  if (!broken) __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

TTR_KERNEL no_barrier_after_copy(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  if (threadIdx.x < 16) cp_async16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!broken) __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

// The buffer is filled again while others may still read it: four tiles through one buffer.
TTR_KERNEL no_barrier_before_reuse(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  float sum = 0.0f;
  for (int tile = 0; tile < 4; ++tile) {
    shared[threadIdx.x] = x[(threadIdx.x + tile) % 64];
    __syncthreads();
    sum += shared[threadIdx.x ^ 32];
    if (!broken) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// The same with two buffers, filled ahead by asynchronous copies: what a pipelined attention kernel does.
TTR_KERNEL no_barrier_before_prefetch(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  float sum = 0.0f;
  if (threadIdx.x < 8) cp_async16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  cp_async_commit();
  for (int tile = 0; tile < 5; ++tile) {
    if (tile < 4 && threadIdx.x < 8)
      cp_async16(shared + (tile + 1) % 2 * 32 + 4 * threadIdx.x, x + 4 * (tile + 1) + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    sum += shared[tile % 2 * 32 + (threadIdx.x + tile) % 32];
    if (!broken) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

TTR_KERNEL no_syncwarp(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  if (!broken) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

TTR_KERNEL shuffle_for_barrier(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  const float other = __shfl_xor_sync(ALL, x[threadIdx.x], 1);  // orders no memory
  if (!broken) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1] + other;
}

// Launched with two blocks.
TTR_KERNEL blocks_share_an_element(const float* x, float* out, long long broken) {
  if (threadIdx.x < 32) out[threadIdx.x + (broken ? 31 : 32) * blockIdx.x] = x[threadIdx.x];
}

TTR_KERNEL block_reads_what_another_writes(const float* x, float* out, long long broken) {
  if (blockIdx.x == 0) out[threadIdx.x] = x[threadIdx.x];
  else if (broken) out[threadIdx.x & 31] += 1.0f;
}

TTR_KERNEL plain_store_beside_atomics(const float* x, float* out, long long broken) {
  int* const count = reinterpret_cast<int*>(out);
  atomicAdd(count, 1);
  if (broken && threadIdx.x == 40) count[0] = 0;
}

TTR_KERNEL add_floats_atomically(const float* x, float* out, long long broken) {
  if (broken) atomicAdd(out, x[threadIdx.x]);
  else out[threadIdx.x] = x[threadIdx.x];
}

TTR_KERNEL half_at_barrier(const float* x, float* out, long long broken) {
  if (!broken || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

TTR_KERNEL exit_before_barrier(const float* x, float* out, long long broken) {
  if (broken && threadIdx.x == 9) return;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

TTR_KERNEL two_barriers(const float* x, float* out, long long broken) {
  if (broken && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (!broken) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

TTR_KERNEL lane_missing_at_shuffle(const float* x, float* out, long long broken) {
  if (broken && threadIdx.x == 9) return;
  out[threadIdx.x] = __shfl_xor_sync(ALL, x[threadIdx.x], 1);
}

TTR_KERNEL lane_missing_at_mma(const float* x, float* out, long long broken) {
  if (broken && threadIdx.x == 63) return;
  f4 sum{{0.0f, 0.0f, 0.0f, 0.0f}};
  sum = mma_bf16(u4{{0, 0, 0, 0}}, 0, 0, sum);
  out[threadIdx.x] = sum.v[0] + x[threadIdx.x];
}

TTR_KERNEL lane_missing_at_ldmatrix(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (broken && threadIdx.x == 31) return;
  out[threadIdx.x] = (float)ldsm_x4<false>(shared + threadIdx.x % 16 * 4).v[0];
}

TTR_KERNEL lanes_disagree(const float* x, float* out, long long broken) {
  float v = x[threadIdx.x];
  if (broken && threadIdx.x % 2) v = __ballot_sync(ALL, v > 0.0f);
  else v = __shfl_xor_sync(ALL, v, 1);
  out[threadIdx.x] = v;
}

TTR_KERNEL mask_without_itself(const float* x, float* out, long long broken) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 8) v = __shfl_xor_sync(broken ? 0x7fu : 0xffu, v, 0);
  out[threadIdx.x] = v;
}

TTR_KERNEL source_outside_mask(const float* x, float* out, long long broken) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 8) v = __shfl_sync(0xffu, v, broken ? 8 : 7);
  out[threadIdx.x] = v;
}

TTR_KERNEL misaligned_vector(const float* x, float* out, long long broken) {
  if (threadIdx.x < 15) {
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + (broken ? 1 : 0));
    out[threadIdx.x] = v.x + v.y + v.z + v.w;
  }
}

TTR_KERNEL misaligned_copy(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  if (threadIdx.x < 8) cp_async16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x + (broken ? 2 : 0), true);
  cp_async_commit();
  cp_async_wait<0>();
  if (threadIdx.x < 8) out[threadIdx.x] = shared[4 * threadIdx.x];
}

TTR_KERNEL misaligned_row(const float* x, float* out, long long broken) {
  TTR_DYN_SMEM(float, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = (float)ldsm_x4<false>(shared + threadIdx.x % 8 * 4 + (broken ? 2 : 0)).v[0];
}

// Within the thread's own memory, where no guard stands.
TTR_KERNEL past_local_array(const float* x, float* out, long long broken) {
  struct {
    float head[2], tail[4];
  } local = {{1.0f, 2.0f}, {3.0f, 4.0f, 5.0f, 6.0f}};
  float sum = 0.0f;
  for (int i = 0; i < (broken ? 3 : 2); ++i) sum += local.head[i];
  for (int i = 0; i < 4; ++i) sum += local.tail[i];
  out[threadIdx.x] = sum;
}

TTR_KERNEL null_pointer(const float* x, float* out, long long broken) {
  const float* from = broken ? nullptr : x;
  out[threadIdx.x] = from[threadIdx.x];
}

TTR_KERNEL far_out_of_bounds(const float* x, float* out, long long broken) {
  out[threadIdx.x] = x[threadIdx.x + (broken ? 1ll << 34 : 0)];
}

TTR_KERNEL divide_by_zero(const float* x, float* out, long long broken) {
  out[threadIdx.x] = x[threadIdx.x] + (float)((int)threadIdx.x / (int)(1 - broken));
}

TTR_KERNEL endless_loop(const float* x, float* out, long long broken) {
  volatile int stop = 0;
  while (broken && !stop) {
  }
  out[threadIdx.x] = x[threadIdx.x];
}

// A function of its own: only there does the stack grow.
__attribute__((noinline)) float through_local_array(float value) {
  volatile float local[40000];
  for (int i = 39999; i >= 0; --i) local[i] = value;
  return local[0];
}
TTR_KERNEL deep_stack(const float* x, float* out, long long broken) {
  out[threadIdx.x] = broken ? through_local_array(x[threadIdx.x]) : x[threadIdx.x];
}

TTR_KERNEL failed_assertion(const float* x, float* out, long long broken) {
  assert(threadIdx.x < 63 || !broken);
  out[threadIdx.x] = x[threadIdx.x];
}
