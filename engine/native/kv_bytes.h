// Keys and values in a byte each, with a float scale for each token and head: what kv_numbers.py defines.
//
// Per (block, KV head), in groups of 16 tokens, whatever is computed with:  K [D16][16 tokens]   V [16 tokens][D16].
// Scales: [block][KV head][tokens of a block]. A tile is unpacked, without its scales, into the layout that kv_layout.h
// gives keys and values of type T: a byte's value is exact in bf16. Scales go to scores and to weights instead, which
// are fewer.
#pragma once
#include "kv_layout.h"

namespace {

enum Kind : int { PLAIN = 0, INT8 = 1, FP8 = 2 };                              // FP8: e4m3, as torch.float8_e4m3fn
typedef int8_t vb __attribute__((vector_size(16)));

struct Packed {
  int kind;
  uint8_t *keys, *values;
  float *key_scales, *value_scales;
  static size_t scale_at(const Shape& s, const int32_t* table, int head, int token) {
    return (size_t(table[token / s.block]) * s.kv_heads + head) * s.block + token % s.block;
  }
};

inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// Codes of x / scale in the lowest byte of each lane, rounded to nearest even.
inline vi int8_codes(vf y) { return (vi)(y + 12582912.f) & 0xff; }              // + 1.5 * 2^23 rounds to integer
inline vi fp8_codes(vf y) {
  const vi u = (vi)y, a = u & 0x7fffffff;
  const vi normal = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3);
  const vi tiny = (vi)(magnitude(y) * 512.f + 12582912.f) & 0xff;               // below 2^-6: multiples of 2^-9
  const vi code = a < 0x3c800000 ? tiny : normal;
  return (code < 0x7e ? code : 0x7e) | ((u >> 24) & 0x80);
}

// One head of one token; x and codes are padded with zeros to whole vectors. Returns the scale.
inline float pack_row(int kind, uint8_t* codes, const float* x, int dim16) {
  vf top = {};
  for (int i = 0; i < dim16; i += LANES) top = vmax(top, magnitude(load(x + i)));
  const float scale = std::max(largest(top), 1e-30f) * (1.f / (kind == INT8 ? 127.f : 448.f));
  for (int i = 0; i < dim16; i += LANES) {
    const vf y = load(x + i) / scale;
    store_as(codes + i, __builtin_convertvector(kind == INT8 ? int8_codes(y) : fp8_codes(y), vb));
  }
  return scale;
}

template <int K> inline vf unpack(const uint8_t* p) {
#if defined(__AVX512F__)                                                        // of the form below GCC makes too much
  const __m128i c = _mm_loadu_si128((const __m128i*)p);
  if constexpr (K == INT8) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c));
  // Seven bits moved up are a half float of the same value / 256, small ones included.
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(c), 7), _mm256_set1_epi16(-0x4001));
  return (vf)_mm512_cvtph_ps(half) * 256.f;
#else
  const vi c = __builtin_convertvector(load_as<vb>(p), vi);
  if constexpr (K == INT8) return __builtin_convertvector(c, vf);
  const vi a = c & 0x7f;
  const vf normal = (vf)((a << 20) + (120 << 23)), tiny = __builtin_convertvector(a, vf) * 0.001953125f;
  return (vf)((vi)(a < 8 ? tiny : normal) | (c & (int32_t)0x80000000));
#endif
}
inline vu join(vf low, vf high) { return ((vu)low >> 16) | ((vu)high & 0xffff0000u); }  // exact in bf16

template <int K> inline void unpack_keys(float* to, const uint8_t* k, int dim16) {
  for (int d = 0; d < dim16; d++) store(to + d * LANES, unpack<K>(k + d * LANES));
}
template <int K> inline void unpack_keys(bf16* to, const uint8_t* k, int dim16) {
  for (int d = 0; d < dim16; d += 2, k += 2 * LANES)
    store_as(to + d * LANES, join(unpack<K>(k), unpack<K>(k + LANES)));
}
template <int K> inline void unpack_values(float* to, const uint8_t* v, int dim16) { unpack_keys<K>(to, v, dim16); }
template <int K> inline void unpack_values(bf16* to, const uint8_t* v, int dim16) {
  for (int t = 0; t < LANES; t += 2)
    for (int d = 0; d < dim16; d += LANES)
      store_as(to + (t * dim16 + 2 * d), join(unpack<K>(v + t * dim16 + d), unpack<K>(v + (t + 1) * dim16 + d)));
}

// 16 tokens of one head, while the next group's bytes are on their way.
template <class T, int K>
__attribute__((noinline)) void unpack_group(T* keys, T* values, const uint8_t* k, const uint8_t* v, const uint8_t* next_k,
                                            const uint8_t* next_v, int dim16) {
  for (int i = 0; i < dim16 * LANES; i += 64) __builtin_prefetch(next_k + i), __builtin_prefetch(next_v + i);
  unpack_keys<K>(keys, k, dim16);
  unpack_values<K>(values, v, dim16);
}

}  // namespace
