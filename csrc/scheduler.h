// The control plane: which request computes how many tokens in the next step, in which blocks of the KV cache.
//
// A deterministic state machine: the same calls give the same plans on every rank. No clock, no I/O, no threads.
// One call at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_pool.h"
#include "policy.h"
#include "queue.h"
#include "request.h"
#include "slots.h"
#include "steps.h"
#include "types.h"

namespace tokenspeed {

struct Submission {
  RequestId id;
  std::span<const TokenId> prompt;
  std::int32_t max_tokens;  // < 0: as many as fit
  std::int32_t min_tokens;
  std::span<const TokenId> stop_ids;
  std::span<const std::byte> salt;
  std::int32_t priority;
  bool reuse_prefix;
};

// The arrays of tokenspeed.batch.PlanBuffers, filled in place, and how much of each is filled.
struct PlanArrays {
  std::int32_t* row_slot;
  std::int32_t* row_new;
  std::int32_t* row_computed;
  std::int32_t* token_ids;
  std::int32_t* table_delta;  // [D,3]
  std::int32_t* sample_rows;
  std::int32_t* bound;  // [B,2]
  std::int32_t* released;
  std::int64_t* bound_ids;

  std::int64_t step = 0;
  std::int32_t num_rows = 0;
  std::int32_t num_decode = 0;
  std::int32_t num_tokens = 0;
  std::int32_t num_deltas = 0;
  std::int32_t num_samples = 0;
  std::int32_t num_bound = 0;
  std::int32_t num_released = 0;
};

// One entry for each request that gained a token or ended in a commit.
struct CommitOutput {
  RequestId id;
  std::int32_t sample_index;
  TokenId token;
  std::int32_t num_tokens;
  FinishReason finish;
  TokenId stop_id;
  std::int32_t cached_tokens;
};

struct Counters {
  std::int32_t running = 0;   // Prefilling, Decoding
  std::int32_t waiting = 0;   // Waiting
  std::int32_t draining = 0;  // Retracting, Draining
  std::int32_t blocks_free = 0;
  std::int32_t blocks_cached = 0;
  std::int32_t blocks_used = 0;
  std::int64_t preemptions = 0;
  std::int64_t prompt_tokens = 0;         // of first admissions
  std::int64_t cached_prompt_tokens = 0;  // of these, prefix hits
  std::int64_t generated_tokens = 0;
};

// For dump(): one request in plain data.
struct RequestDump {
  RequestId id;
  std::string state;
  std::int32_t priority;
  std::uint64_t arrival;
  std::int32_t slot = -1;
  std::int32_t known = 0;
  std::int32_t computed = 0;
  std::int32_t pending = 0;
  std::int64_t last_step = 0;
  std::vector<std::int32_t> blocks;
};

class Scheduler {
 public:
  Scheduler(const Limits& limits, bool prefix_caching, HashKey key);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues a request, or says why not.
  Refusal submit(const Submission& submission);
  // Ends a request from outside. False: there is no such request, or it has ended.
  bool abort(RequestId id);
  // A stop condition found outside after `num_tokens` generated tokens, at most as many as there are; the tokens
  // after it do not count.
  bool finish(RequestId id, std::int32_t num_tokens);
  // Plans the next step and counts it as launched. No rows in `plan`: nothing can be computed now.
  Misuse plan(double now, PlanArrays& plan);
  // The oldest launched step has landed. `tokens` has one for each sample; `counts` how many of them are valid.
  Misuse commit(std::int64_t step, std::span<const TokenId> tokens, std::span<const std::int32_t> counts);
  // What the last commit brought, until the next one.
  const std::vector<CommitOutput>& outputs() const { return outputs_; }

  // Null: no such request, or it has ended.
  const Sequence* sequence_of(RequestId id) const;
  std::optional<std::int32_t> cached_tokens(RequestId id) const;
  Counters counters() const;
  // Whether a request has not ended, or has but a launched step may still touch its memory.
  bool holds(RequestId id) const { return requests_.contains(id); }
  std::int32_t num_unfinished() const { return static_cast<std::int32_t>(requests_.size()); }
  std::int32_t max_length() const { return max_length_; }

  // Recounts everything; the first violation in words, or nothing.
  std::optional<std::string> check() const;
  std::vector<RequestDump> dump() const;
  int in_flight() const { return steps_.in_flight(); }
  std::int64_t last_planned() const { return raw(steps_.next()) - 1; }

 private:
  // One plan in the making.
  class Writer;

  void plan_decodes(Writer& writer);
  void plan_prefills(Writer& writer);
  void plan_admissions(Writer& writer);
  bool admit(Request& request, Writer& writer);
  void compute_prefill(Request& request, Writer& writer);
  std::optional<FreeBlock> block_for(Request& needy, Writer& writer);
  void preempt(Request& request);

  // These return true when the request has ended and holds nothing any more.
  bool land(Request& request, const LandedStep& step, const Row& row, TokenId token);
  template <class Event>
  bool end(Request& request);
  bool drain(Request& request, Draining&& draining);

  template <class State>
  std::optional<Ending> take_row(Request& request, State& state, const LandedStep& step, const Row& row, TokenId token);
  void retract(Request& request, Retracting&& retracting);
  void stop_running(Request& request, const Prefilling&);
  void stop_running(Request& request, const Decoding&);
  Request* find(RequestId id) const;

  std::optional<std::string> check_requests() const;
  std::optional<std::string> check_lists() const;
  std::optional<std::string> check_blocks() const;

  const Limits limits_;
  const std::int32_t max_length_;
  const std::optional<ChainHasher> hasher_;
  BlockPool pool_;
  SlotPool slots_;
  StepLedger steps_;
  // Destroyed before the pools: the states give back what they hold.
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests_;
  WaitingQueue waiting_;
  RunningList running_;
  std::int32_t num_prefilling_ = 0;
  std::int32_t num_draining_ = 0;
  std::uint64_t arrivals_ = 0;
  std::uint64_t admissions_ = 0;
  double now_;

  // The head of the queue did not fit when the pool had this many gains: no need to look again before it has more.
  struct Blocked {
    std::uint64_t arrival = UINT64_MAX;
    std::uint64_t gains = 0;
    std::int32_t running = 0;
  } blocked_;
  PrefixMatch match_;
  std::vector<CommitOutput> outputs_;
  Counters counters_;
};

}  // namespace tokenspeed
