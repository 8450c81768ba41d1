// Compares the kernels of one instruction set with scalar arithmetic and prints a digest of all
// results that are equal on every machine: the set that SelectKernels chooses, or `avxvnni-evex`.
// With the argument `name` it prints that set's name and does no more.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "report.h"

namespace fabric {

const Kernels* AvxVnniEvexKernels();

// Scratch that is never longer than asked for and never holds what it held before.
uint8_t* ThreadScratch(Slot slot, size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static std::unique_ptr<uint8_t, Free> buffers[static_cast<int>(Slot::kCount)];
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, bytes) != 0) std::abort();
  std::memset(fresh, 0xa5, bytes);
  buffers[static_cast<int>(slot)].reset(static_cast<uint8_t*>(fresh));
  return static_cast<uint8_t*>(fresh);
}

}  // namespace fabric

namespace {

const fabric::Kernels* Find(const char* wanted, const char** error) {
  if (std::strcmp(wanted, "avxvnni-evex")) return fabric::SelectKernels(error);
  *error = "avxvnni-evex is not available here";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) return nullptr;
#endif
  return fabric::AvxVnniEvexKernels();
}

}  // namespace

int main(int argc, char** argv) {
  const char* error = nullptr;
  const char* wanted = argc > 1 ? argv[1] : "";
  const fabric::Kernels* kernels = Find(wanted, &error);
  if (kernels == nullptr) {
    std::printf("%s\n", error);
    return 2;
  }
  if (!std::strcmp(wanted, "name")) {
    std::printf("%s\n", kernels->name);
    return 0;
  }
  Random random;
  Report report;
  CheckTernary(*kernels, random, report);
  CheckOuter(*kernels, random, report);
  CheckTable(*kernels, random, report);
  CheckAttention(*kernels, random, report);
  CheckDecode(*kernels, report);
  if (report.failures() > 0) {
    std::printf("%s: %lld of %lld results are wrong\n", kernels->name,
                static_cast<long long>(report.failures()),
                static_cast<long long>(report.results()));
    return 1;
  }
  std::printf("%s %lld %016llx\n", kernels->name, static_cast<long long>(report.results()),
              static_cast<unsigned long long>(report.digest()));
  return 0;
}
