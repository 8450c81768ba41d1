#include "includes.h"

#if defined(__x86_64__)
FABRIC_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
namespace fabric {
namespace {
#include "isa_avx512.h"
#include "kernels_impl.h"
constexpr Kernels kTable = MakeTable("avx512vnni");
}  // namespace
const Kernels* Avx512VnniKernels() { return &kTable; }
}  // namespace fabric
FABRIC_TARGET_END
#else
namespace fabric {
const Kernels* Avx512VnniKernels() { return nullptr; }
}  // namespace fabric
#endif
