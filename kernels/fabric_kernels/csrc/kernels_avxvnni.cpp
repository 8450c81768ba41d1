#include "includes.h"

// The first compilers that know the instruction.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
FABRIC_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace fabric {
namespace {
#include "isa_avxvnni.h"
#include "kernels_impl.h"
constexpr Kernels kTable = MakeTable("avxvnni");
}  // namespace
const Kernels* AvxVnniKernels() { return &kTable; }
}  // namespace fabric
FABRIC_TARGET_END
#else
namespace fabric {
const Kernels* AvxVnniKernels() { return nullptr; }
}  // namespace fabric
#endif
