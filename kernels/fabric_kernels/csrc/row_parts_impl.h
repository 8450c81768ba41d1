// In which order the products of few rows read a matrix: kRowParts rows at a time, one of each
// quarter. Prefetchers follow each of four streams that are far from each other, where rows side by
// side are but one to them: memory is read a third faster.
// Included once for each instruction set, after prepare_impl.h.
#pragma once

// Asked for ahead of its use, of each stream: four times this and the digits of a row stay in the
// first level of the cache.
constexpr int64_t kAhead = 2048;

// Rows of one part. The last part has what is left of the matrix, or none.
inline int64_t PartRows(const Matrix& matrix) {
  return RoundUp(CeilDiv(matrix.rows, kRowParts), kLanes);
}

// Rows of each part in one piece of work: about 128 KB of all four, so that the pause between two
// pieces counts little, but a quarter of a part at most, so that threads share small matrices.
inline int64_t FewRowsUnit(const Matrix& matrix) {
  constexpr int64_t kBytes = (128 << 10) / kRowParts;
  const int64_t rows = kBytes / std::clamp<int64_t>(matrix.row_bytes, 1, kBytes);
  return RoundUp(std::min(rows, CeilDiv(PartRows(matrix), 4)), kLanes);
}

inline int64_t FewRowsUnits(const Matrix& matrix) {
  return CeilDiv(PartRows(matrix), FewRowsUnit(matrix));
}

FewRowsRange RangeOf(const Job& job, int64_t unit) {
  for (int g = 0;; ++g) {
    const Matrix& matrix = job.matrix[g];
    const int64_t units = FewRowsUnits(matrix);
    if (unit >= units) {
      unit -= units;
      continue;
    }
    const int64_t size = FewRowsUnit(matrix), part = PartRows(matrix);
    return {g, unit * size, std::min(part, (unit + 1) * size), part, matrix.rows};
  }
}

// One row of each part. Whole vectors of them may be read: what follows a row in its last vector
// meets digits that are zero.
class RowsInFlight {
 public:
  const uint8_t* at[kRowParts];
  int64_t ahead = kAhead;  // what to ask for meanwhile, in bytes from `at`

  RowsInFlight(const Job& job, const FewRowsRange& range)
      : matrix_(job.matrix[range.group]),
        vectors_(RowChunks(job) * kVecBytes),
        part_(range.part),
        row_(range.begin) {
    const int64_t spare = matrix_.rows * matrix_.row_bytes - vectors_;
    // Without bytes there is nothing to read beyond.
    whole_ = vectors_ == 0 ? matrix_.rows : spare < 0 ? 0 : spare / matrix_.row_bytes + 1;
    if (range.group + 1 < job.groups) {
      // After a part comes the same part of the next matrix.
      const Matrix& next = job.matrix[range.group + 1];
      if (next.rows == matrix_.rows) across_ += next.bytes - At(part_);
    }
    for (int i = 0; i < kRowParts; ++i) at[i] = At(Row(i));
    Check();
  }

  void Advance() {
    for (auto& row : at) row += matrix_.row_bytes;
    ++row_;
    Check();
  }

 private:
  int64_t Row(int part) const { return part * part_ + row_; }
  const uint8_t* At(int64_t row) const { return matrix_.bytes + row * matrix_.row_bytes; }

  void Check() {
    if ((part_ - row_) * matrix_.row_bytes <= kAhead) ahead = across_;
    if (Row(kRowParts - 1) >= whole_) KeepWithin();
  }

  // Rows whose last vector reaches beyond the matrix are copied. Where a part has no such row, its
  // place is taken by the matrix's last.
  void KeepWithin() {
    uint8_t* copies = ThreadScratch(Slot::kTail, size_t(kRowParts * vectors_));
    for (int i = 0; i < kRowParts; ++i) {
      const int64_t row = std::min(Row(i), matrix_.rows - 1);
      at[i] = At(row);
      if (row < whole_) continue;
      uint8_t* copy = copies + i * vectors_;
      std::memcpy(copy, at[i], size_t(matrix_.row_bytes));
      std::memset(copy + matrix_.row_bytes, 0, size_t(vectors_ - matrix_.row_bytes));
      at[i] = copy;
    }
  }

  const Matrix& matrix_;
  const int64_t vectors_;  // bytes of the vectors of a row
  const int64_t part_;
  int64_t row_;
  int64_t whole_;  // rows whose vectors end within the matrix
  int64_t across_ = kAhead;
};
