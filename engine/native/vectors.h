// Sixteen float lanes, and rows of float or bf16 read and written by them.
//
// Written as a GCC vector type, which the compiler maps to what the machine has (one AVX-512 register, two AVX2, four
// SSE or NEON). bf16 travels as uint16_t.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

template <class V, class T> inline V load_as(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V, class T> inline void store_as(T* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }

inline float widen(bf16 x) { uint32_t u = uint32_t(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline float widen(float x) { return x; }
inline bf16 round_bf16(float x) {
  uint32_t u; std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40);        // NaN stays NaN
  return bf16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
template <class T> inline T narrow(float x) {
  if constexpr (std::is_same_v<T, bf16>) return round_bf16(x);
  else return x;
}

inline vf load(const float* p) { return load_as<vf>(p); }
inline vf widen(vh v) { return (vf)(__builtin_convertvector(v, vu) << 16); }
inline vf load(const bf16* p) { return widen(load_as<vh>(p)); }
inline vh as_bf16(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vu u = (vu)v, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  r = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : r;
  return __builtin_convertvector(r, vh);
#endif
}
inline void store(float* p, vf v) { store_as(p, v); }
inline void store(bf16* p, vf v) { store_as(p, as_bf16(v)); }
// What a load will find where it was stored.
template <class T> inline vf as_stored(vf v) {
  if constexpr (std::is_same_v<T, bf16>) return widen(as_bf16(v));
  else return v;
}
// Dot products of 4 bytes of each of 16 lanes with the same 4: c[lane] += w[lane] . x, of two numbers in bf16, or of
// four in int8, without a sign in x and with one in w.
inline vf dot_pair(vf c, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)w, (__m512bh)_mm512_set1_epi32(int(x)));
#else
  return c + (vf)(w << 16) * widen(bf16(x)) + (vf)(w & 0xffff0000u) * widen(bf16(x >> 16));
#endif
}
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
inline vi dot_four(vi c, vu w, uint32_t x) {
  return (vi)_mm512_dpbusd_epi32((__m512i)c, _mm512_set1_epi32(int(x)), (__m512i)w);
}
#endif
// The last, short vector of a row: missing lanes read as zero and are not written.
template <class T> inline vf load_part(const T* p, int n) {
  T t[LANES] = {};
  std::memcpy(t, p, n * sizeof(T));
  return load(t);
}
template <class T> inline void store_part(T* p, vf v, int n) {
  T t[LANES];
  store(t, v);
  std::memcpy(p, t, n * sizeof(T));
}
template <class T, class F> inline void for_lanes(int n, F&& body) {          // body(offset, lanes)
  int i = 0;
  for (; i + LANES <= n; i += LANES) body(i, LANES);
  if (i < n) body(i, n - i);
}
template <class T> inline vf get(const T* p, int n) { return n == LANES ? load(p) : load_part(p, n); }
template <class T> inline void put(T* p, vf v, int n) { n == LANES ? store(p, v) : store_part(p, v, n); }

inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
#endif
}
inline float largest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = std::max(m, v[i]);
  return m;
#endif
}
inline int32_t largest(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t m = v[0];
  for (int i = 1; i < LANES; i++) m = std::max(m, v[i]);
  return m;
#endif
}
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x, relative error about 1e-7; what is below 2^-126 may come out as zero. A polynomial for what is left of x without
// its integer, fitted so that its largest relative error is smallest (2e-9), and 1 at 0.
inline vf exp2v(vf x) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), f = x - n;
#else
  const vf low = splat(-126.f), high = splat(126.f), magic = splat(12582912.f);  // + 1.5 * 2^23 rounds to integer
  const vi tiny = x < low;
  x = tiny ? low : x > high ? high : x;
  const vf n = (x + magic) - magic, f = x - n;
#endif
  vf p = splat(1.53533616e-4f);
  p = p * f + 1.33988745e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return tiny ? vf{} : (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
#endif
}

constexpr float LOG2E = 1.44269504089f;

// x / (1 + e^-x), relative error about 2e-7; all below -83 are taken for it, and are next to nothing.
inline vf silu(vf x) {
  x = vmax(splat(-83.f), x);                                                   // in this order NaN stays NaN
#if defined(__AVX512F__)
  const vf below = 1.f + exp2v(x * -LOG2E);
  const vf guess = (vf)_mm512_rcp14_ps((__m512)below);                         // one of Newton's steps instead of a division
  return x * (guess * (2.f - below * guess));
#else
  return x / (1.f + exp2v(x * -LOG2E));
#endif
}

// tanh, relative error about 1e-7. Below 0.625 a polynomial in x^2, fitted at Chebyshev's points.
inline vf tanhv(vf x) {
  const vf z = x * x;
  vf p = splat(-6.104918662e-3f);
  p = p * z + 2.100361511e-2f;
  p = p * z - 5.385249108e-2f;
  p = p * z + 1.333278269e-1f;
  p = p * z - 3.333332837e-1f;
  const vf near = x + x * z * p, far = 1.f - 2.f / (exp2v(x * 2.88539008178f) + 1.f);
  return z < 0.390625f ? near : far;
}

// A product that is added to something later is rounded here. Otherwise the compiler may fuse the two, and does so or
// not as it pleases in each copy of a function: a row's last bits would depend on how many rows it is computed with.
inline void rounded(vf& v) {
#if defined(__AVX512F__)
  __asm__ volatile("" : "+v"(v));
#else
  __asm__ volatile("" : "+m"(v));
#endif
}

}  // namespace
