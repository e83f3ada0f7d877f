// Gristmill's CPU matrix products for linear layers: x [rows, in] times a weight [out, in], in bf16 on Intel's matrix
// unit, in int8 there or with AVX-512's dot products. Plain C functions over raw pointers, like kernels.cpp.
// A weight in int8 may also meet x in bf16: its panels are then widened before they meet the rows.
//
// Weights are packed once into tiles of 16 outputs by 64 bytes of inputs, with each 4 bytes of inputs side by side, as
// the matrix unit and vpdpbusd both want them; two tiles make a step of a panel of 32 outputs. Rows of x are copied
// (bf16) or rounded to int8 (each row by its own largest number) into tiles of 16 rows by 64 bytes. A panel is read
// from memory once and meets all rows while it is in the cache. What a row gets does not depend on its neighbours:
// its sums run over the inputs in one order, whatever the number of rows.
#include <vector>

#include "amx_unit.h"
#include "layers.h"
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define GM_VNNI 1
#endif

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, TILE_SIZE = TILE_ROWS * TILE_BYTES;
constexpr int PANEL = 32;                                                      // outputs: two tiles side by side
constexpr int CHUNK_BYTES = 1 << 20;                                           // of x: stays in the second cache
constexpr int AHEAD = 4;                                                       // steps of a panel fetched in advance
enum Way { AMX = 1, VNNI = 2 };
enum Form { PLAIN, HALVES, GATED };                                            // of what comes out: see Finish

inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Packed {
  const uint8_t* data;                                                         // [panels][steps][2][16][64]
  int outputs, steps;
  bool narrow;                                                                 // bf16's tiles, each number in a byte
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes() / (narrow ? 2 : 1); }
  int64_t panel_bytes() const { return int64_t(steps) * 2 * TILE_SIZE; }
};

// A panel's bytes as bf16, exactly: it stays in the cache for as long as it is used.
inline void widen_panel(bf16* to, const uint8_t* from, int64_t count) {
  typedef int8_t vb __attribute__((vector_size(16)));
  for (int64_t i = 0; i < count; i += LANES) {
    if (i % 64 == 0) __builtin_prefetch(from + i + 1024);
    store(to + i, __builtin_convertvector(__builtin_convertvector(load_as<vb>(from + i), vi), vf));
  }
}

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

// Row r of x in tiles: [row tiles][steps][16][64].
inline uint8_t* tile_row(uint8_t* x, int64_t r, int steps) {
  return x + (r / TILE_ROWS * steps * TILE_ROWS + r % TILE_ROWS) * TILE_BYTES;
}
inline void copy_row(uint8_t* to, const bf16* row, int n, int steps) {
  for (int s = 0; s < steps; s++, to += TILE_SIZE) {
    const int count = std::min(32, n - s * 32);
    std::memcpy(to, row + s * 32, count * 2);
    std::memset(to + count * 2, 0, TILE_BYTES - count * 2);
  }
}
// Around 128 and without a sign, as vpdpbusd wants its first factor. Returns what one step is worth.
template <class T> inline float round_row(uint8_t* to, const T* row, int n, int steps) {
  typedef uint8_t vb __attribute__((vector_size(16)));
  vf top = {};
  for_lanes<T>(n, [&](int i, int k) { vf v = get(row + i, k); top = vmax(top, vmax(v, -v)); });
  const float scale = std::max(largest(top), 1.17549435e-38f) / 127;
  const vf magic = splat(12582912.f);                                          // + 1.5 * 2^23 rounds to an integer
  for (int s = 0; s < steps; s++)
    for (int part = 0; part < TILE_BYTES; part += LANES) {
      const int at = s * TILE_BYTES + part, count = std::min(LANES, n - at);
      vf v = {};
      if (count > 0) v = get(row + at, count) / scale;
      rounded(v);
      v = (v + magic) - magic;
      store_as(to + size_t(s) * TILE_SIZE + part, __builtin_convertvector(__builtin_convertvector(v, vi) + 128, vb));
    }
  return scale;
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

#if defined(GM_VNNI)
// R rows from row `first` of a tile on.
template <int R> inline void vnni_rows(const uint8_t* a, const uint8_t* b, int steps, bool fetch, int32_t* sums) {
  __m512i c[R][2];
  for (int r = 0; r < R; r++) c[r][0] = c[r][1] = _mm512_setzero_si512();
  for (int s = 0; s < steps; s++, a += TILE_SIZE, b += 2 * TILE_SIZE)
    for (int k = 0; k < 16; k++) {
      if (fetch) {
        __builtin_prefetch(b + AHEAD * 2 * TILE_SIZE + k * TILE_BYTES);
        __builtin_prefetch(b + AHEAD * 2 * TILE_SIZE + TILE_SIZE + k * TILE_BYTES);
      }
      const uint8_t* four_each = b + k * TILE_BYTES;
      const __m512i b0 = _mm512_loadu_si512(four_each), b1 = _mm512_loadu_si512(four_each + TILE_SIZE);
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, a + r * TILE_BYTES + k * 4, 4);
        const __m512i x = _mm512_set1_epi32(four);
        c[r][0] = _mm512_dpbusd_epi32(c[r][0], x, b0);
        c[r][1] = _mm512_dpbusd_epi32(c[r][1], x, b1);
      }
    }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) _mm512_storeu_si512(sums + r * PANEL + h * 16, c[r][h]);
}
inline void vnni_block(const uint8_t* a, const uint8_t* b, int steps, int rows, bool fetch, int32_t* sums) {
  int r = 0;
  for (; r + 8 <= rows; r += 8, fetch = false) vnni_rows<8>(a + r * TILE_BYTES, b, steps, fetch, sums + r * PANEL);
  for (; r + 2 <= rows; r += 2, fetch = false) vnni_rows<2>(a + r * TILE_BYTES, b, steps, fetch, sums + r * PANEL);
  if (r < rows) vnni_rows<1>(a + r * TILE_BYTES, b, steps, fetch, sums + r * PANEL);
}
#endif

