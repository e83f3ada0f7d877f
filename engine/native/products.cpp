// Gristmill's CPU matrix products for linear layers: x [rows, in] times a weight [out, in], in bf16 or int8, on Intel's
// matrix unit or with AVX-512's dot products. Plain C functions over raw pointers, like kernels.cpp.
// In int8 a number of x is one part, which is what W8A8 means, or two, which is next to no rounding: a row of x is then
// two rows, the nearest codes and, in 254ths of a code, what is left.
//
// Weights are packed once into tiles of 16 outputs by 64 bytes of inputs, with each 4 bytes of inputs side by side, as
// all these instructions want them; two tiles make a step of a panel of 32 outputs. Rows of x are copied (bf16) or
// rounded to int8 (each row by its own largest number) into tiles by 64 bytes. A panel is read from memory
// once and meets all rows while it is in the cache. What a row gets does not depend on its neighbours:
// its sums run over the inputs in one order, whatever the number of rows.
#include <omp.h>

#include <vector>

#include "amx_unit.h"
#include "layers.h"

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, TILE_SIZE = TILE_ROWS * TILE_BYTES;
constexpr int PANEL = 32;                                                      // outputs: two tiles side by side
constexpr int CHUNK_BYTES = 1 << 20;                                           // of x: stays in the second cache
constexpr int DOT_ROWS = 8;                                                    // 16 sums of 32 registers
constexpr int AHEAD = 4;                                                       // steps fetched in advance with AMX
constexpr float FINER = 254;                                                   // of a second part in one of the first
enum Way { AMX = 1, DOTS = 2 };
template <int PARTS> constexpr int EACH = PARTS ? PARTS : 1;                   // rows of tiles that one of x makes
enum Form { PLAIN, HALVES, GATED };                                            // of what comes out: see Finish

inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Packed {
  const uint8_t* data;                                                         // [panels][steps][2][16][64]
  int outputs, steps;
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes(); }
  int64_t panel_bytes() const { return int64_t(steps) * 2 * TILE_SIZE; }
};

void pack(uint8_t* to, const uint8_t* weight, int outputs, int row_bytes, int threads) {
  const int64_t panels = tiles(outputs, PANEL), steps = tiles(row_bytes, TILE_BYTES);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t s = 0; s < steps; s++)
      for (int half = 0; half < 2; half++) {
        uint8_t* tile = to + ((p * steps + s) * 2 + half) * TILE_SIZE;
        std::memset(tile, 0, TILE_SIZE);
        for (int n = 0; n < 16 && p * PANEL + half * 16 + n < outputs; n++) {
          const uint8_t* row = weight + (p * PANEL + half * 16 + n) * row_bytes;
          if ((s + 1) * TILE_BYTES <= row_bytes) {                             // whole: sizes the compiler knows
            for (int k = 0; k < 16; k++) std::memcpy(tile + k * TILE_BYTES + n * 4, row + s * TILE_BYTES + k * 4, 4);
            continue;
          }
          for (int k = 0; k < 16; k++) {
            const int at = int(s) * TILE_BYTES + k * 4;
            if (at < row_bytes) std::memcpy(tile + k * TILE_BYTES + n * 4, row + at, std::min(4, row_bytes - at));
          }
        }
      }
}

inline void fetch_panel(const uint8_t* panel, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(panel + line, 0, 2);
}

