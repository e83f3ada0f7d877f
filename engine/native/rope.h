// Rotary embedding, with a norm before it where the model has one; keys and values go into the cache.
#pragma once
#include "kv_bytes.h"

namespace {

// One head in fp32: optional RMS norm, then rotation of the two halves (cos, sin: dim/2 values each);
// of an odd number the last stays as it is.
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
  if (dim % 2) y[dim - 1] = widen(x[dim - 1]) * scale * (weight ? widen(weight[dim - 1]) : 1.f);
}

// One token's key, ready in y, and its value. Bytes come from numbers of type T, as those would have been stored.
template <class T>
inline void pack_token(const Packed& to, float* y, const T* v, const Shape& s, size_t at, size_t scale_at, int lane) {
  const int dim16 = s.dim16();
  alignas(64) uint8_t codes[1024];
  for (int i = 0; i < dim16; i += LANES) {
    T t[LANES];
    store(t, load(y + i));
    store(y + i, load(t));
  }
  to.key_scales[scale_at] = pack_row(to.kind, codes, y, dim16);
  for (int d = 0; d < dim16; d++) to.keys[at + d * LANES + lane] = codes[d];
  for_lanes<T>(s.dim, [&](int i, int k) { store(y + i, get(v + i, k)); });
  to.value_scales[scale_at] = pack_row(to.kind, codes, y, dim16);
  std::memcpy(to.values + at + size_t(lane) * dim16, codes, dim16);
}

// What a step's new rows need before anybody attends to them.
template <class T> struct NewRows {
  T *qkv, *keys, *values;
  const int64_t *slots, *positions;
  const float *cos, *sin;
  const T *q_norm, *k_norm;                                                    // or null
  float eps;
  int64_t count;
};

template <class T> void rope_store_row(const NewRows<T>& rows, int64_t r, const Shape& s, const Packed& packed) {
  const int half = s.dim / 2;
  float y[1024];                                                               // dim <= 1024: checked by the caller
  const float *c = rows.cos + rows.positions[r] * half, *n = rows.sin + rows.positions[r] * half;
  T* row = rows.qkv + r * s.stride;
  for (int h = 0; h < s.heads; h++) {
    T* q = row + h * s.dim;
    norm_rotate(y, q, rows.q_norm, rows.eps, c, n, s.dim);
    for_lanes<T>(s.dim, [&](int i, int k) { put(q + i, load(y + i), k); });
  }
  const int32_t block = int32_t(rows.slots[r] / s.block);
  const int token = int(rows.slots[r] % s.block);
  for (int h = 0; h < s.kv_heads; h++) {
    const T *k = row + (s.heads + h) * s.dim, *v = k + s.kv_heads * s.dim;
    const size_t at = s.at(&block, h, token);
    norm_rotate(y, k, rows.k_norm, rows.eps, c, n, s.dim);
    std::fill(y + s.dim, y + s.dim16(), 0.f);                                  // the padding dimensions
    if (packed.kind) {
      pack_token<T>(packed, y, v, s, at, Packed::scale_at(s, &block, h, token), token % LANES);
      continue;
    }
    write_key(rows.keys + at, y, s, token % LANES);
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(y, v, s.dim * sizeof(float));
      write_value(rows.values + at, y, s, token % LANES);
    } else {
      write_value(rows.values + at, v, s, token % LANES);
    }
  }
}

}  // namespace
