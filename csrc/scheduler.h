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
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "block_pool.h"
#include "cache_log.h"
#include "copies.h"
#include "host_pool.h"
#include "policy.h"
#include "prefix.h"
#include "queue.h"
#include "rates.h"
#include "request.h"
#include "sessions.h"
#include "slots.h"
#include "steps.h"
#include "types.h"

namespace tokenspeed {

struct Submission {
  RequestId id;
  double now;
  std::span<const TokenId> prompt;
  std::int32_t max_tokens;  // < 0: as many as fit
  std::int32_t min_tokens;
  std::span<const TokenId> stop_ids;
  std::span<const std::byte> salt;
  std::int32_t priority;
  bool reuse_prefix;
  std::int64_t session;  // > 0, or 0: not named, found by its prompt
  double tps_floor;      // > 0: a promise, 0: none, < 0: the policy's
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
  std::int32_t* copies;  // [C,4]
  std::int32_t* released;
  std::int64_t* bound_ids;

  std::int64_t step = 0;
  std::int32_t num_rows = 0;
  std::int32_t num_decode = 0;
  std::int32_t num_tokens = 0;
  std::int32_t num_deltas = 0;
  std::int32_t num_samples = 0;
  std::int32_t num_bound = 0;
  std::int32_t num_copies = 0;
  std::int32_t num_released = 0;

  // What the policy decided: how many prompt tokens the floor allowed in this step.
  std::int32_t allowed_prompt_tokens = 0;

  bool empty() const { return num_rows + num_bound + num_copies == 0; }
};

// Directions of a copy between the tiers, as in tokenspeed.batch.
inline constexpr std::int32_t kToHost = 0;
inline constexpr std::int32_t kToDevice = 1;

// One entry for each request that gained a token or ended in a commit. Python reads it as it lies in memory
// (tokenspeed.batch.OUTPUT_RECORD).
struct CommitOutput {
  RequestId id;
  std::int32_t sample_index;
  TokenId token;
  std::int32_t num_tokens;
  FinishReason finish;
  TokenId stop_id;
  std::int32_t cached_tokens;
};
static_assert(sizeof(CommitOutput) == 32 && std::is_trivially_copyable_v<CommitOutput>);

struct Counters {
  std::int32_t running = 0;   // Fetching, Prefilling, Decoding
  std::int32_t waiting = 0;   // Waiting
  std::int32_t draining = 0;  // Retracting, Draining
  std::int32_t blocks_free = 0;
  std::int32_t blocks_cached = 0;
  std::int32_t blocks_used = 0;
  std::int32_t host_blocks_used = 0;
  std::int32_t copies_in_flight = 0;
  std::int32_t sessions_resident = 0;
  std::int32_t sessions_waiting = 0;  // requests of sessions that are not resident
  std::int64_t waiting_uncached_tokens = 0;  // of those that wait, as they were when they were submitted
  std::int64_t preemptions = 0;
  std::int64_t prompt_tokens = 0;         // of first admissions
  std::int64_t cached_prompt_tokens = 0;  // of these, prefix hits
  std::int64_t generated_tokens = 0;
  std::int64_t blocks_offloaded = 0;  // copies to the host that were started
  std::int64_t blocks_loaded = 0;     // and back
};

// What there is of a request that has not been submitted.
struct Familiarity {
  bool session = false;     // the session that it names is known
  std::int32_t cached = 0;  // tokens of its prompt that would be prefix hits
};

// For dump(): one request in plain data.
struct RequestDump {
  RequestId id;
  std::string state;
  std::int32_t priority;
  std::uint64_t arrival;
  double rank = 0;
  std::int32_t slot = -1;
  std::int32_t known = 0;
  std::int32_t computed = 0;
  std::int32_t pending = 0;
  std::int64_t last_step = 0;
  std::vector<std::int32_t> blocks;
};

class Scheduler {
 public:
  Scheduler(const Limits& limits, const PolicySettings& policy, bool prefix_caching, HashKey key);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues a request, or says why not.
  Refusal submit(const Submission& submission);
  // After a refusal that is not the request's fault: seconds until it is worth while to ask again.
  double retry_after() const { return retry_after_; }
  // Ends a request from outside. False: there is no such request, or it has ended.
  bool abort(RequestId id);
  // A stop condition found outside after `num_tokens` generated tokens, at most as many as there are; the tokens
  // after it do not count.
  bool finish(RequestId id, std::int32_t num_tokens);
  // Plans the next step and counts it as launched. An empty plan: nothing can be done now, nothing was launched.
  Misuse plan(double now, PlanArrays& plan);
  // The oldest launched step has landed. `tokens` has one for each sample; `counts` how many of them are valid;
  // `seconds` is how long it took, 0: not measured.
  Misuse commit(std::int64_t step, std::span<const TokenId> tokens, std::span<const std::int32_t> counts,
                double seconds);
  // Copies between the tiers have ended.
  Misuse land_copies(std::span<const std::int32_t> landed, std::span<const std::int32_t> failed);
  // Frees every cached block that nobody holds, on both tiers; gives how many. Sessions keep their places.
  std::int32_t drop_cached();
  // What the last commit brought, until the next one.
  const std::vector<CommitOutput>& outputs() const { return outputs_; }

