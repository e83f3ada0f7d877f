// The same step for up to 16 bf16 rows at once on Intel's matrix unit: the KV layout is what its B operand wants.
#pragma once
#include "amx_unit.h"
#include "tiles.h"
#if defined(GM_AMX)

namespace {

// Tile registers: 0-3 sums, 4 queries [n][32 dims], 5 keys [16 pairs][16], 6 weights [n][16 keys], 7 values [8][16].
void amx_configure(int n) {
  TileConfig c{};
  c.palette = 1;
  for (int t = 0; t < 8; t++) c.rows[t] = n, c.row_bytes[t] = 64;
  c.rows[5] = 16, c.rows[7] = 8, c.row_bytes[6] = 32;
  __asm__ volatile("ldtilecfg %0" ::"m"(c));
}

inline void fetch(const bf16* p, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch(p + i * 32);
}

// `tiles` are those of the span that begins at `start`, and the first of the next. The first rows to meet them fetch, all
// along and one tile ahead: lines that can be on their way at once are few.
template <bool FIRST>
inline void span_step_amx(Rows<bf16>& s, int r0, int n, int start, int end, const Tile<bf16>* tiles, int dim16,
                          const Scoring& how) {
  const int count = seen(s, r0, n, start, end, SPAN), groups = (count + LANES - 1) / LANES;
  if (count == 0) return;
  const int oldest = *std::min_element(s.first.begin() + r0, s.first.begin() + r0 + n);
  const int from = std::max(0, oldest - start) / TILE * TILE_GROUPS;           // tiles before a window weigh nothing
  vf dots[16 * SPAN_GROUPS];
  alignas(64) bf16 p[16 * SPAN], tail[LANES * 256];
  alignas(64) float fade[LANES];
  const bf16* q = s.q.data() + size_t(r0) * dim16;
  for (int g = from; g < groups; g += TILE_GROUPS) {
    const Tile<bf16>* const now = tiles + g / TILE_GROUPS;
    const bf16* const* const soon = g + TILE_GROUPS < groups ? now[1].keys : tiles[from / TILE_GROUPS].values;
    __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
    for (int d = 0; d < dim16; d += 32) {
      const int at = d * LANES;                                                // 16 pairs of dims, 64 bytes each
      TILE_LOAD(4, q + d, dim16 * 2);
      TILE_LOAD(5, now->keys[0] + at, 64);
      TILE_DOT(0, 4, 5);
      if constexpr (FIRST) fetch(soon[0] + at, 16);
      TILE_LOAD(5, now->keys[1] + at, 64);
      TILE_DOT(1, 4, 5);
      if constexpr (FIRST) fetch(soon[1] + at, 16);
      TILE_LOAD(5, now->keys[2] + at, 64);
      TILE_DOT(2, 4, 5);
      if constexpr (FIRST) fetch(soon[2] + at, 16);
      TILE_LOAD(5, now->keys[3] + at, 64);
      TILE_DOT(3, 4, 5);
      if constexpr (FIRST) fetch(soon[3] + at, 16);
    }
    TILE_STORE(0, dots + g, SPAN_GROUPS * 64);
    TILE_STORE(1, dots + g + 1, SPAN_GROUPS * 64);
    TILE_STORE(2, dots + g + 2, SPAN_GROUPS * 64);
    TILE_STORE(3, dots + g + 3, SPAN_GROUPS * 64);
  }
  if (how.bent()) bend<SPAN_GROUPS>(s, r0, n, start, from, groups, how, dots);
  soften<SPAN_GROUPS>(s, r0, n, start, end, from, groups, how.factor(), dots, p, fade);
  if (how.packed) weigh<SPAN_GROUPS>(s, n, from, groups, p);
  float* acc = s.acc.data() + size_t(r0) * dim16;
  fade_rows(acc, n, dim16, fade);
  const bf16* last = tiles[(groups - 1) / TILE_GROUPS].values[(groups - 1) % TILE_GROUPS];
  if (const int left = count % LANES) {                                        // keys never written must read as zero
    std::fill(tail, tail + LANES * dim16, bf16(0));
    std::copy(last, last + left / 2 * 2 * dim16, tail);
    if (left % 2)
      for (int d = 0; d < dim16; d++) tail[(left / 2 * dim16 + d) * 2] = last[(left / 2 * dim16 + d) * 2];
    last = tail;
  }
  for (int d = 0; d < dim16; d += 64) {                                        // 64 dims at a time, at the end maybe 32
    const bool whole = d + 64 <= dim16;
    TILE_LOAD(0, acc + d, dim16 * 4);
    TILE_LOAD(1, acc + d + 16, dim16 * 4);
    if (whole) {
      TILE_LOAD(2, acc + d + 32, dim16 * 4);
      TILE_LOAD(3, acc + d + 48, dim16 * 4);
    }
    for (int g = from; g < groups; g++) {
      const bf16* v = (g + 1 < groups ? tiles[g / TILE_GROUPS].values[g % TILE_GROUPS] : last) + d * 2;
      const int then = g + TILE_GROUPS;
      const bf16* const* const next = then < groups ? tiles[then / TILE_GROUPS].values : tiles[SPAN_TILES].keys;
      const bf16* soon = next[g % TILE_GROUPS] + d * LANES;
      TILE_LOAD(6, p + g * LANES, SPAN * 2);
      TILE_LOAD(7, v, dim16 * 4);
      TILE_DOT(0, 6, 7);
      if constexpr (FIRST) fetch(soon, 8);
      TILE_LOAD(7, v + 32, dim16 * 4);
      TILE_DOT(1, 6, 7);
      if constexpr (FIRST) fetch(soon + 256, 8);
      if (whole) {
        TILE_LOAD(7, v + 64, dim16 * 4);
        TILE_DOT(2, 6, 7);
        if constexpr (FIRST) fetch(soon + 512, 8);
        TILE_LOAD(7, v + 96, dim16 * 4);
        TILE_DOT(3, 6, 7);
        if constexpr (FIRST) fetch(soon + 768, 8);
      }
    }
    TILE_STORE(0, acc + d, dim16 * 4);
    TILE_STORE(1, acc + d + 16, dim16 * 4);
    if (whole) {
      TILE_STORE(2, acc + d + 32, dim16 * 4);
      TILE_STORE(3, acc + d + 48, dim16 * 4);
    }
  }
}

}  // namespace
#endif