// Rows of x in tiles of so many: [row tiles][steps][tile_rows][64].
struct Tiled {
  uint8_t* data;
  int tile_rows, steps;
  int step_bytes() const { return tile_rows * TILE_BYTES; }
  uint8_t* row(int64_t r) const {
    return data + (r / tile_rows * tile_rows * steps + r % tile_rows) * TILE_BYTES;
  }
};
inline void copy_row(const Tiled& tiled, int64_t r, const bf16* row, int n) {
  uint8_t* to = tiled.row(r);
  for (int s = 0; s < n / 32; s++, to += tiled.step_bytes()) store_as(to, load_as<vu>(row + s * 32));
  if (n % 32) {
    std::memset(to, 0, TILE_BYTES);
    std::memcpy(to, row + n / 32 * 32, n % 32 * 2);
  }
}
// In so many parts, around 128 and without a sign, as vpdpbusd wants its first factor. Returns what a code of the first
// part is worth: NaN if the row holds one, and so is then all that comes of it.
template <int PARTS, class T> inline float round_row(const Tiled& tiled, int64_t r, const T* row, int n) {
  typedef uint8_t vb __attribute__((vector_size(16)));
  vi top = {};                                                                 // as integers: NaN is the largest
  for_lanes<T>(n, [&](int i, int k) {
    const vi size = (vi)get(row + i, k) & 0x7fffffff;
    top = size > top ? size : top;
  });
  const int32_t bits = largest(top);
  float most;
  std::memcpy(&most, &bits, 4);
  most = std::max(most, 1e-30f);
  const float codes_each = 127 / most;
  const vf magic = splat(12582912.f);                                          // + 1.5 * 2^23 rounds to an integer
  uint8_t* to = tiled.row(r * PARTS);                                          // a row's parts are neighbours in a tile
  for (int s = 0; s < tiled.steps; s++, to += tiled.step_bytes())
    for (int part = 0; part < TILE_BYTES; part += LANES) {
      const int at = s * TILE_BYTES + part, count = std::min(LANES, n - at);
      vf v = {};
      if (count > 0) v = get(row + at, count) * codes_each;
      rounded(v);
      const vf code = v + magic;
      store_as(to + part, __builtin_convertvector((vi)code + 128, vb));
      if constexpr (PARTS == 2) {
        vf left = (v - (code - magic)) * FINER;
        rounded(left);
        store_as(to + TILE_BYTES + part, __builtin_convertvector((vi)(left + magic) + 128, vb));
      }
    }
  return most / 127;
}

#if defined(GM_AMX)
#define TILE_DOT8(sum, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

inline void fetch_tile(const uint8_t* tile) {
  for (int line = 0; line < TILE_SIZE; line += 64) __builtin_prefetch(tile + line);
}
// sums [32][32] = up to 32 rows (two tiles, or one) times a panel. `fetch`: it is the panel's first use.
template <bool INT8>
inline void amx_block(const uint8_t* a0, const uint8_t* a1, const uint8_t* b, int steps, bool fetch, void* sums) {
  uint8_t* c = (uint8_t*)sums;
  __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
  for (int s = 0; s < steps; s++, a0 += TILE_SIZE, b += 2 * TILE_SIZE) {
    if (fetch) fetch_tile(b + AHEAD * 2 * TILE_SIZE), fetch_tile(b + (AHEAD * 2 + 1) * TILE_SIZE);
    fetch_tile(a0 + 2 * TILE_SIZE);
    TILE_LOAD(4, a0, TILE_BYTES);
    TILE_LOAD(6, b, TILE_BYTES);
    TILE_LOAD(7, b + TILE_SIZE, TILE_BYTES);
    if constexpr (INT8) { TILE_DOT8(0, 4, 6); TILE_DOT8(1, 4, 7); }
    else { TILE_DOT(0, 4, 6); TILE_DOT(1, 4, 7); }
    if (!a1) continue;
    fetch_tile(a1 + 2 * TILE_SIZE);
    TILE_LOAD(5, a1, TILE_BYTES);
    a1 += TILE_SIZE;
    if constexpr (INT8) { TILE_DOT8(2, 5, 6); TILE_DOT8(3, 5, 7); }
    else { TILE_DOT(2, 5, 6); TILE_DOT(3, 5, 7); }
  }
  TILE_STORE(0, c, PANEL * 4);
  TILE_STORE(1, c + 64, PANEL * 4);
  if (!a1) return;
  TILE_STORE(2, c + 16 * PANEL * 4, PANEL * 4);
  TILE_STORE(3, c + 16 * PANEL * 4 + 64, PANEL * 4);
}
void amx_whole_tiles() {
  TileConfig c{};
  c.palette = 1;
  for (int t = 0; t < 8; t++) c.rows[t] = TILE_ROWS, c.row_bytes[t] = TILE_BYTES;
  __asm__ volatile("ldtilecfg %0" ::"m"(c));
}
#endif

