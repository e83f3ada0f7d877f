// The two products of attention for a few query rows: with keys, and of their weights with values. Only the bf16 dot
// product names an instruction; every sum is fp32.
#pragma once
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 4;  // query rows of a micro-kernel: 16 accumulators of 32 registers
#else
constexpr int ROWS = 1;
#endif
constexpr int TILE_GROUPS = 4;                     // KV groups of 16 tokens looked at between two softmax updates
constexpr int TILE = TILE_GROUPS * LANES;

template <class T> inline uint32_t pair_at(const T* p) { uint32_t w; std::memcpy(&w, p, 4); return w; }

// Scores of R query rows against N groups of keys: out[r * TILE_GROUPS + g] = 16 dot products. `next` are the groups of
// the tile after this one: blocks are scattered in pieces too short for the hardware to see a stream in. They go
// to the second cache: more lines can be on their way there at once.
template <int R, int N>
inline void scores(const bf16* q, size_t q_stride, const bf16* const* keys, const bf16* const* next, int dim16,
                   vf* out) {
  vf s[R][N] = {};
  for (int d = 0; d < dim16 / 2; d++) {
    for (int g = 0; g < N; g++) __builtin_prefetch(next[g] + d * 32, 0, 2);
    for (int r = 0; r < R; r++) {
      const uint32_t w = pair_at(q + r * q_stride + 2 * d);
      for (int g = 0; g < N; g++) s[r][g] = dot_pair(s[r][g], load_as<vu>(keys[g] + d * 32), w);
    }
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < N; g++) out[r * TILE_GROUPS + g] = s[r][g];
}
template <int R, int N>
inline void scores(const float* q, size_t q_stride, const float* const* keys, const float* const* next, int dim16,
                   vf* out) {
  vf s[R][N] = {};
  for (int d = 0; d < dim16; d++) {
    for (int g = 0; g < N; g++) __builtin_prefetch(next[g] + d * 16, 0, 2);
    for (int r = 0; r < R; r++)
      for (int g = 0; g < N; g++) s[r][g] += load(keys[g] + d * 16) * q[r * q_stride + d];
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < N; g++) out[r * TILE_GROUPS + g] = s[r][g];
}

// acc[r][0 .. 16N) += sum over `count` tokens of p[r][token] * value[token], for N vectors of dims.
template <int R, int N>
inline void weighted(const bf16* p, const bf16* const* values, const bf16* const* next, int count, int dim16,
                     float* acc) {
  vf a[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) a[r][i] = load(acc + r * dim16 + i * 16);
  for (int t = 0; t < count; t += 2) {
    const bf16* row = values[t / LANES] + size_t(t % LANES / 2) * dim16 * 2;
    vu v[N];
    for (int i = 0; i < N; i++) v[i] = load_as<vu>(row + i * 32);
    for (int i = 0; i < N; i++) __builtin_prefetch(next[t / LANES] + size_t(t % LANES / 2) * dim16 * 2 + i * 32, 0, 2);
    if (t + 1 == count)                                                        // the partner was never written
      for (int i = 0; i < N; i++) v[i] &= 0xffffu;
    for (int r = 0; r < R; r++) {
      const uint32_t w = pair_at(p + r * TILE + t);
      for (int i = 0; i < N; i++) a[r][i] = dot_pair(a[r][i], v[i], w);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) store(acc + r * dim16 + i * 16, a[r][i]);
}
template <int R, int N>
inline void weighted(const float* p, const float* const* values, const float* const* next, int count, int dim16,
                     float* acc) {
  vf a[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) a[r][i] = load(acc + r * dim16 + i * 16);
  for (int t = 0; t < count; t++) {
    const float* row = values[t / LANES] + size_t(t % LANES) * dim16;
    for (int i = 0; i < N; i++) {
      vf v = load(row + i * 16);
      __builtin_prefetch(next[t / LANES] + size_t(t % LANES) * dim16 + i * 16, 0, 2);
      for (int r = 0; r < R; r++) a[r][i] += v * p[r * TILE + t];
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) store(acc + r * dim16 + i * 16, a[r][i]);
}

}  // namespace