  // From now on the log has every block that can be found, or no more. False: something may be cached already.
  bool open_cache_log();
  CacheLog& cache_log() { return cache_log_; }

  // Null: no such request, or it has ended.
  const Sequence* sequence_of(RequestId id) const;
  std::optional<std::int32_t> cached_tokens(RequestId id) const;
  Counters counters() const;
  // Of a request with these prompt hashes; `session` as in Submission.
  Familiarity familiarity(std::span<const Hash> prompt, std::int64_t session) const;
  // Whether a request has not ended, or has but a launched step may still touch its memory.
  bool holds(RequestId id) const { return requests_.contains(id); }
  std::int32_t num_unfinished() const { return static_cast<std::int32_t>(requests_.size()); }
  std::int32_t max_length() const { return max_length_; }
  const StepTimeModel& step_time() const { return pace_.model; }

  // Recounts everything; the first violation in words, or nothing.
  std::optional<std::string> check() const;
  std::vector<RequestDump> dump() const;
  int in_flight() const { return steps_.in_flight(); }
  std::int64_t last_planned() const { return raw(steps_.next()) - 1; }

 private:
  // One plan in the making.
  class Writer;

  void plan_decodes(Writer& writer);
  void plan_prompts(Writer& writer);
  void plan_starts(Writer& writer);
  void plan_loads(Writer& writer);
  bool plan_offloads(Writer& writer);
  bool admit(Request& request, Writer& writer);
  bool has_room_for(const Request& request, const Sequence& sequence, Writer& writer);
  void fetch(Request& request, Waiting& state);
  void bind(Request& request, Prefilling&& admitted, Writer& writer);
  bool compute_prompt(Request& request, Writer& writer);
  std::optional<FreeBlock> block_for(Request& needy, Writer& writer);
  void preempt(Request& request);
  void settle_sessions(double now);
  Request* next_that_fits();
  bool breaks_a_promise(double floor, std::int32_t known) const;
  std::optional<double> wait_for_room(double now) const;
  void depart(Request& request, std::int32_t known);
  void leave_queue(Request& request);
  void enqueue(Request& request);

  // These return true when the request has ended and holds nothing any more.
  bool land(Request& request, const LandedStep& step, const Row& row, TokenId token);
  template <class Event>
  bool end(Request& request);
  bool drain(Request& request, Draining&& draining);

  template <class State>
  std::optional<Ending> take_row(Request& request, State& state, const LandedStep& step, const Row& row, TokenId token);
  void retract(Request& request, Retracting&& retracting);
  void stop_running(Request& request, const Fetching&);
  void stop_running(Request& request, const Prefilling&);
  void stop_running(Request& request, const Decoding&);
  Request* find(RequestId id) const;

  std::optional<std::string> check_requests() const;
  std::optional<std::string> check_lists() const;
  std::optional<std::string> check_blocks() const;
  std::optional<std::string> check_sessions() const;

  const Limits limits_;
  const PolicySettings policy_;
  const std::int32_t max_length_;
  const std::optional<ChainHasher> hasher_;
  CacheLog cache_log_;
  BlockPool pool_;
  HostPool host_;
  SlotPool slots_;
  StepLedger steps_;
  // Destroyed before the pools: the states give back what they hold.
  CopyLedger copies_;
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests_;
  Sessions sessions_;
  WaitingQueue ready_;    // of resident sessions, or of none
  WaitingQueue outside_;  // of sessions that are not resident
  RunningList running_;
  std::vector<Request*> fetching_;
  std::vector<Request*> prefilling_;  // in the order of goes_before when a plan begins
  Pace pace_;
  std::int32_t num_draining_ = 0;
  Promises promises_;
  std::uint64_t arrivals_ = 0;
  std::uint64_t admissions_ = 0;
  double now_;
  double retry_after_ = 0;
  double next_turnover_;  // when sessions may next give way to one that has waited too long
  double last_launch_;    // when a step was last launched
  Rate departures_;    // since there is something to do
  Rate settlements_;  // since somebody waits outside

  // The head of the queue did not fit when the pools had these gains: no need to look again before they have more.
  struct Blocked {
    std::uint64_t arrival = UINT64_MAX;
    std::uint64_t gains = 0;
    std::int32_t running = 0;
  } blocked_;
  std::uint64_t looked_outside_ = UINT64_MAX;  // at these gains of the sessions nobody who waits outside fitted
  std::int32_t wanted_free_ = 0;  // blocks that the head of the queue would have free, for the offloads
  PrefixMatch match_;
  std::vector<CommitOutput> outputs_;
  Counters counters_;
};

}  // namespace tokenspeed
