// One tile of 64 keys for a few query rows: scores, running softmax, weighted values.
#pragma once
#include <vector>
#include "dots.h"

namespace {

// Many query rows look at so many keys between two softmax updates: sums are loaded and stored as seldom as that.
constexpr int SPAN_TILES = 4, SPAN_GROUPS = SPAN_TILES * TILE_GROUPS, SPAN = SPAN_TILES * TILE;

// The running softmax of the query rows of one work item.
template <class T> struct Rows {
  std::vector<T> q;                                                            // [rows][dim16], zero padded
  std::vector<float> acc, m, l;                                                // [rows][dim16], [rows], [rows][16]
  std::vector<int> first, limit;                                               // keys seen: first <= position < limit
  std::vector<float> slope;                                                    // ALiBi's, where a model has it
  std::vector<T> keys, values;                                                 // tiles, unpacked from bytes
  float key_scales[SPAN], value_scales[SPAN];
  void reset(int rows, int dim16) {
    const size_t padded = (rows + 15) / 16 * 16;                               // whole tiles are read and written
    q.assign(padded * dim16, T(0));
    acc.assign(padded * dim16, 0.f);
    m.assign(rows, -1e30f);
    l.assign(size_t(rows) * LANES, 0.f);
    first.resize(rows);
    limit.resize(rows);
    slope.resize(rows);
  }
};

// How products of queries and keys become scores, which count in powers of two: mostly by one factor.
struct Scoring {
  float scale, cap;                                                            // cap 0: none
  const float* slopes;                                                         // per head, or null
  bool packed;                                                                 // keys and values have scales
  bool bent() const { return cap > 0 || slopes || packed; }
  float factor() const { return bent() ? 1.f : scale * LOG2E; }                // what is left to soften()
};

// Scores that are more than scaled: by their keys, then capped, then biased by how far back a key is. In one place for
// all sizes, out of the way of the others; products are rounded (vectors.h) so that a row's bits do not depend on n.
template <int G, class T>
__attribute__((noinline)) void bend(const Rows<T>& s, int r0, int n, int start, int from, int groups,
                                    const Scoring& how, vf* dots) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int r = 0; r < n; r++)
    for (int g = from; g < groups; g++) {
      vf score = dots[r * G + g] * how.scale;
      if (how.packed) score *= load(s.key_scales + g * LANES);
      if (how.cap > 0) score = tanhv(score / how.cap) * how.cap;
      if (how.slopes) {
        rounded(score);
        vf bias = __builtin_convertvector(s.limit[r0 + r] - 1 - start - g * LANES - lane, vf) * s.slope[r0 + r];
        rounded(bias);
        score -= bias;
      }
      dots[r * G + g] = score * LOG2E;
    }
}

// Weights p [n][16 G] take in the scales of the values. What is hidden weighs 0, whatever its scale may be.
template <int G, class T> __attribute__((noinline)) void weigh(const Rows<T>& s, int n, int from, int groups, T* p) {
  for (int r = 0; r < n; r++)
    for (int g = from; g < groups; g++) {
      T* at = p + (r * G + g) * LANES;
      const vf weight = load(at), scaled = weight * load(s.value_scales + g * LANES);
      store(at, weight > 0.f ? scaled : vf{});
    }
}

// How many of `keys` from `start` on any of the rows [r0, r0 + n) sees, counted to the last of them.
template <class T> inline int seen(const Rows<T>& s, int r0, int n, int start, int end, int keys) {
  int low = s.first[r0], high = 0;
  for (int r = r0; r < r0 + n; r++) low = std::min(low, s.first[r]), high = std::max(high, s.limit[r]);
  high = std::min(high, end);
  return high <= start || low >= start + keys ? 0 : std::min(keys, high - start);
}

