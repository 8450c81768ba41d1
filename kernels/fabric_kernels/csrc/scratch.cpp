// Memory that a thread keeps from call to call.
#include <cstdlib>
#include <memory>

#include "job.h"

namespace fabric {

uint8_t* ThreadScratch(Slot slot, size_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<uint8_t, Free> data;
    size_t size = 0;
  };
  thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data.reset();
    buffer.data.reset(static_cast<uint8_t*>(std::aligned_alloc(64, rounded)));
    buffer.size = buffer.data ? rounded : 0;
    if (!buffer.data) std::abort();
  }
  return buffer.data.get();
}

}  // namespace fabric
