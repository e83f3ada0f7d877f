// Gristmill's CPU kernels as Python calls them: norm, activation, rotary embedding with KV write, paged attention.
//
// Plain C functions over raw pointers: no torch headers, so that a build takes seconds on first use. One compilation of
// all the headers here (build.py), each with one job; vectors.h says what a row is, kv_layout.h where the cache's are.
//
// `wide` selects fp32 over bf16; `kind` (kv_bytes.h) how keys and values are kept. Pointers that may be null: residual,
// q_norm, k_norm, merges, scratch, slopes, and scales where keys and values are plain.
#include "attention.h"
#include "layers.h"

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

// New rows' keys are turned and stored with their values, and queries turned where they are; then all attend.
void gm_attend(int wide, void* out, void* qkv, void* keys, void* values, const int64_t* slots, const int64_t* positions,
               const float* cos, const float* sin, const void* q_norm, const void* k_norm, float eps, int64_t rows,
               const int32_t* queries, const int32_t* items, int n_items, const int32_t* merges, int n_merges,
               const int32_t* tables, int table_width, float* scratch, int window, float scale, float cap,
               const float* slopes, int heads, int kv_heads, int dim, int block, int threads, int kind,
               float* key_scales, float* value_scales) {
  const Scoring how{scale, cap, slopes, kind != PLAIN};
  const Packed packed{kind, (uint8_t*)keys, (uint8_t*)values, key_scales, value_scales};
  const Shape s{heads, kv_heads, dim, block, (heads + 2 * kv_heads) * dim};
  auto run = [&](auto number) {
    using T = decltype(number);
    const NewRows<T> fresh{(T*)qkv, (T*)keys, (T*)values, slots, positions, cos, sin, (const T*)q_norm,
                           (const T*)k_norm, eps, rows};
    const Call<T> c{(const T*)qkv, (const T*)keys, (const T*)values, packed, (T*)out, tables, scratch,
                    table_width, window, how, s};
    const Work work{(const Query*)queries, (const Item*)items, (const Merge*)merges, n_items, n_merges};
    attend_all(fresh, c, work, threads);
  };
  wide ? run(float()) : run(bf16());
}

}  // extern "C"