// The dot products of AVX-512: of 4 bytes of a row with those of 16 outputs, two numbers in bf16, four in int8.
template <bool INT8> constexpr bool dots_here() {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  if (INT8) return true;
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
  if (!INT8) return true;
#endif
  return false;
}
// sums [R][32] = R rows, of a tile, times a panel, while `fetched` lines a step of the next one are on their way.
template <bool INT8, int R>
void dot_rows(const uint8_t* a, int step_bytes, const uint8_t* b, int steps, const uint8_t* next, int fetched,
              uint8_t* sums) {
  using V = std::conditional_t<INT8, vi, vf>;
  V c[R][2] = {};
  for (int s = 0; s < steps; s++, a += step_bytes, b += 2 * TILE_SIZE) {
    for (int i = 0; i < fetched; i++, next += 64) __builtin_prefetch(next, 0, 2);
    for (int k = 0; k < TILE_BYTES; k += 4) {
      const uint8_t* some = b + k / 4 * TILE_BYTES;
      const vu left = load_as<vu>(some), right = load_as<vu>(some + TILE_SIZE);
      for (int r = 0; r < R; r++) {
        const uint32_t x = load_as<uint32_t>(a + r * TILE_BYTES + k);
        if constexpr (INT8) c[r][0] = dot_four(c[r][0], left, x), c[r][1] = dot_four(c[r][1], right, x);
        else c[r][0] = dot_pair(c[r][0], left, x), c[r][1] = dot_pair(c[r][1], right, x);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) store_as(sums + (r * 2 + h) * TILE_BYTES, c[r][h]);
}
template <bool INT8, int R = DOT_ROWS>
void dot_block(int rows, const uint8_t* a, int step_bytes, const uint8_t* b, int steps, const uint8_t* next,
               int fetched, uint8_t* sums) {
  if (rows == R) return dot_rows<INT8, R>(a, step_bytes, b, steps, next, fetched, sums);
  if constexpr (R > 1) dot_block<INT8, R - 1>(rows, a, step_bytes, b, steps, next, fetched, sums);
}

// What becomes of sums: in int8 they are worth a row's scale times an output's, less what 128 too much in x added.
// Arrays of outputs are as long as the panels are together. A panel's tiles are neighbours (PLAIN), or one is of the
// first half of the outputs and one of the second: written as such (HALVES), or as silu(first) * second (GATED), of
// what would have been written, in the very operations of silu_mul_rows.
// PARTS that a number of x is in; 0: bf16.
template <int PARTS, class T> struct Finish {
  T* out;
  int outputs, form;
  const float *bias, *scales;                                                  // null: none
  const int32_t* ones;                                                         // int8: each output's weights added up
  float* row_scales;                                                           // int8: of the rows that are in tiles

  // Of one tile's outputs: looked up once for all rows.
  struct Worth {
    vf scale, bias;
    vi too_much;
    Worth(const Finish& f, int at)
        : scale(PARTS ? load(f.scales + at) : vf{}), bias(f.bias ? load(f.bias + at) : splat(-0.f)),
          too_much(PARTS ? 128 * load_as<vi>(f.ones + at) : vi{}) {}
    vf exact(const float* sums) const { return __builtin_convertvector(load_as<vi>(sums) - too_much, vf); }
    vf operator()(const float* sums, float row_scale) const {
      if constexpr (!PARTS) return load(sums) + bias;
      vf y = exact(sums);
      if constexpr (PARTS == 2) {
        vf left = exact(sums + PANEL) * (1 / FINER);
        rounded(left);
        y += left;
      }
      y = y * scale * row_scale;
      rounded(y);
      return y + bias;
    }
  };
  template <int FORM> void write(const void* sums, int64_t row, int rows, int first) const {
    const Worth of_left(*this, first), of_right(*this, first + LANES);
    const float *sum = (const float*)sums, *row_scale = row_scales + row;
    const int half = outputs / 2, width = FORM == GATED ? half : outputs, count = outputs - first;
    T* to = out + row * width + (FORM == PLAIN ? first : first / 2);
    for (int r = 0; r < rows; r++, sum += PANEL * EACH<PARTS>, to += width) {
      const float scale = PARTS ? row_scale[r] : 1.f;
      const vf left = of_left(sum, scale), right = of_right(sum + LANES, scale);
      if constexpr (FORM == GATED) store(to, silu(as_stored<T>(left)) * as_stored<T>(right));
      else if constexpr (FORM == HALVES) store(to, left), store(to + half, right);
      else {
        put(to, left, std::min(LANES, count));
        if (count > LANES) put(to + LANES, right, std::min(LANES, count - LANES));
      }
    }
  }
  void operator()(const void* sums, int64_t row, int rows, int first) const {
    if (form == GATED) write<GATED>(sums, row, rows, first);
    else if (form == HALVES) write<HALVES>(sums, row, rows, first);
    else write<PLAIN>(sums, row, rows, first);
  }
};

// An RMS norm of each row before it is multiplied, of residual + x if there is one, with the sum left there.
template <class T> struct Norm {
  const T* weight;                                                             // null: none
  T* residual;
  float eps;
};

struct Area {                                                                  // grows, 64 bytes aligned
  std::vector<uint8_t> held;
  uint8_t* take(size_t size) {
    if (held.size() < size + 64) held.resize(size + 64);
    return (uint8_t*)((uintptr_t(held.data()) + 63) / 64 * 64);
  }
};

// Rows of x that are multiplied together.
template <int PARTS, class T> struct Chunk {
  static constexpr bool INT8 = PARTS != 0;
  const T* x;
  int64_t count;
  int inputs, way;
  const Packed& w;
  const Finish<PARTS, T>& finish;
  const Norm<T>& norm;
  int64_t block;                                                               // rows that meet a panel at a time
  Tiled tiled;

  void prepare(int64_t r, T* normed) const {
    const T* row = x + r * inputs;
    if (norm.weight) {
      T* residual = norm.residual ? norm.residual + r * inputs : nullptr;
      rms_norm_row(normed, row, residual, norm.weight, inputs, norm.eps);
      row = normed;
    }
    if constexpr (INT8) finish.row_scales[r] = round_row<PARTS>(tiled, r, row, inputs);
    else copy_row(tiled, r, row, inputs);
  }
  // All rows and panel p, while, with dot products, the next one is on its way to the second cache.
  void meet(int64_t p) const {
    alignas(64) uint8_t sums[PANEL * PANEL * 4];
    const uint8_t *b = w.panel(p), *next = w.panel(p + 1);
    const int lines = int(tiles(2 * TILE_SIZE / 64, tiles(count, block)));     // of a step of the next one, each time
    for (int64_t r = 0; r < count; r += block) {
      const int n = int(std::min(block, count - r)) * EACH<PARTS>;
      const uint8_t* a = tiled.row(r * EACH<PARTS>);
#if defined(GM_AMX)
      if (way == AMX) amx_block<INT8>(a, n > TILE_ROWS ? a + w.steps * TILE_SIZE : nullptr, b, w.steps, r == 0, sums);
#endif
      if constexpr (dots_here<INT8>())
        if (way == DOTS) {
          const int fetched = next < w.panel(p + 2) ? lines : 0;
          dot_block<INT8>(n, a, tiled.step_bytes(), b, w.steps, next, fetched, sums);
          next += int64_t(lines) * w.steps * 64;
        }
      finish(sums, r, n / EACH<PARTS>, int(p) * PANEL);
    }
  }
};

// A thread's panels: neighbours in memory. Who is done goes on with what others have not begun.
struct alignas(64) Share {
  int64_t next, end;
  int64_t take() {
    int64_t p;
#pragma omp atomic capture
    p = next++;
    return p < end ? p : -1;
  }
};

template <int PARTS, class T>
void product(const T* x, int64_t rows, int inputs, const Packed& w, Finish<PARTS, T> finish, Norm<T> norm, int way,
             int threads) {
  static thread_local Area area;
  static thread_local std::vector<Share> held;
  held.resize(threads);
  Share* const shares = held.data();
  const int64_t panels = tiles(w.outputs, PANEL), row_bytes = int64_t(EACH<PARTS>) * w.steps * TILE_BYTES;
  const int64_t chunk = std::max<int64_t>(PANEL, CHUNK_BYTES / row_bytes / PANEL * PANEL);
  const int64_t most = std::min(rows, chunk), room = (most + PANEL) * row_bytes;
  uint8_t* const tiled = area.take(room + most * sizeof(float));
  finish.row_scales = (float*)(tiled + room);
  for (int64_t from = 0; from < rows; from += chunk) {
    const int64_t count = std::min(chunk, rows - from);
    const int64_t blocks = tiles(count, DOT_ROWS / EACH<PARTS>);
    const int64_t block = way == AMX ? PANEL / EACH<PARTS> : tiles(count, blocks);  // of nearly equal size
    const int tile_rows = way == AMX ? TILE_ROWS : int(block) * EACH<PARTS>;
    const Chunk<PARTS, T> now{x + from * inputs, count, inputs, way,  w, finish,
                              norm,              block, Tiled{tiled, tile_rows, w.steps}};
    for (int t = 0; t < threads; t++) shares[t] = {panels * t / threads, panels * (t + 1) / threads};
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      static thread_local std::vector<T> normed;
      if (norm.weight) normed.resize(inputs);
      if (way == DOTS) fetch_panel(w.panel(shares[me].next), w.panel_bytes());
#pragma omp for schedule(static)
      for (int64_t r = 0; r < count; r++) now.prepare(r, normed.data());
#if defined(GM_AMX)
      AmxGuard guard(way == AMX);
      if (way == AMX) amx_whole_tiles();
#endif
      for (int t = 0; t < threads; t++)
        for (int64_t p; (p = shares[(me + t) % threads].take()) >= 0;) now.meet(p);
    }
    finish.out += count * (w.outputs >> (finish.form == GATED));
    if (norm.residual) norm.residual += count * inputs;
  }
}

// A weight, as products.py lays it out: the same fields in the same order.
struct Layer {
  const void* packed;
  const float *bias, *scales;                                                  // null: none
  const int32_t* ones;
  int outputs, inputs, parts, way, threads;                                    // parts 0: bf16
};

struct Link {                                                                  // of a chain, likewise
  const Layer* layer;
  const void* norm;                                                            // null: none
  float eps;
  int form;
};

template <int PARTS, class T>
void multiply(const Layer& layer, void* out, const void* x, int64_t rows, int form, const void* norm, void* residual,
              float eps) {
  const int row_bytes = layer.inputs * (PARTS ? 1 : 2);
  const Packed w{(const uint8_t*)layer.packed, layer.outputs, int(tiles(row_bytes, TILE_BYTES))};
  product<PARTS>((const T*)x, rows, layer.inputs, w,
                 Finish<PARTS, T>{(T*)out, layer.outputs, form, layer.bias, layer.scales, layer.ones, nullptr},
                 Norm<T>{(const T*)norm, (T*)residual, eps}, layer.way, layer.threads);
}

}  // namespace

