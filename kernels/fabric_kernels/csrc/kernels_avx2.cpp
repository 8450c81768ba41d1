#include "includes.h"

#if defined(__x86_64__)
FABRIC_TARGET_BEGIN("avx2,fma,f16c")
namespace fabric {
namespace {
#include "isa_avx2.h"
#include "kernels_impl.h"
constexpr Kernels kTable = MakeTable("avx2");
}  // namespace
const Kernels* Avx2Kernels() { return &kTable; }
}  // namespace fabric
FABRIC_TARGET_END
#else
namespace fabric {
const Kernels* Avx2Kernels() { return nullptr; }
}  // namespace fabric
#endif
