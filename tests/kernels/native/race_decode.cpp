// A step of decoding by one to five threads at once: for ThreadSanitizer, and equal bits.
// Prints the number of steps, or what differs.
#include <cstdio>
#include <cstring>
#include <mutex>

#include "decode_problem.h"
#include "phases.h"

namespace {

using namespace fabric;

// Threads that are started for what they do, and joined when the pool ends.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}
  ~Pool() {
    for (std::thread& thread : started_) thread.join();
  }
  int64_t num_threads() const { return threads_; }
  void Schedule(std::function<void()> task) { started_.emplace_back(std::move(task)); }

 private:
  const int threads_;
  std::vector<std::thread> started_;
};

std::vector<float> Step(const DecodeShape& shape, int threads) {
  // Destroyed last: a thread may come when all is done and gone, and must touch nothing of it.
  Pool pool(threads);
  Random random;
  DecodeProblem problem(random, shape);
  std::vector<float> shared(size_t(DecodeStep::SharedFloats(problem.job)), kUnwritten);
  const DecodeStep step(*PortableKernels(), problem.job, shared.data());
  Phases<DecodeStep>::Run(pool, step.Counts(), step);
  return problem.h;
}

}  // namespace

int main() {
  const DecodeShape shape = {Format::kTernary2, Gate::kSilu, CacheType::kInt8, true, 2, 3,
                             600,               3,           2,                20,   700, 9};
  const std::vector<float> alone = Step(shape, 1);
  int steps = 0;
  for (int threads = 2; threads <= 5; ++threads) {
    for (int repeat = 0; repeat < 5; ++repeat, ++steps) {
      const std::vector<float> h = Step(shape, threads);
      if (!std::memcmp(h.data(), alone.data(), h.size() * sizeof(float))) continue;
      std::printf("%d threads: other bits than one\n", threads);
      return 1;
    }
  }
  std::printf("%d steps\n", steps);
  return 0;
}