// What becomes of sums: in int8 they are worth a row's scale times an output's, less what 128 too much in x added; where
// the weight alone is in int8, an output's scale.
// Arrays of outputs are as long as the panels are together. A panel's tiles are neighbours (PLAIN), or one is of the
// first half of the outputs and one of the second: written as such (HALVES), or as silu(first) * second (GATED), of
// what would have been written, in the very operations of silu_mul_rows.
template <bool INT8, class T> struct Finish {
  T* out;
  int outputs, form;
  const float *bias, *row_scales, *scales;                                     // null: none
  const int32_t* ones;                                                         // int8: each output's weights added up

  // Of one tile's outputs: looked up once for all rows.
  struct Worth {
    vf scale, bias;
    vi too_much;
    Worth(const Finish& f, int at)
        : scale(f.scales ? load(f.scales + at) : splat(1.f)), bias(f.bias ? load(f.bias + at) : splat(-0.f)),
          too_much(INT8 ? 128 * load_as<vi>(f.ones + at) : vi{}) {}
    vf operator()(const void* sums, float row_scale) const {
      vf y;
      if constexpr (INT8)
        y = __builtin_convertvector(load_as<vi>((const int32_t*)sums) - too_much, vf) * scale * row_scale;
      else y = load((const float*)sums) * scale;
      rounded(y);
      return y + bias;
    }
  };
  template <int FORM> void write(const void* sums, int64_t row, int rows, int first) const {
    const Worth of_left(*this, first), of_right(*this, first + LANES);
    const float *sum = (const float*)sums, *row_scale = row_scales + row;
    const int half = outputs / 2, width = FORM == GATED ? half : outputs, count = outputs - first;
    T* to = out + row * width + (FORM == PLAIN ? first : first / 2);
    for (int r = 0; r < rows; r++, sum += PANEL, to += width) {
      const float scale = INT8 ? row_scale[r] : 1.f;
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

template <bool INT8, class T>
void product(const T* x, int64_t rows, int inputs, const Packed& w, Finish<INT8, T> finish, Norm<T> norm, int way,
             int threads) {
  static thread_local Area area;
  const int64_t panels = tiles(w.outputs, PANEL);
  const int64_t chunk = std::max<int64_t>(PANEL, CHUNK_BYTES / (w.steps * TILE_BYTES) / PANEL * PANEL);
  const int64_t most = std::min(rows, chunk), room = tiles(most, TILE_ROWS) * w.steps * TILE_SIZE;
  uint8_t* const tiled = area.take(room + most * sizeof(float));
  float* const row_scales = (float*)(tiled + room);
  for (int64_t from = 0; from < rows; from += chunk) {
    const int64_t count = std::min(chunk, rows - from);
    Finish<INT8, T> done = finish;
    done.out += from * (w.outputs >> (finish.form == GATED));
    done.row_scales = row_scales;
#pragma omp parallel num_threads(threads)
    {
      static thread_local std::vector<T> normed;
      if (norm.weight) normed.resize(inputs);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < count; r++) {
        const T* row = x + (from + r) * inputs;
        if (norm.weight) {
          T* residual = norm.residual ? norm.residual + (from + r) * inputs : nullptr;
          rms_norm_row(normed.data(), row, residual, norm.weight, inputs, norm.eps);
          row = normed.data();
        }
        if constexpr (INT8) row_scales[r] = round_row(tile_row(tiled, r, w.steps), row, inputs, w.steps);
        else copy_row(tile_row(tiled, r, w.steps), row, inputs, w.steps);
      }
#if defined(GM_AMX)
      AmxGuard guard(way == AMX);
      if (way == AMX) amx_whole_tiles();
#endif
      static thread_local Area wide;
      uint8_t* const widened = w.narrow ? wide.take(w.panel_bytes()) : nullptr;
      alignas(64) int32_t sums[PANEL * PANEL];
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < panels; p++) {
        if (w.narrow) widen_panel((bf16*)widened, w.panel(p), w.panel_bytes() / 2);
        for (int64_t r = 0; r < count; r += PANEL) {
          const uint8_t *a = tile_row(tiled, r, w.steps), *b = w.narrow ? widened : w.panel(p);
          const int n = int(std::min<int64_t>(PANEL, count - r));
#if defined(GM_AMX)
          if (way == AMX)
            amx_block<INT8>(a, n > TILE_ROWS ? a + w.steps * TILE_SIZE : nullptr, b, w.steps, r == 0 && !w.narrow,
                            sums);
#endif
#if defined(GM_VNNI)
          if constexpr (INT8)
            if (way == VNNI)
              for (int h = 0; h < n; h += TILE_ROWS)
                vnni_block(a + (h ? w.steps * TILE_SIZE : 0), b, w.steps, std::min(TILE_ROWS, n - h), r + h == 0,
                           sums + h * PANEL);
#endif
          done(sums, r, n, int(p) * PANEL);
        }
      }
    }
  }
}

}  // namespace

