// Gristmill's CPU kernels: norm, activation, rotary embedding with KV write, paged attention.
//
// Plain C functions over raw pointers: no torch headers, so that a build takes seconds on first use. Sixteen float
// lanes are written as a GCC vector type, which the compiler maps to what the machine has (one AVX-512 register, two
// AVX2, four SSE or NEON); only the bf16 dot product names an instruction. bf16 travels as uint16_t; every sum is fp32.
//
// KV layout, per (block, KV head), in groups of 16 tokens; D16 is head_dim rounded up to 16, padding is zero:
//   bf16  K [D16/2][16 tokens][2 dims]    V [8 token pairs][D16][2 tokens]     (what a bf16 dot product eats)
//   fp32  K [D16][16 tokens]              V [16 tokens][D16]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define GM_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

#if defined(__AVX512F__)
constexpr int ROWS = 4;  // query rows of a micro-kernel: 16 accumulators of 32 registers
#else
constexpr int ROWS = 1;
#endif
constexpr int TILE_GROUPS = 4;                     // KV groups of 16 tokens looked at between two softmax updates
constexpr int TILE = TILE_GROUPS * LANES;
constexpr int MAX_ROWS = 64;                       // query rows of one work item, unless one token alone has more

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
inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16); }
inline void store(float* p, vf v) { store_as(p, v); }
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  vu u = (vu)v, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  r = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : r;
  store_as(p, __builtin_convertvector(r, vh));
#endif
}
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
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x, relative error about 1e-7; what is below 2^-126 may come out as zero.
inline vf exp2v(vf x) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vf low = splat(-126.f), high = splat(126.f), magic = splat(12582912.f);  // + 1.5 * 2^23 rounds to integer
  const vi tiny = x < low;
  x = tiny ? low : x > high ? high : x;
  const vf n = (x + magic) - magic;
#endif
  const vf f = (x - n) * 0.69314718056f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return tiny ? vf{} : (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
#endif
}

// A product that is added to something later is rounded here. Otherwise the compiler may fuse the two, and does so or
// not as it pleases in each copy of a function: a row's last bits would depend on how many rows it is computed with.
inline void rounded(vf& v) { __asm__ volatile("" : "+m"(v)); }

constexpr float LOG2E = 1.44269504089f;

// ---------------------------------------------------------------------------------------------------------- layers

template <class T>
void rms_norm_rows(T* out, const T* x, T* residual, const T* weight, int64_t rows, int n, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > 16384)
  for (int64_t r = 0; r < rows; r++) {
    const T* xr = x + r * n;
    T* res = residual ? residual + r * n : nullptr;
    vf square = {};
    for_lanes<T>(n, [&](int i, int k) {
      vf v = get(xr + i, k);
      if (res) {
        put(res + i, v + get(res + i, k), k);
        v = get(res + i, k);                                                   // as stored: what later layers see
      }
      square += v * v;
    });
    float scale = 1.f / std::sqrt(sum(square) / n + eps);
    const T* from = res ? res : xr;
    for_lanes<T>(n, [&](int i, int k) { put(out + r * n + i, get(from + i, k) * scale * get(weight + i, k), k); });
  }
}

