// RMS norm and the gated activation, row by row.
#pragma once
#include "vectors.h"

namespace {

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

}  // namespace
