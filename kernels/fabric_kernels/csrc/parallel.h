// Work shared between the calling thread and XLA's own pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace fabric {

// Runs body(i) for i in [0, count). The caller takes part and returns when every claimed item is
// done, so that a pool whose threads are all busy (or waiting in calls like this one) costs speed
// and never a deadlock. Which thread runs an item does not influence the result.
template <class Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    int64_t count;
    const Body* body;  // alive until done == count; nothing is claimed after that
  };
  auto shared = std::make_shared<Shared>();
  shared->count = count;
  shared->body = &body;
  const auto work = [shared] {
    for (;;) {
      const int64_t i = shared->next.fetch_add(1, std::memory_order_relaxed);
      if (i >= shared->count) return;
      (*shared->body)(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace fabric
