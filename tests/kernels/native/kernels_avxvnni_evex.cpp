// The AVX-VNNI kernels with the instruction as AVX512VL encodes it, for processors that have only
// that one: all the rest of the code is the same.
#include "includes.h"

#if defined(__x86_64__)
FABRIC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
namespace fabric {
namespace {
#define FABRIC_VPDPBUSD "vpdpbusd"
#include "isa_avxvnni.h"
#include "kernels_impl.h"
constexpr Kernels kTable = MakeTable("avxvnni-evex");
}  // namespace
const Kernels* AvxVnniEvexKernels() { return &kTable; }
}  // namespace fabric
FABRIC_TARGET_END
#else
namespace fabric {
const Kernels* AvxVnniEvexKernels() { return nullptr; }
}  // namespace fabric
#endif
