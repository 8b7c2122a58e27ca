// Which steps are launched and which have landed, and the proofs that only a landing gives.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "step_time.h"
#include "types.h"

namespace tokenspeed {

struct Request;

// One row of a launched step.
struct Row {
  Request* request;
  std::int32_t computed;      // positions computed before this row
  std::int32_t count;         // positions that this row computes
  std::int32_t sample_index;  // its place among the step's samples, −1: it samples nothing
};

// Proof that the first `num_tokens` positions of a request lie in the KV cache. Only a landed step gives it.
class Filled {
 public:
  std::int32_t num_tokens() const { return num_tokens_; }

 private:
  friend class LandedStep;
  explicit Filled(std::int32_t num_tokens) : num_tokens_(num_tokens) {}
  std::int32_t num_tokens_;
};

// Proof of how far the device has come: every step up to `last` has landed.
class Landed {
 public:
  bool covers(StepId step) const { return raw(step) <= raw(last_); }

 private:
  friend class StepLedger;
  explicit Landed(StepId last) : last_(last) {}
  StepId last_;
};

// The step that has just landed. Valid until the next step is planned.
class LandedStep {
 public:
  const std::vector<Row>& rows() const { return rows_; }
  Filled filled(const Row& row) const { return Filled(row.computed + row.count); }

 private:
  friend class StepLedger;
  explicit LandedStep(const std::vector<Row>& rows) : rows_(rows) {}
  const std::vector<Row>& rows_;
};

class StepLedger {
 public:
  static constexpr int kMaxInFlight = 2;

  // Step numbers start at 1; no request has ever been touched by step 0.
  static constexpr StepId kNever{0};

  StepId next() const { return StepId{launched_ + 1}; }
  StepId oldest_in_flight() const { return StepId{landed_ + 1}; }
  int in_flight() const { return static_cast<int>(launched_ - landed_); }
  Landed landed() const { return Landed(StepId{landed_}); }

  // Where the rows of the next step are collected; `launch` makes it a launched step.
  std::vector<Row>& begin() {
    std::vector<Row>& rows = rows_of(launched_ + 1);
    rows.clear();
    return rows;
  }
  StepId launch(const Work& work) {
    work_of(launched_ + 1) = work;
    return StepId{++launched_};
  }
  // The rows of the oldest launched step, which must exist.
  const std::vector<Row>& oldest_rows() const { return rows_of(landed_ + 1); }
  const Work& oldest_work() const { return work_[static_cast<std::size_t>(landed_ + 1) % work_.size()]; }
  template <class Visit>
  void for_each_in_flight(Visit visit) const {
    for (std::int64_t step = landed_ + 1; step <= launched_; ++step) {
      for (const Row& row : rows_of(step)) visit(row);
    }
  }
  LandedStep land() { return LandedStep(rows_of(++landed_)); }

 private:
  std::vector<Row>& rows_of(std::int64_t step) { return rows_[static_cast<std::size_t>(step) % rows_.size()]; }

  const std::vector<Row>& rows_of(std::int64_t step) const { return rows_[static_cast<std::size_t>(step) % rows_.size()]; }

  Work& work_of(std::int64_t step) { return work_[static_cast<std::size_t>(step) % work_.size()]; }

  std::array<std::vector<Row>, kMaxInFlight + 1> rows_;
  std::array<Work, kMaxInFlight + 1> work_;
  std::int64_t launched_ = 0;
  std::int64_t landed_ = 0;
};

}  // namespace tokenspeed