template <class T> void silu_mul_rows(T* out, const T* x, int64_t rows, int n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > 16384)
  for (int64_t r = 0; r < rows; r++) {
    const T *gate = x + r * 2 * n, *up = gate + n;
    for_lanes<T>(n, [&](int i, int k) {
      vf g = get(gate + i, k);
      put(out + r * n + i, g / (1.f + exp2v(g * -LOG2E)) * get(up + i, k), k);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------- shapes

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

// One head in fp32: optional RMS norm, then rotation of the two halves (cos, sin: dim/2 values each).
template <class T>
inline void norm_rotate(float* y, const T* x, const T* weight, float eps, const float* cos, const float* sin, int dim) {
  const int half = dim / 2;
  float scale = 1.f;
  if (weight) {
    vf square = {};
    for_lanes<T>(dim, [&](int i, int k) { square += get(x + i, k) * get(x + i, k); });
    scale = 1.f / std::sqrt(sum(square) / dim + eps);
  }
  for_lanes<T>(half, [&](int i, int k) {
    vf a = get(x + i, k), b = get(x + i + half, k), c = get(cos + i, k), s = get(sin + i, k);
    if (weight) a = a * scale * get(weight + i, k), b = b * scale * get(weight + i + half, k);
    put(y + i, a * c - b * s, k);
    put(y + i + half, b * c + a * s, k);
  });
}

template <class T>
void rope_store_rows(T* qkv, T* keys, T* values, const int64_t* slots, const int64_t* positions, const float* cos,
                     const float* sin, const T* q_norm, const T* k_norm, float eps, int64_t rows, const Shape& s,
                     int threads) {
  const int half = s.dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 3)
  for (int64_t r = 0; r < rows; r++) {
    float y[1024];                                                             // dim <= 1024: checked by the caller
    const float *c = cos + positions[r] * half, *n = sin + positions[r] * half;
    T* row = qkv + r * s.stride;
    for (int h = 0; h < s.heads; h++) {
      T* q = row + h * s.dim;
      norm_rotate(y, q, q_norm, eps, c, n, s.dim);
      for_lanes<T>(s.dim, [&](int i, int k) { put(q + i, load(y + i), k); });
    }
    const int32_t block = int32_t(slots[r] / s.block);
    const int token = int(slots[r] % s.block);
    for (int h = 0; h < s.kv_heads; h++) {
      const T *k = row + (s.heads + h) * s.dim, *v = k + s.kv_heads * s.dim;
      const size_t at = s.at(&block, h, token);
      norm_rotate(y, k, k_norm, eps, c, n, s.dim);
      std::fill(y + s.dim, y + s.dim16(), 0.f);                                // the padding dimensions
      write_key(keys + at, y, s, token % LANES);
      if constexpr (std::is_same_v<T, float>) {
        std::memcpy(y, v, s.dim * sizeof(float));
        write_value(values + at, y, s, token % LANES);
      } else {
        write_value(values + at, v, s, token % LANES);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- attention

inline vf dot_pair(vf c, const bf16* k, uint32_t q) {                           // c[lane] += k[lane] . q, two dims
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_loadu_si512(k), (__m512bh)_mm512_set1_epi32(int(q)));
#else
  vu w = load_as<vu>(k);
  return c + (vf)(w << 16) * widen(bf16(q)) + (vf)(w & 0xffff0000u) * widen(bf16(q >> 16));
#endif
}
inline vf dot_pair(vf c, vu w, uint32_t q) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)w, (__m512bh)_mm512_set1_epi32(int(q)));
#else
  return c + (vf)(w << 16) * widen(bf16(q)) + (vf)(w & 0xffff0000u) * widen(bf16(q >> 16));
#endif
}
template <class T> inline uint32_t pair_at(const T* p) { uint32_t w; std::memcpy(&w, p, 4); return w; }

// Scores of R query rows against N groups of keys: out[r * TILE_GROUPS + g] = 16 dot products. `next` are the groups of
// the tile after this one: blocks are scattered in pieces too short for the hardware to see a stream in.
template <int R, int N>
inline void scores(const bf16* q, size_t q_stride, const bf16* const* keys, const bf16* const* next, int dim16,
                   vf* out) {
  vf s[R][N] = {};
  for (int d = 0; d < dim16 / 2; d++) {
    for (int g = 0; g < N; g++) __builtin_prefetch(next[g] + d * 32);
    for (int r = 0; r < R; r++) {
      const uint32_t w = pair_at(q + r * q_stride + 2 * d);
      for (int g = 0; g < N; g++) s[r][g] = dot_pair(s[r][g], keys[g] + d * 32, w);
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
    for (int g = 0; g < N; g++) __builtin_prefetch(next[g] + d * 16);
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
    for (int i = 0; i < N; i++) __builtin_prefetch(next[t / LANES] + size_t(t % LANES / 2) * dim16 * 2 + i * 32);
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
      __builtin_prefetch(next[t / LANES] + size_t(t % LANES) * dim16 + i * 16);
      for (int r = 0; r < R; r++) a[r][i] += v * p[r * TILE + t];
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) store(acc + r * dim16 + i * 16, a[r][i]);
}

// The running softmax of the query rows of one work item.
template <class T> struct Rows {
  std::vector<T> q;                                                            // [rows][dim16], zero padded
  std::vector<float> acc, m, l;                                                // [rows][dim16], [rows], [rows][16]
  std::vector<int> first, limit;                                               // keys seen: first <= position < limit
  void reset(int rows, int dim16) {
    const size_t padded = (rows + 15) / 16 * 16;                               // whole tiles are read and written
    q.assign(padded * dim16, T(0));
    acc.assign(padded * dim16, 0.f);
    m.assign(rows, -1e30f);
    l.assign(size_t(rows) * LANES, 0.f);
    first.resize(rows);
    limit.resize(rows);
  }
};

// How many keys of the tile at `start` any of the rows [r0, r0 + n) sees, counted from the tile's first.
template <class T> inline int seen_in_tile(const Rows<T>& s, int r0, int n, int start, int end) {
  int low = s.first[r0], high = 0;
  for (int r = r0; r < r0 + n; r++) low = std::min(low, s.first[r]), high = std::max(high, s.limit[r]);
  high = std::min(high, end);
  return high <= start || low >= start + TILE ? 0 : std::min(TILE, high - start);
}

// Scores to weights, for n rows: dots [n][TILE] -> p [n][TILE]; fade[r] is what the sums so far are worth now.
template <class T>
inline void soften(Rows<T>& s, int r0, int n, int start, int end, int groups, float scale, const vf* dots, T* p,
                   float* fade) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int r = 0; r < n; r++) {
    const int limit = std::min(s.limit[r0 + r], end) - start, first = s.first[r0 + r] - start;
    vf score[TILE_GROUPS], top = splat(-1e30f);
    for (int g = 0; g < groups; g++) {
      vi at = lane + g * LANES;
      score[g] = (at < limit) & (at >= first) ? dots[r * TILE_GROUPS + g] * scale : splat(-1e30f);
      top = vmax(top, score[g]);
    }
    const float old = s.m[r0 + r], m = std::max(old, largest(top));
    fade[r] = exp2v(splat(old - m))[0];
    s.m[r0 + r] = m;
    vf total = load(s.l.data() + size_t(r0 + r) * LANES) * fade[r];
    rounded(total);
    const float above = std::max(m, -1e29f);                                   // hidden keys weigh 0, also when all are
    for (int g = 0; g < groups; g++) {
      vf e = exp2v(score[g] - above);
      total += e;
      store(p + r * TILE + g * LANES, e);
    }
    store(s.l.data() + size_t(r0 + r) * LANES, total);
  }
}

inline void fade_rows(float* acc, int n, int dim16, const float* fade) {
  for (int r = 0; r < n; r++)
    for (int d = 0; d < dim16; d += LANES) store(acc + r * dim16 + d, load(acc + r * dim16 + d) * fade[r]);
  __asm__ volatile("" ::: "memory");                                           // as rounded() does
}

// Where the four groups of a tile of 64 keys are.
template <class T> struct Tile { const T *keys[TILE_GROUPS], *values[TILE_GROUPS]; };

// One tile of at most 64 keys starting at `start`, for rows [r0, r0 + R).
template <class T, int R>
inline void tile_step(Rows<T>& s, int r0, int start, int end, const Tile<T>& tile, const Tile<T>& next, int dim16,
                      float scale) {
  const int count = seen_in_tile(s, r0, R, start, end), groups = (count + LANES - 1) / LANES;
  if (count == 0) return;
  vf dots[R][TILE_GROUPS];
  const T* q = s.q.data() + size_t(r0) * dim16;
  if (groups == TILE_GROUPS)
    scores<R, TILE_GROUPS>(q, dim16, tile.keys, next.keys, dim16, dots[0]);
  else
    for (int g = 0; g < groups; g++) scores<R, 1>(q, dim16, tile.keys + g, next.keys + g, dim16, dots[0] + g);
  alignas(64) T p[R * TILE];
  float fade[R];
  soften(s, r0, R, start, end, groups, scale, dots[0], p, fade);
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

#if defined(GM_AMX)
// The same step for up to 16 bf16 rows at once on Intel's matrix unit: the KV layout is what its B operand wants.
// Tile registers: 0-3 sums, 4 queries [n][32 dims], 5 keys [16 pairs][16], 6 weights [n][16 keys], 7 values [8][16].
// Written as asm with a memory clobber: GCC's intrinsics do not tell the optimizer which memory they read.
#define TILE_LOAD(t, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void*)(p)), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void*)(p)), "r"(int64_t(stride)) : "memory")
#define TILE_DOT(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

struct alignas(64) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* TILEDATA */) == 0;
  return allowed;
}
void amx_configure(int n) {
  TileConfig c{};
  c.palette = 1;
  for (int t = 0; t < 8; t++) c.rows[t] = n, c.row_bytes[t] = 64;
  c.rows[5] = 16, c.rows[7] = 8, c.row_bytes[6] = 32;
  __asm__ volatile("ldtilecfg %0" ::"m"(c));
}
// oneDNN remembers per thread which configuration it loaded last: whoever changes it puts it back.
struct AmxGuard {
  TileConfig saved;
  bool on;
  explicit AmxGuard(bool wanted) : saved{}, on(wanted) {
    if (on) __asm__ volatile("sttilecfg %0" : "=m"(saved));
  }
  ~AmxGuard() {
    if (!on) return;
    if (saved.palette) __asm__ volatile("ldtilecfg %0" ::"m"(saved));
    else __asm__ volatile("tilerelease" ::);
  }
};

