// Gristmill's CPU sampler: the next token of each row of logits, as sampler.py defines it, without writing anything
// of the size of the vocabulary. A plain C function over raw pointers, like kernels.cpp.
//
// The noise of a token is a hash (noise.py), cheap enough to make for every token sixteen at a time; the two logarithms
// that turn it into Gumbel noise are taken only where an upper bound says that the token could still win.
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr double GREEDY_BELOW = 1e-5;
constexpr double FIRST_REACH = 4.0;      // candidates within e^-4 of the best, at first
constexpr double LAST_REACH = 64.0;      // beyond this: every token
constexpr int ADD_UP_EVERY = 64;         // vectors summed in float before they join the double

// Sixteen logits from `i` on; past the end there is minus infinity.
template <class T> inline vf take(const T* row, int i, int vocab) {
  if (i + LANES <= vocab) return load(row + i);
  vf v = splat(-std::numeric_limits<float>::infinity());
  for (int j = 0; i + j < vocab; j++) v[j] = widen(row[i + j]);
  return v;
}
inline bool any(vi mask) {
  typedef int64_t vq __attribute__((vector_size(64)));
  vq q = (vq)mask;
  int64_t all = 0;
  for (int j = 0; j < 8; j++) all |= q[j];
  return all != 0;
}
inline vf vexp(vf x) {                    // e^x for x <= 0, relative error about 1e-7; 0 below -87
  vi tiny = x < splat(-87.f);
  x = x * 1.44269504089f;
  x = x > splat(-126.f) ? x : splat(-126.f);
  const vf magic = splat(12582912.f);     // adding 1.5 * 2^23 rounds to integer
  vf n = (x + magic) - magic, f = (x - n) * 0.69314718056f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  vf y = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
  return tiny ? vf{} : y;
}

template <class U> inline U fmix32(U x) {  // murmur3's finaliser
  x ^= x >> 16; x *= 0x85EBCA6Bu;
  x ^= x >> 13; x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}
template <class U> inline U noise_bits(U token, uint32_t low, uint32_t high) {
  return fmix32(fmix32((token * 0x9E3779B1u) ^ low) ^ high);
}
inline double gumbel(uint32_t bits) { return -std::log(-std::log((bits + 0.5) * 0x1p-32)); }

// Never below gumbel(bits): -log(1 - u) with log2 from below, as the line through each power of two.
inline vf gumbel_bound(vu bits) {
  vf w = __builtin_convertvector(~bits, vf) + 0.5f;
  vf log2w = __builtin_convertvector((vi)w, vf) * 0x1p-23f - 127.f;
  return (32.f - log2w) * 0.69314719f;
}

struct Candidate { float logit; int32_t id; };

// Candidates, put in order from the front as far as somebody looks: largest first, the lower id among equals.
struct Ranking {
  std::vector<Candidate> all;
  int64_t ranked = 0;

  void clear() { all.clear(); ranked = 0; }
  const Candidate& at(int64_t i) { rank(i + 1); return all[i]; }
  void rank(int64_t count) {
    if (count <= ranked) return;
    auto before = [](const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; };
    const int64_t upto = std::min(int64_t(all.size()), std::max({count, 2 * ranked, int64_t(64)}));
    if (upto < int64_t(all.size())) std::nth_element(all.begin() + ranked, all.begin() + upto, all.end(), before);
    std::sort(all.begin() + ranked, all.begin() + upto, before);
    ranked = upto;
  }
};

