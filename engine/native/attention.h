// Paged attention: work items of a step, each tile by tile, and the joining of what was cut apart.
#pragma once
#include "amx.h"
#include "kv_bytes.h"
#include "rope.h"

namespace {

// See attention/native_work.py. A query's result goes to its row, or as a part of it to scratch.
struct Query { int32_t row, position, part; };
struct Item { int32_t first, count, table, begin, end; };                      // queries [first, first + count)
struct Merge { int32_t row, part, parts; };
struct Work {
  const Query* queries;
  const Item* items;
  const Merge* merges;
  int n_items, n_merges;
};

template <class T> struct Call {
  const T *qkv, *keys, *values;                                                // not these keys and values if packed
  Packed packed;
  T* out;
  const int32_t* tables;
  float* scratch;                                                              // [parts][heads][dim16 + 2]
  int table_width, window;
  Scoring how;
  Shape s;
};

#if defined(GM_AMX)
template <class T> inline bool use_amx(const Call<T>& c) {
  return std::is_same_v<T, bf16> && c.s.dim % 32 == 0 && c.s.dim <= 256 && amx_allowed();
}
#endif

// The tile at `start`, unpacked into rows' own memory as the `slot`-th of a span; groups beyond `end` repeat the last.
template <class T>
Tile<T> unpack_tile(const Call<T>& c, const int32_t* table, int head, int start, int end, Rows<T>& rows, int slot) {
  const Shape& s = c.s;
  const size_t size = s.group_size();
  rows.keys.resize(SPAN_GROUPS * size), rows.values.resize(SPAN_GROUPS * size);
  Tile<T> tile;
  size_t at = s.at(table, head, std::min(start, end - 1));
  for (int i = 0; i < TILE_GROUPS; i++) {
    const int g = slot * TILE_GROUPS + i;
    tile.keys[i] = rows.keys.data() + g * size, tile.values[i] = rows.values.data() + g * size;
    const int token = start + i * LANES, after = token + LANES;
    if (token >= end) continue;
    const size_t next = s.at(table, head, std::min(after, end - 1)), scales = Packed::scale_at(s, table, head, token);
    auto unpack = c.packed.kind == INT8 ? unpack_group<T, INT8> : unpack_group<T, FP8>;
    unpack(rows.keys.data() + g * size, rows.values.data() + g * size, c.packed.keys + at, c.packed.values + at,
           c.packed.keys + next, c.packed.values + next, s.dim16());
    std::memcpy(rows.key_scales + g * LANES, c.packed.key_scales + scales, LANES * sizeof(float));
    std::memcpy(rows.value_scales + g * LANES, c.packed.value_scales + scales, LANES * sizeof(float));
    at = next;
  }
  return tile;
}

// Keys that an item's queries meet: those of one head of a sequence.
struct Keys {
  const int32_t* table;
  int head, begin, end;
};

template <class T> Tile<T> tile_at(const Call<T>& c, const Keys& keys, int start, Rows<T>& rows, int slot = 0) {
  if (c.packed.kind) return unpack_tile(c, keys.table, keys.head, start, keys.end, rows, slot);
  Tile<T> tile;
  for (int g = 0; g < TILE_GROUPS; g++) {
    const size_t at = c.s.at(keys.table, keys.head, std::min(start + g * LANES, keys.end - 1));
    tile.keys[g] = c.keys + at;
    tile.values[g] = c.values + at;
  }
  return tile;
}

template <class T> void meet(const Call<T>& c, const Keys& keys, int n, Rows<T>& rows) {
  const int dim16 = c.s.dim16();
  Keys then = keys;                                                            // what this thread probably meets next
  then.head = std::min(keys.head + 1, c.s.kv_heads - 1);
  Tile<T> tile = tile_at(c, keys, keys.begin, rows), next = tile;
  for (int start = keys.begin; start < keys.end; start += TILE, tile = next) {
    const bool more = start + TILE < keys.end;
    if (!c.packed.kind) next = more ? tile_at(c, keys, start + TILE, rows) : tile_at(c, then, then.begin, rows);
    int r = 0;
    if constexpr (ROWS == 4) {
      for (; r + 4 <= n; r += 4) tile_step<T, 4>(rows, r, start, keys.end, tile, next, dim16, c.how);
      if (n - r == 3) tile_step<T, 3>(rows, r, start, keys.end, tile, next, dim16, c.how), r += 3;
      if (n - r == 2) tile_step<T, 2>(rows, r, start, keys.end, tile, next, dim16, c.how), r += 2;
    }
    for (; r < n; r++) tile_step<T, 1>(rows, r, start, keys.end, tile, next, dim16, c.how);
    if (more && c.packed.kind) next = tile_at(c, keys, start + TILE, rows);
  }
}

#if defined(GM_AMX)
void meet_amx(const Call<bf16>& c, const Keys& keys, int n, Rows<bf16>& rows) {
  amx_configure(std::min(n, 16));                                              // a last group of fewer rows: padding
  const int ahead = c.packed.kind ? 0 : 1;
  Tile<bf16> tiles[SPAN_TILES + 1];
  for (int start = keys.begin; start < keys.end; start += SPAN) {
    int i = 0;
    for (; i < SPAN_TILES + ahead && start + i * TILE < keys.end; i++)
      tiles[i] = tile_at(c, keys, start + i * TILE, rows, i);
    for (; i <= SPAN_TILES; i++) tiles[i] = tiles[i - 1];
    span_step_amx<true>(rows, 0, std::min(16, n), start, keys.end, tiles, c.s.dim16(), c.how);
    for (int r = 16; r < n; r += 16)
      span_step_amx<false>(rows, r, std::min(16, n - r), start, keys.end, tiles, c.s.dim16(), c.how);
  }
}
#endif

template <class T> void run_item(const Call<T>& c, const Item& it, const Query* queries, int head, Rows<T>& rows) {
  const Shape& s = c.s;
  const int dim16 = s.dim16(), group = s.group(), n = it.count * group;
  rows.reset(n, dim16);
  int oldest = it.end;
  for (int r = 0; r < n; r++) {
    const Query& q = queries[it.first + r / group];
    const int h = head * group + r % group;
    std::memcpy(rows.q.data() + size_t(r) * dim16, c.qkv + size_t(q.row) * s.stride + h * s.dim, s.dim * sizeof(T));
    rows.limit[r] = q.position + 1;
    if (c.how.slopes) rows.slope[r] = c.how.slopes[h];
    rows.first[r] = c.window > 0 ? std::max(0, rows.limit[r] - c.window) : 0;
    oldest = std::min(oldest, rows.first[r]);
  }
  const auto keys = [&](int step) {
    return Keys{c.tables + size_t(it.table) * c.table_width, head, std::max(it.begin, oldest / step * step), it.end};
  };
  bool amx = false;
#if defined(GM_AMX)
  if constexpr (std::is_same_v<T, bf16>)
    if ((amx = use_amx(c))) meet_amx(c, keys(SPAN), n, rows);
#endif
  if (!amx) meet(c, keys(TILE), n, rows);
  for (int r = 0; r < n; r++) {
    const Query& q = queries[it.first + r / group];
    const int h = head * group + r % group;
    const float l = sum(load(rows.l.data() + size_t(r) * LANES));
    const float* acc = rows.acc.data() + size_t(r) * dim16;
    if (q.part < 0) {
      T* out = c.out + (size_t(q.row) * s.heads + h) * s.dim;
      for_lanes<T>(s.dim, [&](int i, int k) { put(out + i, load(acc + i) / l, k); });
    } else {
      float* part = c.scratch + (size_t(q.part) * s.heads + h) * (dim16 + 2);
      part[0] = rows.m[r], part[1] = l;
      std::memcpy(part + 2, acc, dim16 * sizeof(float));
    }
  }
}

template <class T> void run_merge(const Call<T>& c, const Merge& g, int h) {
  const Shape& s = c.s;
  const size_t size = s.dim16() + 2, step = size * s.heads;
  const float* first = c.scratch + (size_t(g.part) * s.heads + h) * size;
  alignas(64) float acc[1024] = {};                                            // dim <= 1024: checked by the caller
  float m = -1e30f, l = 0;
  for (int p = 0; p < g.parts; p++) m = std::max(m, first[p * step]);
  for (int p = 0; p < g.parts; p++) {
    const float* part = first + p * step;
    const float weight = exp2f(part[0] - m);
    l += weight * part[1];
    for (int d = 0; d < s.dim16(); d += LANES) store(acc + d, load(acc + d) + load(part + 2 + d) * weight);
  }
  T* out = c.out + (size_t(g.row) * s.heads + h) * s.dim;
  for_lanes<T>(s.dim, [&](int i, int k) { put(out + i, load(acc + i) / l, k); });
}

template <class T>
void attend_all(const NewRows<T>& rows_in, const Call<T>& c, const Work& work, int threads) {
  const int n = work.n_items * c.s.kv_heads;
  const int chunk = work.n_items >= 8 * threads ? c.s.kv_heads : 1;            // heads of an item: in the same pages
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows_in.count; r++) rope_store_row(rows_in, r, c.s, c.packed);
    static thread_local Rows<T> rows;
#if defined(GM_AMX)
    AmxGuard guard(use_amx(c));
#endif
#pragma omp for schedule(dynamic, chunk)
    for (int i = 0; i < n; i++) run_item(c, work.items[i / c.s.kv_heads], work.queries, i % c.s.kv_heads, rows);
#pragma omp for schedule(static)
    for (int i = 0; i < work.n_merges * c.s.heads; i++) run_merge(c, work.merges[i / c.s.heads], i % c.s.heads);
  }
}

}  // namespace