extern "C" {

// Which ways this machine has: of bf16 products, and of int8's; a sum of Way.
int gm_product_ways(int int8) {
  int ways = 0;
#if defined(GM_AMX)
  if (amx_allowed()) ways |= AMX;
#endif
  if (int8 ? dots_here<true>() : dots_here<false>()) ways |= DOTS;
  return ways;
}

int64_t gm_packed_bytes(int outputs, int row_bytes) {
  return tiles(outputs, PANEL) * tiles(row_bytes, TILE_BYTES) * 2 * TILE_SIZE;
}

void gm_pack(void* to, const void* weight, int outputs, int row_bytes, int threads) {
  pack((uint8_t*)to, (const uint8_t*)weight, outputs, row_bytes, threads);
}

// x and what comes out in float32 (wide: int8 only) or bf16.
void gm_product(const void* of, void* out, const void* x, int64_t rows, int form, int wide, const void* norm,
                void* residual, float eps) {
  const Layer& layer = *(const Layer*)of;
  const auto run = layer.parts == 0   ? multiply<0, bf16>
                   : layer.parts == 1 ? (wide ? multiply<1, float> : multiply<1, bf16>)
                                      : (wide ? multiply<2, float> : multiply<2, bf16>);
  run(layer, out, x, rows, form, norm, residual, eps);
}

// One product behind another: what one says is the next one's x. `between` has room for it twice, `apart` bytes each.
// A norm adds what it is given to `residual`.
void gm_chain(const void* of, int count, void* out, const void* x, int64_t rows, int wide, void* residual,
              void* between, int64_t apart) {
  const Link* links = (const Link*)of;
  for (int i = 0; i < count; i++) {
    void* to = i + 1 < count ? (uint8_t*)between + i % 2 * apart : out;
    gm_product(links[i].layer, to, x, rows, links[i].form, wide, links[i].norm, links[i].norm ? residual : nullptr,
               links[i].eps);
    x = to;
  }
}

}  // extern "C"