template <class T> struct Row {
  const T* logits;
  int vocab;
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  uint32_t low, high;

  double scaled(float x) const { return double(x) / temperature; }
  double score(float x, int id) const { return scaled(x) + gumbel(noise_bits(uint32_t(id), low, high)); }

  // The largest logit, its lowest id in `id`; false unless it is a number.
  bool best(float& top, int& id) const {
    vf m = splat(-std::numeric_limits<float>::infinity());
    vi bad = vi{};
    for (int i = 0; i < vocab; i += LANES) {
      vf v = take(logits, i, vocab);
      bad |= v != v;
      m = v > m ? v : m;
    }
    top = m[0];
    for (int j = 1; j < LANES; j++) top = std::max(top, m[j]);
    if (any(bad) || !std::isfinite(top)) return false;
    for (int i = 0; i < vocab; i += LANES)
      if (any(take(logits, i, vocab) == splat(top)))
        for (int j = i; j < std::min(i + LANES, vocab); j++)
          if (widen(logits[j]) == top) { id = j; return true; }
    return false;
  }

  int sample() const {
    float top;
    int id = 0;
    if (!best(top, id)) return -1;
    if (temperature < GREEDY_BELOW) return id;
    return top_k > 0 || top_p < 1.0 || min_p > 0.0 ? among_filtered(top) : among_all(top, id);
  }

  // The winner of the whole row. `id` holds the largest logit: a good first score to beat.
  int among_all(float top, int id) const {
    double lead = score(top, id);
    const float inverse = float(1.0 / temperature);
    vu tokens;
    for (int j = 0; j < LANES; j++) tokens[j] = j;
    for (int i = 0; i < vocab; i += LANES, tokens += LANES) {
      vf z = take(logits, i, vocab) * inverse;
      vf size = z < vf{} ? -z : z;
      vf bound = z + gumbel_bound(noise_bits(tokens, low, high)) + size * 1e-6f + 1e-3f;    // and the rounding
      if (!any(bound > splat(float(lead)))) continue;
      for (int j = 0; j < LANES && i + j < vocab; j++) {
        if (!(bound[j] > float(lead))) continue;
        double mine = score(widen(logits[i + j]), i + j);
        if (mine > lead) { lead = mine; id = i + j; }
      }
    }
    return id;
  }

  // The winner of those that pass the filters. Looks only as far down from the best as it has to.
  int among_filtered(float top) const {
    const bool limited = top_k > 0 && top_k < vocab;
    const double total = top_p < 1.0 && !limited ? mass(top) : 0.0;
    Ranking found;
    for (double reach = FIRST_REACH;; reach *= 2) {
      const float cut = reach > LAST_REACH ? -std::numeric_limits<float>::infinity() : float(top - reach * temperature);
      collect(cut, found);
      int64_t pass = passing(found, top, total, limited, cut);
      if (pass >= 0) return winner(found, pass);
    }
  }

  // Sum of e^(z - best z) over the row.
  double mass(float top) const {
    const float inverse = float(1.0 / temperature);
    double total = 0;
    for (int i = 0; i < vocab;) {
      vf part = vf{};
      for (int k = 0; k < ADD_UP_EVERY && i < vocab; k++, i += LANES)
        part += vexp((take(logits, i, vocab) - splat(top)) * inverse);
      for (int j = 0; j < LANES; j++) total += part[j];
    }
    return total;
  }

  // Every token whose logit is at least `cut`.
  void collect(float cut, Ranking& found) const {
    found.clear();
    for (int i = 0; i < vocab; i += LANES) {
      if (!any(take(logits, i, vocab) >= splat(cut))) continue;
      for (int j = i; j < std::min(i + LANES, vocab); j++)
        if (float x = widen(logits[j]); x >= cut) found.all.push_back({x, j});
    }
  }

  // How many of `found` pass; they are moved to its front. -1 if that cannot be told without those below `cut`.
  int64_t passing(Ranking& found, float top, double total, bool limited, float cut) const {
    const int64_t size = int64_t(found.all.size());
    const bool whole = std::isinf(cut);
    const double z0 = scaled(top);
    const double least = min_p > 0.0 ? z0 + std::log(min_p) : -std::numeric_limits<double>::infinity();
    bool known = whole || scaled(cut) <= least;          // nothing below `cut` passes min_p
    int64_t pass = size;
    if (limited && top_k > size && !whole && (top_p < 1.0 || !known)) return -1;
    if (limited && top_k <= size) {
      pass = top_k;
      known = true;
      found.rank(pass);
    }
    if (top_p < 1.0) {
      auto weight = [&](int64_t i) { return std::exp(scaled(found.at(i).logit) - z0); };
      if (limited) {
        total = 0;
        for (int64_t i = 0; i < pass; i++) total += weight(i);
      }
      double before = 0;
      for (int64_t i = 0; i < pass; i++) {
        if (!(before < top_p * total)) { pass = i; known = true; break; }
        before += weight(i);
      }
    }
    if (min_p > 0.0) {
      auto end = std::partition(found.all.begin(), found.all.begin() + pass,
                                [&](const Candidate& c) { return scaled(c.logit) >= least; });
      if (int64_t left = end - found.all.begin(); left < pass) { pass = left; known = true; }
    }
    return known ? pass : -1;
  }

  int winner(const Ranking& found, int64_t pass) const {
    double lead = -std::numeric_limits<double>::infinity();
    int id = found.all[0].id;
    for (int64_t i = 0; i < pass; i++) {
      const Candidate& one = found.all[i];
      double mine = score(one.logit, one.id);
      if (mine > lead) { lead = mine; id = one.id; }
    }
    return id;
  }
};

template <class T>
int sample_row(const void* logits, int vocab, const double* knobs, int64_t top_k, const uint32_t* key) {
  return Row<T>{static_cast<const T*>(logits), vocab, knobs[0], top_k, knobs[1], knobs[2], key[0], key[1]}.sample();
}

}  // namespace

// logits [rows]: where each row begins, float if `wide`, else bf16. knobs [rows, 3]: temperature (below 1e-5: greedy),
// top_p, min_p. keys [rows, 2]. tokens [rows] is written: the next token, or -1 where the logits are not numbers.
extern "C" void gm_sample(const void* const* logits, const uint8_t* wide, int64_t rows, int vocab, const double* knobs,
                          const int64_t* top_k, const uint32_t* keys, int64_t* tokens, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows > 1)
  for (int64_t r = 0; r < rows; r++) {
    auto sample = wide[r] ? sample_row<float> : sample_row<bf16>;
    tokens[r] = sample(logits[r], vocab, knobs + 3 * r, top_k[r], keys + 2 * r);
  }
}
