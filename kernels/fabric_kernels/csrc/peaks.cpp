// How fast this machine computes and reads at most, measured without XLA on threads of our own.
#include "peaks.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "job.h"

namespace fabric {
namespace {

using Clock = std::chrono::steady_clock;

// Calls work(thread), which says how much it did, over and over on every thread until `seconds`
// have passed; returns what was done a second.
template <class Work>
double Rate(int threads, double seconds, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<double> rate{0};
  const auto run = [&](int thread) {
    // Together, so that none computes while others are being started.
    ready.fetch_add(1);
    while (ready.load() < threads) std::this_thread::yield();
    const auto start = Clock::now();
    int64_t done = 0;
    double spent = 0;
    do {
      done += work(thread);
      spent = std::chrono::duration<double>(Clock::now() - start).count();
    } while (spent < seconds);
    double sum = rate.load();
    while (!rate.compare_exchange_weak(sum, sum + double(done) / spent)) {
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  return rate.load();
}

}  // namespace
}  // namespace fabric

#pragma GCC visibility push(default)

// 8-bit operations (two a multiplication with addition) a second of the dot-product instruction;
// negative if no kernels run here.
extern "C" double FabricPeakDot(int threads, double seconds) {
  const char* error = nullptr;
  const fabric::Kernels* kernels = fabric::SelectKernels(&error);
  if (kernels == nullptr || threads < 1) return -1;
  std::vector<int8_t> operands(256);
  for (size_t i = 0; i < operands.size(); ++i) operands[i] = int8_t(37 * i);
  std::atomic<int32_t> sink{0};
  constexpr int64_t kSteps = 1 << 14;
  return fabric::Rate(threads, seconds, [&](int) {
    sink.fetch_add(kernels->peaks->dot(kSteps, operands.data()), std::memory_order_relaxed);
    return kSteps * kernels->peaks->dot_operations;
  });
}

// Bytes a second read from `buffer`, a share of it by each thread; negative if no kernels run here
// or a share is less than a piece.
extern "C" double FabricPeakRead(const uint8_t* buffer, int64_t bytes, int threads, double seconds,
                                 int streams, int64_t ahead) {
  constexpr int64_t kPiece = 1 << 20;
  const char* error = nullptr;
  const fabric::Kernels* kernels = fabric::SelectKernels(&error);
  if (kernels == nullptr || threads < 1) return -1;
  const int64_t pieces = bytes / threads / kPiece;
  if (pieces < 1 || (streams != 1 && streams != 4)) return -1;
  std::atomic<int32_t> sink{0};
  std::vector<int64_t> next(size_t(threads) * 8);  // each in a cache line of its own
  return fabric::Rate(threads, seconds, [&](int thread) {
    int64_t& piece = next[size_t(thread) * 8];
    const uint8_t* from = buffer + (thread * pieces + piece) * kPiece;
    piece = (piece + 1) % pieces;
    sink.fetch_add(kernels->peaks->read(from, kPiece, streams == 4, ahead),
                   std::memory_order_relaxed);
    return kPiece;
  });
}

#pragma GCC visibility pop
