// Work in phases, each of which needs all of the one before, shared by threads that stay for all.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "includes.h"

namespace fabric {

// Tells the processor that this thread waits for another.
inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs body.Run(phase, item, local) for items [0, counts[phase]) of each phase in turn; `local` is
// a thread's own Body::Local. Items are claimed, so that the work is done by whichever threads come:
// the caller alone if need be, which returns when all is done. A thread's items follow one another
// as long as it has some of its own; then it takes of the others'. Which thread runs an item does
// not influence the result.
//
// body.Enter(phase, local) comes before a thread's first item of a phase, and may run while items of
// the phase before do; body.Ahead(phase, item, local) after it, if they still do: the time to ask
// for what the item will read of memory. body.Begin(phase, local) is called when they are done.
template <class Body>
class Phases {
 public:
  // The calling thread takes part; `pool` has others.
  template <class Pool>
  static void Run(Pool& pool, std::vector<int64_t> counts, const Body& body) {
    if (counts.empty()) return;
    const int64_t most = *std::max_element(counts.begin(), counts.end());
    const int threads = int(std::clamp<int64_t>(pool.num_threads(), 1, std::max<int64_t>(1, most)));
    const std::shared_ptr<Phases> phases(new Phases(std::move(counts), threads, body));
    for (int i = 1; i < threads; ++i) {
      pool.Schedule(std::function<void()>([phases] { phases->Work(); }));
    }
    phases->Work();
    phases->Wait(phases->size() - 1);
  }

 private:
  static constexpr int kSpins = 2000;  // before the processor is left to others
  static constexpr int kLanes = 16;    // shares of a phase, at most

  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  Phases(std::vector<int64_t> counts, int threads, const Body& body)
      : counts_(std::move(counts)),
        lanes_(std::min(threads, kLanes)),
        body_(&body),
        claimed_(counts_.size() * size_t(lanes_)),
        done_(counts_.size()) {}

  int size() const { return int(counts_.size()); }
  int64_t LaneBegin(int phase, int lane) const { return counts_[size_t(phase)] * lane / lanes_; }

  // An item of the thread's own lane, or of another; -1 if all are claimed.
  int64_t Claim(int phase, int lane) {
    for (int i = 0; i < lanes_; ++i, lane = lane + 1 == lanes_ ? 0 : lane + 1) {
      const int64_t begin = LaneBegin(phase, lane), count = LaneBegin(phase, lane + 1) - begin;
      std::atomic<int64_t>& claimed = claimed_[size_t(phase * lanes_ + lane)].value;
      if (claimed.load(std::memory_order_relaxed) >= count) continue;
      const int64_t item = claimed.fetch_add(1, std::memory_order_relaxed);
      if (item < count) return begin + item;
    }
    return -1;
  }

  bool Finished(int phase) const {
    return done_[size_t(phase)].value.load(std::memory_order_acquire) >= counts_[size_t(phase)];
  }

  void Wait(int phase) const {
    for (int spins = 0; !Finished(phase); ++spins) {
      if (spins < kSpins) {
        Pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // `body_` may be gone once all items are done: it is only touched while a claimed one is not.
  void Work() {
    const int lane = arrived_.fetch_add(1, std::memory_order_relaxed) % lanes_;
    typename Body::Local local;
    // Whoever comes late begins where the others are: the phase before is done, or waited for.
    for (int phase = now_.load(std::memory_order_relaxed); phase < size(); ++phase) {
      int64_t item = Claim(phase, lane);
      if (item >= 0) body_->Enter(phase, local);
      if (phase > 0 && !Finished(phase - 1)) {
        if (item >= 0) body_->Ahead(phase, item, local);
        Wait(phase - 1);
      }
      now_.store(phase, std::memory_order_relaxed);
      if (item < 0) continue;
      body_->Begin(phase, local);
      int64_t done = 0;
      for (; item >= 0; item = Claim(phase, lane), ++done) body_->Run(phase, item, local);
      // All at once: what counts is when the last thread is done.
      done_[size_t(phase)].value.fetch_add(done, std::memory_order_acq_rel);
    }
  }

  const std::vector<int64_t> counts_;
  const int lanes_;
  const Body* const body_;
  std::vector<Counter> claimed_;
  std::vector<Counter> done_;
  std::atomic<int> arrived_{0};
  std::atomic<int> now_{0};
};

}  // namespace fabric