extern "C" {

// Which ways this machine has: of bf16 products, and of int8's; a sum of Way.
int gm_product_ways(int int8) {
  int ways = 0;
#if defined(GM_AMX)
  if (amx_allowed()) ways |= AMX;
#endif
#if defined(GM_VNNI)
  if (int8) ways |= VNNI;
#endif
  return ways;
}

int64_t gm_packed_bytes(int outputs, int row_bytes) {
  return tiles(outputs, PANEL) * tiles(row_bytes, TILE_BYTES) * 2 * TILE_SIZE;
}

void gm_pack(void* to, const void* weight, int outputs, int row_bytes, int threads) {
  pack((uint8_t*)to, (const uint8_t*)weight, outputs, row_bytes, threads);
}

// With scales the weight is in int8, packed as bf16 is.
void gm_product_bf16(void* out, const void* x, const void* packed, const float* scales, const float* bias, int64_t rows,
                     int outputs, int inputs, int form, const void* norm, void* residual, float eps, int threads) {
  const Packed w{(const uint8_t*)packed, outputs, int(tiles(inputs * 2, TILE_BYTES)), scales != nullptr};
  product<false>((const bf16*)x, rows, inputs, w,
                 Finish<false, bf16>{(bf16*)out, outputs, form, bias, nullptr, scales, nullptr},
                 Norm<bf16>{(const bf16*)norm, (bf16*)residual, eps}, AMX, threads);
}

void gm_product_int8(int wide, void* out, const void* x, const void* packed, const float* scales, const int32_t* ones,
                     const float* bias, int64_t rows, int outputs, int inputs, int form, const void* norm,
                     void* residual, float eps, int way, int threads) {
  const Packed w{(const uint8_t*)packed, outputs, int(tiles(inputs, TILE_BYTES)), false};
  if (wide)
    product<true>((const float*)x, rows, inputs, w,
                  Finish<true, float>{(float*)out, outputs, form, bias, nullptr, scales, ones},
                  Norm<float>{(const float*)norm, (float*)residual, eps}, way, threads);
  else
    product<true>((const bf16*)x, rows, inputs, w,
                  Finish<true, bf16>{(bf16*)out, outputs, form, bias, nullptr, scales, ones},
                  Norm<bf16>{(const bf16*)norm, (bf16*)residual, eps}, way, threads);
}

}  // extern "C"
