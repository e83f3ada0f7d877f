// RMS norm and the gated activation, row by row.
#pragma once
#include "vectors.h"

namespace {

template <class T> inline void rms_norm_row(T* out, const T* x, T* residual, const T* weight, int n, float eps) {
  vf square = {};
  for_lanes<T>(n, [&](int i, int k) {
    vf v = get(x + i, k);
    if (residual) {
      put(residual + i, v + get(residual + i, k), k);
      v = get(residual + i, k);                                                // as stored: what later layers see
    }
    square += v * v;
  });
  float scale = 1.f / std::sqrt(sum(square) / n + eps);
  const T* from = residual ? residual : x;
  for_lanes<T>(n, [&](int i, int k) { put(out + i, get(from + i, k) * scale * get(weight + i, k), k); });
}

template <class T>
void rms_norm_rows(T* out, const T* x, T* residual, const T* weight, int64_t rows, int n, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > 16384)
  for (int64_t r = 0; r < rows; r++)
    rms_norm_row(out + r * n, x + r * n, residual ? residual + r * n : nullptr, weight, n, eps);
}

template <class T> void silu_mul_rows(T* out, const T* x, int64_t rows, int n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > 16384)
  for (int64_t r = 0; r < rows; r++) {
    const T *gate = x + r * 2 * n, *up = gate + n;
    for_lanes<T>(n, [&](int i, int k) {
      put(out + r * n + i, silu(get(gate + i, k)) * get(up + i, k), k);
    });
  }
}

}  // namespace
