// Which kernels this processor runs.
#include <cstdlib>
#include <cstring>
#include <string>

#include "job.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fabric {
namespace {

#if defined(__x86_64__)
bool RunsAvx2() {
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;  // not every compiler knows f16c by name
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool RunsAvxVnni() {
  // Not every compiler's __builtin_cpu_supports knows this name. AVX2 covers the system's part.
  unsigned eax = 0, ebx, ecx, edx;
  if (!RunsAvx2() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  return (eax >> 4) & 1;
}

bool RunsAvx512Vnni() {
  return RunsAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool RunsNeonDot() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}
#endif

bool Runs(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512vnni")) return RunsAvx512Vnni();
  if (!std::strcmp(name, "avxvnni")) return RunsAvxVnni();
  if (!std::strcmp(name, "avx2")) return RunsAvx2();
#elif defined(__aarch64__)
  if (!std::strcmp(name, "neon")) return RunsNeonDot();
#endif
  return !std::strcmp(name, "portable");
}

const Kernels* Choose(std::string* error) {
  // Fastest first.
  const Kernels* const all[] = {Avx512VnniKernels(), AvxVnniKernels(), Avx2Kernels(),
                                NeonDotKernels(), PortableKernels()};
  const char* wanted = std::getenv("FABRIC_KERNELS_ISA");
  std::string known;
  for (const Kernels* kernels : all) {
    if (kernels == nullptr) continue;
    const bool runs = Runs(kernels->name);
    if (wanted == nullptr || *wanted == 0) {
      if (runs) return kernels;
      continue;
    }
    if (!std::strcmp(wanted, kernels->name) && runs) return kernels;
    if (runs) known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  *error = "FABRIC_KERNELS_ISA=" + std::string(wanted ? wanted : "") +
           " is not available; expected one of " + known;
  return nullptr;
}

}  // namespace

const Kernels* SelectKernels(const char** error) {
  static std::string message;
  static const Kernels* const chosen = Choose(&message);
  if (chosen == nullptr) *error = message.c_str();
  return chosen;
}

}  // namespace fabric
