// Intel's matrix unit: its instructions, its configuration, and who may use it.
#pragma once
#include <cstdint>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define GM_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

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

}  // namespace
#endif
