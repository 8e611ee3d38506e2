// Kernels that show how their arguments arrived.
#include "device.cuh"

#if defined(TTR_BARE_SHARED)
__device__ void bare() { __shared__ float x[4]; }
#endif

extern "C" __global__ void __launch_bounds__(32) add_one(const float* x, float* y, long long count) {
  for (int i = threadIdx.x; i < (int)count; i += blockDim.x) y[i] = x[i] + 1.0f;
}

extern "C" __global__ void difference_of_addresses(const float* a, const float* b, long long* out) {
  if (threadIdx.x == 0) out[0] = b - a;
}

extern "C" __global__ void copy_rows(const float* x, float* y, long long stride, long long rows, long long columns) {
  if (threadIdx.x < rows * columns) {
    const long long at = threadIdx.x / columns * stride + threadIdx.x % columns;
    y[at] = x[at];
  }
}

extern "C" __global__ void address_modulo(const float* x, long long divisor, long long* out) {
  if (threadIdx.x == 0) out[0] = reinterpret_cast<unsigned long long>(x) % divisor;
}

extern "C" __global__ void types(const __nv_bfloat16* a, const __half* b, const unsigned char* c, long long d, float e,
                                 unsigned f, double g, const float* none, double* out) {
  if (threadIdx.x) return;
  out[0] = __bfloat162float(a[0]);
  out[1] = __half2float(b[0]);
  out[2] = c[0];
  out[3] = (double)d;
  out[4] = e;
  out[5] = f;
  out[6] = g;
  out[7] = none == nullptr;
}

// Which thread came when.
extern "C" __global__ void order(int* next, int* out) {
  const int turn = atomicAdd(next, 1);
  out[turn] = blockIdx.x * blockDim.x + threadIdx.x;
}

#if defined(TTR_EXTRA)
extern "C" __global__ void only_with_macro(float* out) {
  if (threadIdx.x == 0) out[0] = TTR_EXTRA;
}
#endif
