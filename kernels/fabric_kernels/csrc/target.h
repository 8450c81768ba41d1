// Regions of a file that are compiled for an instruction set that the rest of the library does not
// assume. Standard headers must be included before a region opens: what they define inline would
// otherwise be compiled for it too, and the linker could choose that copy for everybody.
#pragma once

#define FABRIC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FABRIC_TARGET_BEGIN(isa) \
  FABRIC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FABRIC_TARGET_END FABRIC_PRAGMA(clang attribute pop)
#else
#define FABRIC_TARGET_BEGIN(isa) \
  FABRIC_PRAGMA(GCC push_options) FABRIC_PRAGMA(GCC target(isa))
#define FABRIC_TARGET_END FABRIC_PRAGMA(GCC pop_options)
#endif
