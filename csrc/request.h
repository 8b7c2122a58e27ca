// The states of a request, each a move-only type that owns exactly what the request may use in it.
//
//   state       owns                                      leaves by
//   Waiting     tokens and their block hashes             Admit → Prefilling; Finish, Abort → Finished
//   Prefilling  + slot, block table                       Compute → Prefilling or Decoding; Preempt → Retracting;
//                                                         Finish, Abort → Draining
//   Decoding    + slot, block table                       Preempt → Retracting; Finish, Abort → Draining
//   Retracting  + slot, block table, last launched step   Land → Waiting; Finish, Abort → Draining
//   Draining    slot, block table, last launched step     Land → Finished
//   Finished    nothing
//
// Events that keep the state take it by reference: Grow and Compute (Decoding); Fill (Prefilling, Decoding,
// Retracting); Append (Decoding, Retracting).
//
// Members are private and the transitions are the only friends, so nothing leaves a state but by an event, and a
// slot or block that a launched step may still touch leaves only Draining or Retracting, by a landing that covers
// that step. There is no overload for any other pair of state and event, so it does not compile. What types cannot
// see: an id from outside, which is looked up once at the door of the scheduler.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>

#include "block_table.h"
#include "sequence.h"
#include "slots.h"
#include "steps.h"
#include "types.h"

namespace tokenspeed {

class Waiting;
class Prefilling;
class Decoding;
class Retracting;
class Draining;
class Finished;

// --- events ---

// A waiting request gets a slot, and a table that holds its prefix hits and room for all its known tokens.
struct Admit {
  Slot slot;
  BlockTable table;
  std::int32_t num_hits;  // blocks
};
// A launched step computes the next `count` positions.
struct Compute {
  StepId step;
  std::int32_t count;
};
// A decoding request that has filled its blocks gets one more.
struct Grow {
  FreeBlock block;
};
// A launched step has landed: the positions of its row lie in the cache.
struct Fill {
  Filled filled;
};
// A landed step has sampled a token.
struct Append {
  TokenId token;
};
// The request must give its memory to an older one, and compute again later.
struct Preempt {};
// The request has ended: a stop condition was met, here or outside.
struct Finish {};
// The caller no longer wants the request.
struct Abort {};
// Steps have landed.
struct Land {
  Landed landed;
};

// --- states ---

// What a request holds on the device.
class Residence {
 public:
  SlotId slot() const { return slot_.id(); }
  const BlockTable& table() const { return table_; }
  StepId last_step() const { return last_step_; }

 protected:
  Residence(Slot&& slot, BlockTable&& table)
      : slot_(std::move(slot)), table_(std::move(table)), last_step_(StepLedger::kNever) {}
  Residence(Residence&&) noexcept = default;
  Residence& operator=(Residence&&) = delete;
  ~Residence() = default;

  Slot slot_;
  BlockTable table_;
  StepId last_step_;
};

// A request with tokens and a residence. It has known tokens, `pending` more that launched steps will sample,
// and `computed` positions, those of launched steps included.
class Running : public Residence {
 public:
  const Sequence& sequence() const { return *sequence_; }
  std::int32_t computed() const { return computed_; }
  std::int32_t pending() const { return pending_; }

 protected:
  Running(std::unique_ptr<Sequence>&& sequence, Slot&& slot, BlockTable&& table, std::int32_t computed)
      : Residence(std::move(slot), std::move(table)), sequence_(std::move(sequence)), computed_(computed) {}
  Running(Running&&) noexcept = default;
  ~Running() = default;

  void compute(Compute event) {
    last_step_ = event.step;
    computed_ += event.count;
  }
  void fill(Fill event) {
    if (!sequence_->hashes().empty()) table_.seal(event.filled, sequence_->hashes());
  }
  std::optional<Ending> append(Append event) {
    --pending_;
    return sequence_->append(event.token);
  }

  std::unique_ptr<Sequence> sequence_;
  std::int32_t computed_;
  std::int32_t pending_ = 0;
};

class [[nodiscard]] Waiting {
 public:
  explicit Waiting(std::unique_ptr<Sequence> sequence) : sequence_(std::move(sequence)) {}
  Waiting(Waiting&&) noexcept = default;
  const Sequence& sequence() const { return *sequence_; }

