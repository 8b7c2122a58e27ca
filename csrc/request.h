// The states of a request, each a move-only type that owns exactly what the request may use in it. The table of
// legal pairs of state and event is transitions.inc; docs/states.md draws it.
//
//   state       owns
//   Waiting     tokens and their block hashes
//   Fetching    + slot, the blocks of its prefix as they arrive from the host, room for the others
//   Prefilling  + slot, block table
//   Decoding    + slot, block table
//   Retracting  + slot, block table, last launched step
//   Draining    slot, block table, last launched step
//   Finished    nothing
//
// Events that keep the state take it by reference.
//
// Members are private and the transitions are the only friends, so nothing leaves a state but by an event, and a
// slot or block that a launched step may still touch leaves only Draining or Retracting, by a landing that covers
// that step. There is no overload for any other pair of state and event, so it does not compile. What types cannot
// see: an id from outside, which is looked up once at the door of the scheduler.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "block_table.h"
#include "copies.h"
#include "policy.h"
#include "sequence.h"
#include "slots.h"
#include "steps.h"
#include "types.h"

namespace tokenspeed {

class Waiting;
class Fetching;
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
// A block of the prefix of a fetching request: here, on the host, on its way under a ticket, or lost.
struct Lost {};
using PrefixBlock = std::variant<SealedBlock, HostBlock, TicketId, Lost>;
// A waiting request whose prefix lies partly on the host gets a slot, and room for all blocks that are not here.
struct Fetch {
  Slot slot;
  std::vector<PrefixBlock> prefix;
  std::vector<FreeBlock> room;
  BlockTable table;  // empty
};
// One block of the prefix leaves the host: it takes one of the request's free blocks along.
struct Send {
  std::int32_t place;
};
// The copy is under way under this ticket.
struct Await {
  std::int32_t place;
  TicketId ticket;
};
// A block of the prefix is here.
struct Arrive {
  std::int32_t place;
  SealedBlock block;
};
// A block of the prefix will not come; what was to hold it is room again.
struct Lose {
  std::int32_t place;
  std::optional<FreeBlock> room;
};
// It would begin with what has arrived, if nothing is on its way any more.
struct Start {};
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
    if (!sequence_->hashes().empty()) table_.seal(event.filled, *sequence_);
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
  friend Fetching on(Waiting&&, Fetch);
  friend Finished on(Waiting&&, Finish);
  friend Finished on(Waiting&&, Abort);
  std::unique_ptr<Sequence> sequence_;
};

// No launched step touches it, so it can leave at any time; copies that are under way then land for nobody.
class [[nodiscard]] Fetching {
 public:
  Fetching(Fetching&&) noexcept = default;
  // The tail first: see BlockTable.
  ~Fetching() {
    while (!prefix_.empty()) prefix_.pop_back();
  }
  const Sequence& sequence() const { return *sequence_; }
  SlotId slot() const { return slot_.id(); }
  std::span<const PrefixBlock> prefix() const { return prefix_; }
  std::span<const FreeBlock> room() const { return room_; }
  // Blocks before this one are sent, here or lost.
  std::int32_t next_to_send() const { return next_to_send_; }
  bool complete() const { return num_here_or_lost_ == prefix_.size(); }

 private:
  Fetching(std::unique_ptr<Sequence>&& sequence, Fetch&& event)
      : sequence_(std::move(sequence)),
        slot_(std::move(event.slot)),
        prefix_(std::move(event.prefix)),
        room_(std::move(event.room)),
        table_(std::move(event.table)) {
    for (const PrefixBlock& block : prefix_) num_here_or_lost_ += std::holds_alternative<SealedBlock>(block);
    skip_sent();
  }
  friend Fetching on(Waiting&&, Fetch);
  friend LoadingBlock on(Fetching&, Send);
  friend void on(Fetching&, Await);
  friend void on(Fetching&, Arrive);
  friend void on(Fetching&, Lose);
  friend std::variant<Fetching, Prefilling, Waiting> on(Fetching&&, Start);
  friend Waiting on(Fetching&&, Preempt);
  friend Finished on(Fetching&&, Finish);
  friend Finished on(Fetching&&, Abort);

  PrefixBlock& at(std::int32_t place) { return prefix_[static_cast<std::size_t>(place)]; }
  void skip_sent() {
    while (static_cast<std::size_t>(next_to_send_) < prefix_.size() &&
           !std::holds_alternative<HostBlock>(at(next_to_send_))) {
      ++next_to_send_;
    }
  }

  std::unique_ptr<Sequence> sequence_;
  Slot slot_;
  std::vector<PrefixBlock> prefix_;
  std::vector<FreeBlock> room_;
  BlockTable table_;
  std::size_t num_here_or_lost_ = 0;
  std::int32_t next_to_send_ = 0;
};

class [[nodiscard]] Prefilling : public Running {
 public:
  Prefilling(Prefilling&&) noexcept = default;
  std::int32_t remaining() const { return sequence_->known() - computed_; }

 private:
  Prefilling(std::unique_ptr<Sequence>&& sequence, Slot&& slot, BlockTable&& table, std::int32_t computed)
      : Running(std::move(sequence), std::move(slot), std::move(table), computed) {}
  friend Prefilling on(Waiting&&, Admit);
  friend std::variant<Fetching, Prefilling, Waiting> on(Fetching&&, Start);
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
  friend Finished on(Fetching&&, Finish);
  friend Finished on(Fetching&&, Abort);
  friend std::variant<Draining, Finished> on(Draining&&, Land);
};

using RequestState = std::variant<Waiting, Fetching, Prefilling, Decoding, Retracting, Draining, Finished>;

struct Session;

// One request: who it is, its place in the scheduler's lists, and its state.
struct Request {
  const RequestId id;
  const Order order;
  const double floor;    // tokens per second, 0: none
  const bool promised;   // the floor is a promise
  const double arrived;  // seconds, on the clock of the plans
  const double patience;  // seconds that a token of it may be overtaken
  std::int32_t uncached;  // tokens, when it was submitted
  Session* session;       // null: none, or it has left it
  RequestState state;

  double rank = 0;                  // among those that wait or prefill: the lowest goes first
  std::uint64_t admission = 0;      // order among the running ones
  std::int32_t cached_tokens = -1;  // prompt tokens that were hits when it was first admitted, −1: not yet
  std::int32_t queue_place = -1;    // in a waiting queue, −1: not in one
  bool outside = false;             // in the queue of those whose session is not resident
  Request* previous = nullptr;      // in the running list
  Request* next = nullptr;

  void rank_by(std::int32_t tokens) { rank = arrived + patience * tokens; }
};

}  // namespace tokenspeed