inline void fetch(const bf16* p, int lines) {
  for (int i = 0; i < lines; i++) __builtin_prefetch(p + i * 32);
}

inline void tile_step_amx(Rows<bf16>& s, int r0, int n, int start, int end, const Tile<bf16>& tile,
                          const Tile<bf16>& next, int dim16, float scale) {
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
  soften(s, r0, n, start, end, groups, scale, dots, p, fade);
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
#endif

struct Item { int32_t row, count, position, table, begin, end, part; };         // see attention/native_backend.py
struct Merge { int32_t row, part, parts; };

template <class T> struct Call {
  const T *qkv, *keys, *values;
  T* out;
  const int32_t* tables;
  float* scratch;                                                              // [parts][heads][dim16 + 2]
  int table_width, window;
  float scale;
  Shape s;
  bool uniform;                                                                // few rows as many would be computed
};

#if defined(GM_AMX)
template <class T> inline bool use_amx(const Call<T>& c) {
  return std::is_same_v<T, bf16> && c.s.dim % 32 == 0 && c.s.dim <= 256 && amx_allowed();
}
#endif

template <class T> void run_item(const Call<T>& c, const Item& it, int head, Rows<T>& rows) {
  const Shape& s = c.s;
  const int dim16 = s.dim16(), group = s.group(), n = it.count * group;
  rows.reset(n, dim16);
  for (int t = 0; t < it.count; t++)
    for (int g = 0; g < group; g++) {
      const int r = t * group + g;
      std::memcpy(rows.q.data() + size_t(r) * dim16, c.qkv + size_t(it.row + t) * s.stride + (head * group + g) * s.dim,
                  s.dim * sizeof(T));
      rows.limit[r] = it.position + t + 1;
      rows.first[r] = c.window > 0 ? std::max(0, rows.limit[r] - c.window) : 0;
    }
#if defined(GM_AMX)
  const bool amx = (n > 4 || c.uniform) && use_amx(c);                         // decode waits for memory, not for sums
  if (amx) amx_configure(std::min(n, 16));                                     // a last group of fewer rows: padding
#endif
  const int32_t* table = c.tables + size_t(it.table) * c.table_width;
  const int end = std::min<int>(it.end, it.position + it.count);
  auto tile_at = [&](int start) {
    Tile<T> tile;
    for (int g = 0; g < TILE_GROUPS; g++) {
      const size_t at = s.at(table, head, std::min(start + g * LANES, end - 1));
      tile.keys[g] = c.keys + at;
      tile.values[g] = c.values + at;
    }
    return tile;
  };
  int start = std::max<int>(it.begin, rows.first[0] / TILE * TILE);
  for (Tile<T> tile = tile_at(start), next; start < end; start += TILE, tile = next) {
    next = start + TILE < end ? tile_at(start + TILE) : tile;
    int r = 0;
#if defined(GM_AMX)
    if constexpr (std::is_same_v<T, bf16>)
      if (amx)
        for (; r < n; r += 16) tile_step_amx(rows, r, std::min(16, n - r), start, end, tile, next, dim16, c.scale);
#endif
    if constexpr (ROWS == 4) {
      for (; r + 4 <= n; r += 4) tile_step<T, 4>(rows, r, start, end, tile, next, dim16, c.scale);
      if (n - r == 3) tile_step<T, 3>(rows, r, start, end, tile, next, dim16, c.scale), r += 3;
      if (n - r == 2) tile_step<T, 2>(rows, r, start, end, tile, next, dim16, c.scale), r += 2;
    }
    for (; r < n; r++) tile_step<T, 1>(rows, r, start, end, tile, next, dim16, c.scale);
  }
  for (int t = 0; t < it.count; t++)
    for (int g = 0; g < group; g++) {
      const int r = t * group + g, h = head * group + g;
      const float l = sum(load(rows.l.data() + size_t(r) * LANES));
      const float* acc = rows.acc.data() + size_t(r) * dim16;
      if (it.part < 0) {
        T* out = c.out + (size_t(it.row + t) * s.heads + h) * s.dim;
        for_lanes<T>(s.dim, [&](int i, int k) { put(out + i, load(acc + i) / l, k); });
      } else {
        float* part = c.scratch + (size_t(it.part) * s.heads + h) * (dim16 + 2);
        part[0] = rows.m[r], part[1] = l;
        std::memcpy(part + 2, acc, dim16 * sizeof(float));
      }
    }
}

template <class T> void run_merge(const Call<T>& c, const Merge& g, int h) {
  const Shape& s = c.s;
  const size_t size = s.dim16() + 2, step = size * s.heads;
  const float* first = c.scratch + (size_t(g.part) * s.heads + h) * size;
  float m = -1e30f, l = 0;
  for (int p = 0; p < g.parts; p++) m = std::max(m, first[p * step]);
  for (int p = 0; p < g.parts; p++) l += exp2f(first[p * step] - m) * first[p * step + 1];
  T* out = c.out + (size_t(g.row) * s.heads + h) * s.dim;
  for (int d = 0; d < s.dim; d++) {
    float x = 0;
    for (int p = 0; p < g.parts; p++) x += exp2f(first[p * step] - m) * first[p * step + 2 + d];
    out[d] = narrow<T>(x / l);
  }
}

template <class T>
void attend_all(const Call<T>& c, const Item* items, int n_items, const Merge* merges, int n_merges, int threads) {
  const int n = n_items * c.s.kv_heads;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Rows<T> rows;
#if defined(GM_AMX)
    AmxGuard guard(use_amx(c));
#endif
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n; i++) run_item(c, items[i / c.s.kv_heads], i % c.s.kv_heads, rows);
#pragma omp for schedule(static)
    for (int i = 0; i < n_merges * c.s.heads; i++) run_merge(c, merges[i / c.s.heads], i % c.s.heads);
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------- what Python calls
// `wide` selects fp32 over bf16. Pointers that may be null: residual, q_norm, k_norm, merges, scratch.
extern "C" {

int gm_lanes() { return LANES; }

void gm_rms_norm(int wide, void* out, const void* x, void* residual, const void* weight, int64_t rows, int n, float eps,
                 int threads) {
  if (wide)
    rms_norm_rows((float*)out, (const float*)x, (float*)residual, (const float*)weight, rows, n, eps, threads);
  else
    rms_norm_rows((bf16*)out, (const bf16*)x, (bf16*)residual, (const bf16*)weight, rows, n, eps, threads);
}

void gm_silu_mul(int wide, void* out, const void* x, int64_t rows, int n, int threads) {
  if (wide)
    silu_mul_rows((float*)out, (const float*)x, rows, n, threads);
  else
    silu_mul_rows((bf16*)out, (const bf16*)x, rows, n, threads);
}

void gm_rope_store(int wide, void* qkv, void* keys, void* values, const int64_t* slots, const int64_t* positions,
                   const float* cos, const float* sin, const void* q_norm, const void* k_norm, float eps, int64_t rows,
                   int heads, int kv_heads, int dim, int block, int threads) {
  const Shape s{heads, kv_heads, dim, block, (heads + 2 * kv_heads) * dim};
  if (wide)
    rope_store_rows((float*)qkv, (float*)keys, (float*)values, slots, positions, cos, sin, (const float*)q_norm,
                    (const float*)k_norm, eps, rows, s, threads);
  else
    rope_store_rows((bf16*)qkv, (bf16*)keys, (bf16*)values, slots, positions, cos, sin, (const bf16*)q_norm,
                    (const bf16*)k_norm, eps, rows, s, threads);
}

void gm_attend(int wide, void* out, const void* qkv, const void* keys, const void* values, const int32_t* items,
               int n_items, const int32_t* merges, int n_merges, const int32_t* tables, int table_width, float* scratch,
               int window, float scale, int heads, int kv_heads, int dim, int block, int threads, int uniform) {
  const Shape s{heads, kv_heads, dim, block, (heads + 2 * kv_heads) * dim};
  if (wide) {
    Call<float> c{(const float*)qkv, (const float*)keys, (const float*)values, (float*)out, tables, scratch,
                  table_width, window, scale * LOG2E, s, uniform != 0};
    attend_all(c, (const Item*)items, n_items, (const Merge*)merges, n_merges, threads);
  } else {
    Call<bf16> c{(const bf16*)qkv, (const bf16*)keys, (const bf16*)values, (bf16*)out, tables, scratch,
                 table_width, window, scale * LOG2E, s, uniform != 0};
    attend_all(c, (const Item*)items, n_items, (const Merge*)merges, n_merges, threads);
  }
}

}  // extern "C"