// Scores to weights, for n rows and groups [from, groups): dots [n][G] -> p [n][16 G]; fade[r] is what the sums so far are worth now. Dots are
// overwritten.
template <int G, class T>
inline void soften(Rows<T>& s, int r0, int n, int start, int end, int from, int groups, float scale, vf* dots, T* p,
                   float* fade) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) float tops[LANES] = {}, peak[LANES] = {};
  for (int r = 0; r < n; r++) {
    const int limit = std::min(s.limit[r0 + r], end) - start, first = s.first[r0 + r] - start;
    vf *row = dots + r * G, top = splat(-1e30f);
    for (int g = from; g < groups; g++) {
      vf score = row[g] * scale;
      if (first > 0 || limit < groups * LANES) {
        const vi at = lane + g * LANES;
        score = (at < limit) & (at >= first) ? score : splat(-1e30f);
      }
      row[g] = score;
      top = vmax(top, score);
    }
    tops[r] = largest(top);
  }
  std::memcpy(peak, s.m.data() + r0, n * sizeof(float));
  const vf old = load(peak), m = vmax(old, load(tops));
  store(fade, exp2v(old - m));
  store(peak, m);
  std::memcpy(s.m.data() + r0, peak, n * sizeof(float));
  store(peak, vmax(m, splat(-1e29f)));                                         // hidden keys weigh 0, also when all are
  for (int r = 0; r < n; r++) {
    const vf* row = dots + r * G;
    vf total = load(s.l.data() + size_t(r0 + r) * LANES) * fade[r];
    rounded(total);
    for (int g = from; g < groups; g++) {
      const vf e = exp2v(row[g] - peak[r]);
      total += e;
      store(p + (r * G + g) * LANES, e);
    }
    store(s.l.data() + size_t(r0 + r) * LANES, total);
  }
}

inline void fade_rows(float* acc, int n, int dim16, const float* fade) {
  for (int r = 0; r < n; r++)
    if (fade[r] != 1.f)
      for (int d = 0; d < dim16; d += LANES) store(acc + r * dim16 + d, load(acc + r * dim16 + d) * fade[r]);
  __asm__ volatile("" ::: "memory");                                           // as rounded() does
}

// Where the four groups of a tile of 64 keys are.
template <class T> struct Tile { const T *keys[TILE_GROUPS], *values[TILE_GROUPS]; };

// One tile of at most 64 keys starting at `start`, for rows [r0, r0 + R).
template <class T, int R>
inline void tile_step(Rows<T>& s, int r0, int start, int end, const Tile<T>& tile, const Tile<T>& next, int dim16,
                      const Scoring& how) {
  const int count = seen(s, r0, R, start, end, TILE), groups = (count + LANES - 1) / LANES;
  if (count == 0) return;
  vf dots[R][TILE_GROUPS];
  const T* q = s.q.data() + size_t(r0) * dim16;
  if (groups == TILE_GROUPS)
    scores<R, TILE_GROUPS>(q, dim16, tile.keys, next.keys, dim16, dots[0]);
  else
    for (int g = 0; g < groups; g++) scores<R, 1>(q, dim16, tile.keys + g, next.keys + g, dim16, dots[0] + g);
  if (how.bent()) bend<TILE_GROUPS>(s, r0, R, start, 0, groups, how, dots[0]);
  alignas(64) T p[R * TILE];
  alignas(64) float fade[LANES];
  soften<TILE_GROUPS>(s, r0, R, start, end, 0, groups, how.factor(), dots[0], p, fade);
  if (how.packed) weigh<TILE_GROUPS>(s, R, 0, groups, p);
  float* acc = s.acc.data() + size_t(r0) * dim16;
  fade_rows(acc, R, dim16, fade);
  int d = 0;
  const int pair = std::is_same_v<T, bf16> ? 2 : 1;
  auto run = [&](auto vectors) {
    constexpr int N = decltype(vectors)::value;
    for (; d + N * LANES <= dim16; d += N * LANES) {
      const T *now[TILE_GROUPS], *after[TILE_GROUPS];
      for (int g = 0; g < TILE_GROUPS; g++) now[g] = tile.values[g] + d * pair, after[g] = next.values[g] + d * pair;
      weighted<R, N>(p, now, after, count, dim16, acc + d);
    }
  };
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

}  // namespace
