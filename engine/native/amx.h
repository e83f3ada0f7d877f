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

inline void tile_step_amx(Rows<bf16>& s, int r0, int n, int start, int end, const Tile<bf16>& tile,
                          const Tile<bf16>& next, int dim16, const Scoring& how) {
  const int count = seen_in_tile(s, r0, n, start, end), groups = (count + LANES - 1) / LANES;
  if (count == 0) return;
  vf dots[16 * TILE_GROUPS];
  alignas(64) bf16 p[16 * TILE], tail[LANES * 256];
  float fade[16];
  const bf16* q = s.q.data() + size_t(r0) * dim16;
  __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
  for (int d = 0; d < dim16; d += 32) {
    TILE_LOAD(4, q + d, dim16 * 2);
    const int at = d * LANES;                                                  // 16 pairs of dims, 64 bytes each
    TILE_LOAD(5, tile.keys[0] + at, 64);
    TILE_DOT(0, 4, 5);
    fetch(next.keys[0] + at, 16);
    TILE_LOAD(5, tile.keys[1] + at, 64);
    TILE_DOT(1, 4, 5);
    fetch(next.keys[1] + at, 16);
    TILE_LOAD(5, tile.keys[2] + at, 64);
    TILE_DOT(2, 4, 5);
    fetch(next.keys[2] + at, 16);
    TILE_LOAD(5, tile.keys[3] + at, 64);
    TILE_DOT(3, 4, 5);
    fetch(next.keys[3] + at, 16);
  }
  TILE_STORE(0, dots + 0, 256);
  TILE_STORE(1, dots + 1, 256);
  TILE_STORE(2, dots + 2, 256);
  TILE_STORE(3, dots + 3, 256);
  if (how.bent()) bend(s, r0, n, start, groups, how, dots);
  soften(s, r0, n, start, end, groups, how.factor(), dots, p, fade);
  if (how.packed) weigh(s, n, groups, p);
  float* acc = s.acc.data() + size_t(r0) * dim16;
  fade_rows(acc, n, dim16, fade);
  const bf16* values[TILE_GROUPS];
  std::copy(tile.values, tile.values + groups, values);
  if (const int left = count % LANES) {                                        // keys never written must read as zero
    std::fill(tail, tail + LANES * dim16, bf16(0));
    std::copy(values[groups - 1], values[groups - 1] + left / 2 * 2 * dim16, tail);
    if (left % 2)
      for (int d = 0; d < dim16; d++) tail[(left / 2 * dim16 + d) * 2] = values[groups - 1][(left / 2 * dim16 + d) * 2];
    values[groups - 1] = tail;
  }
  for (int d = 0; d < dim16; d += 64) {                                        // 64 dims at a time, at the end maybe 32
    const bool whole = d + 64 <= dim16;
    TILE_LOAD(0, acc + d, dim16 * 4);
    TILE_LOAD(1, acc + d + 16, dim16 * 4);
    if (whole) {
      TILE_LOAD(2, acc + d + 32, dim16 * 4);
      TILE_LOAD(3, acc + d + 48, dim16 * 4);
    }
    for (int g = 0; g < groups; g++) {
      const bf16* v = values[g] + d * 2;
      TILE_LOAD(6, p + g * LANES, TILE * 2);
      TILE_LOAD(7, v, dim16 * 4);
      TILE_DOT(0, 6, 7);
      TILE_LOAD(7, v + 32, dim16 * 4);
      TILE_DOT(1, 6, 7);
      if (whole) {
        TILE_LOAD(7, v + 64, dim16 * 4);
        TILE_DOT(2, 6, 7);
        TILE_LOAD(7, v + 96, dim16 * 4);
        TILE_DOT(3, 6, 7);
      }
      fetch(next.values[g] + d * LANES, whole ? 32 : 16);
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
