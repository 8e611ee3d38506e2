// The names of CUDA's device functions, for the host. Rounding is to nearest wherever CUDA's own name says so; the
// approximate ones (__expf, rsqrtf, ...) are as exact as the host's, so a test's tolerance is not proved by them.
#pragma once

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? b : a;
}

template <class To, class From>
__forceinline__ To ttr_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
__forceinline__ unsigned __float_as_uint(float x) { return ttr_bits<unsigned>(x); }
__forceinline__ int __float_as_int(float x) { return ttr_bits<int>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return ttr_bits<float>(x); }
__forceinline__ float __int_as_float(int x) { return ttr_bits<float>(x); }
__forceinline__ long long __double_as_longlong(double x) { return ttr_bits<long long>(x); }
__forceinline__ double __longlong_as_double(long long x) { return ttr_bits<double>(x); }
__forceinline__ int __double2hiint(double x) { return static_cast<int>(ttr_bits<uint64_t>(x) >> 32); }
__forceinline__ int __double2loint(double x) { return static_cast<int>(ttr_bits<uint64_t>(x)); }
__forceinline__ double __hiloint2double(int high, int low) {
  return ttr_bits<double>(uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low));
}

__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
__forceinline__ float __fsqrt_rn(float a) { return sqrtf(a); }
__forceinline__ float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dsub_rn(double a, double b) { return a - b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __ddiv_rn(double a, double b) { return a / b; }
__forceinline__ double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
__forceinline__ double __drcp_rn(double a) { return 1.0 / a; }
__forceinline__ double __dsqrt_rn(double a) { return sqrt(a); }

__forceinline__ float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
__forceinline__ double rsqrt(double x) { return 1.0 / sqrt(x); }
__forceinline__ float fdividef(float a, float b) { return a / b; }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
__forceinline__ void sincospif(float x, float* s, float* c) {
  double turned = 3.14159265358979323846 * std::remainder(static_cast<double>(x), 2.0);
  *s = static_cast<float>(sin(turned));
  *c = static_cast<float>(cos(turned));
}
__forceinline__ float sinpif(float x) {
  float s, c;
  sincospif(x, &s, &c);
  return s;
}
__forceinline__ float cospif(float x) {
  float s, c;
  sincospif(x, &s, &c);
  return c;
}
// glibc declares functions of these names.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __tanhf(x) tanhf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)

// Out of range: the nearest that can be represented; NaN: 0.
template <class To, class From>
__forceinline__ To ttr_to_integer(From x) {
  constexpr auto lowest = std::numeric_limits<To>::min(), highest = std::numeric_limits<To>::max();
  if (x != x) return 0;
  if (x <= static_cast<From>(lowest)) return lowest;
  if (x >= static_cast<From>(highest)) return highest;
  return static_cast<To>(x);
}
__forceinline__ int __float2int_rn(float x) { return ttr_to_integer<int>(nearbyintf(x)); }
__forceinline__ int __float2int_rz(float x) { return ttr_to_integer<int>(truncf(x)); }
__forceinline__ int __float2int_rd(float x) { return ttr_to_integer<int>(floorf(x)); }
__forceinline__ int __float2int_ru(float x) { return ttr_to_integer<int>(ceilf(x)); }
__forceinline__ unsigned __float2uint_rn(float x) { return ttr_to_integer<unsigned>(nearbyintf(x)); }
__forceinline__ unsigned __float2uint_rz(float x) { return ttr_to_integer<unsigned>(truncf(x)); }
__forceinline__ unsigned __float2uint_rd(float x) { return ttr_to_integer<unsigned>(floorf(x)); }
__forceinline__ long long __float2ll_rn(float x) { return ttr_to_integer<long long>(nearbyintf(x)); }
__forceinline__ int __double2int_rn(double x) { return ttr_to_integer<int>(nearbyint(x)); }
__forceinline__ int __double2int_rz(double x) { return ttr_to_integer<int>(trunc(x)); }
__forceinline__ int __double2int_rd(double x) { return ttr_to_integer<int>(floor(x)); }
__forceinline__ long long __double2ll_rn(double x) { return ttr_to_integer<long long>(nearbyint(x)); }
__forceinline__ long long __double2ll_rz(double x) { return ttr_to_integer<long long>(trunc(x)); }
__forceinline__ float __int2float_rn(int x) { return static_cast<float>(x); }
__forceinline__ float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
__forceinline__ float __ll2float_rn(long long x) { return static_cast<float>(x); }
__forceinline__ float __double2float_rn(double x) { return static_cast<float>(x); }
__forceinline__ double __int2double_rn(int x) { return x; }
__forceinline__ double __uint2double_rn(unsigned x) { return x; }
__forceinline__ double __ll2double_rn(long long x) { return static_cast<double>(x); }

__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
__forceinline__ int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
__forceinline__ int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
__forceinline__ unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
__forceinline__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// To the nearest tf32, ties away from zero, as cvt.rna.tf32.f32 does.
__forceinline__ unsigned ttr_to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

// Loads and stores with cache hints.
template <class T>
__forceinline__ T __ldg(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldcs(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldcg(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldca(const T* address) { return *address; }
template <class T>
__forceinline__ void __stcs(T* address, std::common_type_t<T> value) { *address = value; }
template <class T>
__forceinline__ void __stcg(T* address, std::common_type_t<T> value) { *address = value; }
template <class T>
__forceinline__ void __stwt(T* address, std::common_type_t<T> value) { *address = value; }
