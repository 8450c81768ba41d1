// What the checks found.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "job.h"
#include "random.h"

// Half a unit in the last place of a float near one.
constexpr double kHalfUlp = 1.0 / (1 << 24);

// Error of a sum of `terms` rounded products whose magnitudes sum up to `magnitude`.
inline double SumError(int64_t terms, double magnitude) {
  return double(terms + 8) * kHalfUlp * magnitude;
}

class Report {
 public:
  // Integers, and floats that are rounded in a defined order, are the same on every machine:
  // FNV-1a over them, every NaN counting as the same.
  void Digest(uint32_t word) { digest_ = (digest_ ^ word) * 1099511628211u; }
  void Digest(float number) {
    uint32_t bits = 0x7fc00000;
    if (!std::isnan(number)) std::memcpy(&bits, &number, 4);
    Digest(bits);
  }

  // Names the problem that the next results belong to.
  void Begin(std::string problem) { problem_ = std::move(problem); }

  void Expect(bool good, const char* what, int64_t row, int64_t column, double found,
              double expected) {
    ++results_;
    if (good || ++failures_ > 20) return;
    std::printf("%s %s: [%lld, %lld] is %.9g, expected %.9g\n", problem_.c_str(), what,
                static_cast<long long>(row), static_cast<long long>(column), found, expected);
  }

  int64_t failures() const { return failures_; }
  int64_t results() const { return results_; }
  uint64_t digest() const { return digest_; }

 private:
  std::string problem_;
  uint64_t digest_ = 14695981039346656037u;
  int64_t failures_ = 0;
  int64_t results_ = 0;
};

void CheckTernary(const fabric::Kernels& kernels, Random& random, Report& report);
void CheckOuter(const fabric::Kernels& kernels, Random& random, Report& report);
void CheckTable(const fabric::Kernels& kernels, Random& random, Report& report);
void CheckAttention(const fabric::Kernels& kernels, Random& random, Report& report);
void CheckDecode(const fabric::Kernels& kernels, Report& report);
