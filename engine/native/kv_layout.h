// Where keys and values are, and how one token's are written.
//
// Per (block, KV head), in groups of 16 tokens; D16 is head_dim rounded up to 16, padding is zero:
//   bf16  K [D16/2][16 tokens][2 dims]    V [8 token pairs][D16][2 tokens]     (what a bf16 dot product eats)
//   fp32  K [D16][16 tokens]              V [16 tokens][D16]
// In a byte each: kv_bytes.h.
#pragma once
#include "vectors.h"

namespace {

struct Shape {
  int heads, kv_heads, dim, block, stride;                                     // stride: elements of one qkv row
  int dim16() const { return (dim + 15) / 16 * 16; }
  int group() const { return heads / kv_heads; }
  size_t group_size() const { return size_t(dim16()) * LANES; }
  // Where 16 tokens of one head live in K or V; token: any position of the group within the sequence.
  size_t at(const int32_t* table, int head, int token) const {
    return ((size_t(table[token / block]) * kv_heads + head) * (block / LANES) + token % block / LANES) * group_size();
  }
};

inline void write_key(float* k, const float* x, const Shape& s, int lane) {
  for (int d = 0; d < s.dim16(); d++) k[d * LANES + lane] = x[d];
}
inline void write_key(bf16* k, const float* x, const Shape& s, int lane) {
  for (int i = 0; i < s.dim16(); i += LANES) {
    bf16 t[LANES];
    store(t, load(x + i));
    for (int d = 0; d < LANES; d += 2) std::memcpy(k + (i + d) * LANES + lane * 2, t + d, 4);
  }
}
inline void write_value(float* v, const float* x, const Shape& s, int lane) {
  std::memcpy(v + size_t(lane) * s.dim16(), x, s.dim16() * sizeof(float));
}
inline void write_value(bf16* v, const bf16* x, const Shape& s, int lane) {
  bf16* pair = v + size_t(lane / 2) * s.dim16() * 2 + lane % 2;
  for (int d = 0; d < s.dim; d++) pair[2 * d] = x[d];
  for (int d = s.dim; d < s.dim16(); d++) pair[2 * d] = 0;
}

}  // namespace
