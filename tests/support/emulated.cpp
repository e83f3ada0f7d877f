// The native kernels for a CPU that is emulated: reads calls off stdin, answers with the buffers as they are afterwards.
// A call: function, number of arguments; each argument a kind and a value; a buffer's value is its size, then its bytes.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include "kernels.cpp"
#include "sampling.cpp"

namespace {

constexpr int64_t BUFFER = 2;                                                  // 0: an integer, 1: a double

struct Argument {
  int64_t kind, value;
  std::shared_ptr<char> bytes;
};

void take(void* to, size_t size) {
  if (size && fread(to, 1, size, stdin) != size) exit(0);                      // the test has ended
}
Argument argument() {
  Argument a;
  take(&a.kind, 16);
  if (a.kind != BUFFER || a.value == 0) return a;
  a.bytes.reset((char*)aligned_alloc(64, (a.value + 63) / 64 * 64), free);
  take(a.bytes.get(), a.value);
  return a;
}

}  // namespace

int main() {
  for (;;) {
    int64_t head[2];
    take(head, sizeof head);
    std::vector<Argument> a;
    for (int64_t i = 0; i < head[1]; i++) a.push_back(argument());
    auto n = [&](int i) { return a[i].value; };
    auto f = [&](int i) { double x; std::memcpy(&x, &a[i].value, 8); return float(x); };
    auto p = [&](int i) { return (void*)a[i].bytes.get(); };
    auto scale = [&](int i) { return (float*)p(i); };
    if (head[0] == 0) gm_rms_norm(n(0), p(1), p(2), p(3), p(4), n(5), n(6), f(7), 1);
    if (head[0] == 1) gm_silu_mul(n(0), p(1), p(2), n(3), n(4), 1);
    if (head[0] == 2) {
      const auto longs = [&](int i) { return (const int64_t*)p(i); };
      const auto ints = [&](int i) { return (const int32_t*)p(i); };
      gm_attend(n(0), p(1), p(2), p(3), p(4), longs(5), longs(6), scale(7), scale(8), p(9), p(10), f(11), n(12), ints(13),
                ints(14), n(15), ints(16), n(17), ints(18), n(19), scale(20), n(21), f(22), f(23), scale(24), n(25), n(26),
                n(27), n(28), 1, n(30), scale(31), scale(32));
    }
    if (head[0] == 3) {                                                        // its first argument: all rows' logits
      std::vector<const void*> rows;
      const char* at = (const char*)p(0);
      for (int64_t r = 0; r < n(2); r++) rows.push_back(at), at += n(3) * (((uint8_t*)p(1))[r] ? 4 : 2);
      gm_sample(rows.data(), (uint8_t*)p(1), n(2), n(3), (double*)p(4), (int64_t*)p(5), (uint32_t*)p(6), (int64_t*)p(7), 1);
    }
    for (const Argument& each : a)
      if (each.kind == BUFFER && each.value) fwrite(each.bytes.get(), 1, each.value, stdout);
    fflush(stdout);
  }
}
