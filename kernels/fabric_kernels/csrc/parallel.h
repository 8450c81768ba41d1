// Work shared between the calling thread and XLA's own pool.
#pragma once

#include <cstdint>

#include "phases.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {

// Runs body(i) for i in [0, count). The caller takes part and returns when every item is done, so
// that a pool whose threads are all busy (or waiting in calls like this one) costs speed and never
// a deadlock. A thread's items follow one another, as memory is read fastest. Which thread runs an
// item does not influence the result.
template <class Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct OnePhase {
    struct Local {};
    const Body& body;
    void Enter(int, Local&) const {}
    void Ahead(int, int64_t, const Local&) const {}
    void Begin(int, Local&) const {}
    void Run(int, int64_t item, Local&) const { body(item); }
  };
  Phases<OnePhase>::Run(pool, {count}, OnePhase{body});
}

}  // namespace fabric
