#include "includes.h"

namespace fabric {
namespace {
#include "isa_portable.h"
#include "kernels_impl.h"
constexpr Kernels kTable = MakeTable("portable");
}  // namespace
const Kernels* PortableKernels() { return &kTable; }
}  // namespace fabric