 private:
  friend Prefilling on(Waiting&&, Admit);
  friend Finished on(Waiting&&, Finish);
  friend Finished on(Waiting&&, Abort);
  std::unique_ptr<Sequence> sequence_;
};

class [[nodiscard]] Prefilling : public Running {
 public:
  Prefilling(Prefilling&&) noexcept = default;
  std::int32_t remaining() const { return sequence_->known() - computed_; }

 private:
  Prefilling(std::unique_ptr<Sequence>&& sequence, Slot&& slot, BlockTable&& table, std::int32_t computed)
      : Running(std::move(sequence), std::move(slot), std::move(table), computed) {}
  friend Prefilling on(Waiting&&, Admit);
  friend std::variant<Prefilling, Decoding> on(Prefilling&&, Compute);
  friend void on(Prefilling&, Fill);
  friend Retracting on(Prefilling&&, Preempt);
  friend Draining on(Prefilling&&, Finish);
  friend Draining on(Prefilling&&, Abort);
};

class [[nodiscard]] Decoding : public Running {
 public:
  Decoding(Decoding&&) noexcept = default;
  // The next row's input token, if the host knows it already.
  TokenId next_input() const { return pending_ == 0 ? sequence_->tokens().back() : kOnDevice; }
  // False when the steps in flight will bring the sequence to its greatest length.
  bool wants_token() const { return sequence_->known() + pending_ < sequence_->max_length(); }

 private:
  explicit Decoding(Running&& running) : Running(std::move(running)) {}
  friend std::variant<Prefilling, Decoding> on(Prefilling&&, Compute);
  friend void on(Decoding&, Grow);
  friend void on(Decoding&, Compute);
  friend void on(Decoding&, Fill);
  friend std::optional<Ending> on(Decoding&, Append);
  friend Retracting on(Decoding&&, Preempt);
  friend Draining on(Decoding&&, Finish);
  friend Draining on(Decoding&&, Abort);
};

class [[nodiscard]] Retracting : public Running {
 public:
  Retracting(Retracting&&) noexcept = default;

 private:
  explicit Retracting(Running&& running) : Running(std::move(running)) {}
  friend Retracting on(Prefilling&&, Preempt);
  friend Retracting on(Decoding&&, Preempt);
  friend void on(Retracting&, Fill);
  friend std::optional<Ending> on(Retracting&, Append);
  friend std::variant<Retracting, Waiting> on(Retracting&&, Land);
  friend Draining on(Retracting&&, Finish);
  friend Draining on(Retracting&&, Abort);
};

class [[nodiscard]] Draining : public Residence {
 public:
  Draining(Draining&&) noexcept = default;

 private:
  explicit Draining(Residence&& residence) : Residence(std::move(residence)) {}
  friend Draining on(Prefilling&&, Finish);
  friend Draining on(Prefilling&&, Abort);
  friend Draining on(Decoding&&, Finish);
  friend Draining on(Decoding&&, Abort);
  friend Draining on(Retracting&&, Finish);
  friend Draining on(Retracting&&, Abort);
  friend std::variant<Draining, Finished> on(Draining&&, Land);
};

class [[nodiscard]] Finished {
 public:
  Finished(Finished&&) noexcept = default;

 private:
  Finished() = default;
  friend Finished on(Waiting&&, Finish);
  friend Finished on(Waiting&&, Abort);
  friend std::variant<Draining, Finished> on(Draining&&, Land);
};

using RequestState = std::variant<Waiting, Prefilling, Decoding, Retracting, Draining, Finished>;

// One request: who it is, its place in the scheduler's lists, and its state.
struct Request {
  Request(RequestId id, std::int32_t priority, std::uint64_t arrival, Waiting&& waiting)
      : id(id), priority(priority), arrival(arrival), state(std::move(waiting)) {}

  const RequestId id;
  const std::int32_t priority;  // lower goes first
  const std::uint64_t arrival;
  std::uint64_t admission = 0;      // order among the running ones
  std::int32_t cached_tokens = -1;  // prompt tokens that were hits when it was first admitted, −1: not yet
  std::int32_t queue_place = -1;    // in the waiting queue, −1: not in it
  Request* previous = nullptr;      // in the running list
  Request* next = nullptr;
  RequestState state;
};

}  // namespace tokenspeed
