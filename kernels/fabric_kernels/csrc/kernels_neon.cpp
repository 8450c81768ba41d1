#include "includes.h"

#if defined(__aarch64__)
#if defined(__clang__)
FABRIC_TARGET_BEGIN("dotprod")
#else
FABRIC_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
namespace fabric {
namespace {
#include "isa_neon.h"
#include "kernels_impl.h"
constexpr Kernels kTable = MakeTable("neon");
}  // namespace
const Kernels* NeonDotKernels() { return &kTable; }
}  // namespace fabric
FABRIC_TARGET_END
#else
namespace fabric {
const Kernels* NeonDotKernels() { return nullptr; }
}  // namespace fabric
#endif
