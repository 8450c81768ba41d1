// Random numbers for the checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

// What outputs hold beforehand, so that what is not written is seen.
constexpr float kUnwritten = 1.5e38f;

// Numbers that are the same on every machine.
class Random {
 public:
  int64_t Below(int64_t n) { return int64_t(engine_() % uint64_t(n)); }
  // Of magnitudes up to one, most of them far smaller.
  float Float() {
    const float sign = Below(2) ? 1.0f : -1.0f;
    const float fraction = float(Below(1 << 20)) / float(1 << 20);
    return std::ldexp(sign * fraction, -int(Below(12)));
  }
  std::vector<float> Floats(int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = Float();
    return x;
  }

 private:
  std::mt19937 engine_{7};
};
