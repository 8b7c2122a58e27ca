#include "scheduler.h"

#include <algorithm>
#include <limits>

#include "transitions.h"

namespace tokenspeed {

Scheduler::Scheduler(const Limits& limits, bool prefix_caching, HashKey key)
    : limits_(limits),
      max_length_(static_cast<std::int32_t>(std::min<std::int64_t>(
          limits.max_model_len,
          static_cast<std::int64_t>(std::min(limits.num_blocks, limits.max_blocks)) * limits.block_size))),
      hasher_(prefix_caching ? std::optional<ChainHasher>(key) : std::nullopt),
      pool_(limits.num_blocks, limits.block_size),
      slots_(limits.max_rows),
      now_(-std::numeric_limits<double>::infinity()) {
  waiting_.reserve(limits.max_queued + limits.max_rows);
  outputs_.reserve(static_cast<std::size_t>(limits.max_rows));
}

Refusal Scheduler::submit(const Submission& s) {
  const auto length = static_cast<std::int64_t>(s.prompt.size());
  const auto is_bad = [](TokenId token) { return token < 0; };
  if (requests_.contains(s.id)) return Refusal::kDuplicateId;
  if (length == 0) return Refusal::kEmpty;
  if (length >= limits_.max_model_len) return Refusal::kTooLong;
  if (length >= max_length_) return Refusal::kTooLongForCache;
  if (std::ranges::any_of(s.prompt, is_bad) || std::ranges::any_of(s.stop_ids, is_bad)) return Refusal::kBadToken;
  if (waiting_.size() >= limits_.max_queued) return Refusal::kQueueFull;

  const std::int64_t wanted = s.max_tokens < 0 ? max_length_ : length + s.max_tokens;
  StopRule rule{static_cast<std::int32_t>(std::min<std::int64_t>(wanted, max_length_)), s.min_tokens,
                {s.stop_ids.begin(), s.stop_ids.end()}};
  auto sequence = std::make_unique<Sequence>(s.prompt, std::move(rule), hasher_ ? &*hasher_ : nullptr, s.salt,
                                             limits_.block_size, s.reuse_prefix);
  auto request = std::make_unique<Request>(s.id, s.priority, arrivals_++, Waiting(std::move(sequence)));
  waiting_.push(*request);
  requests_.emplace(s.id, std::move(request));
  return Refusal::kNone;
}

// --- ends ---

bool Scheduler::abort(RequestId id) {
  Request* request = find(id);
  if (!request || std::holds_alternative<Draining>(request->state)) return false;
  if (end<Abort>(*request)) requests_.erase(id);
  return true;
}

bool Scheduler::finish(RequestId id, std::int32_t num_tokens) {
  const Sequence* sequence = sequence_of(id);
  if (!sequence) return false;
  counters_.generated_tokens -= sequence->num_generated() - num_tokens;
  if (end<Finish>(*find(id))) requests_.erase(id);
  return true;
}

template <class Event>
bool Scheduler::end(Request& request) {
  return std::visit(Overloaded{
                        [&](Waiting& state) {
                          waiting_.remove(request);
                          request.state.emplace<Finished>(on(std::move(state), Event{}));
                          return true;
                        },
                        [&](Prefilling& state) {
                          stop_running(request, state);
                          return drain(request, on(std::move(state), Event{}));
                        },
                        [&](Decoding& state) {
                          stop_running(request, state);
                          return drain(request, on(std::move(state), Event{}));
                        },
                        [&](Retracting& state) { return drain(request, on(std::move(state), Event{})); },
                        [](Draining&) { return false; },
                        [](Finished&) { return true; },
                    },
                    request.state);
}

void Scheduler::stop_running(Request& request, const Prefilling&) {
  running_.remove(request);
  --num_prefilling_;
  ++num_draining_;
}

void Scheduler::stop_running(Request& request, const Decoding&) {
  running_.remove(request);
  ++num_draining_;
}

bool Scheduler::drain(Request& request, Draining&& draining) {
  auto next = on(std::move(draining), Land{steps_.landed()});
  return std::visit(Overloaded{
                        [&](Draining& state) {
                          request.state.emplace<Draining>(std::move(state));
                          return false;
                        },
                        [&](Finished& state) {
                          request.state.emplace<Finished>(std::move(state));
                          --num_draining_;
                          return true;
                        },
                    },
                    next);
}

void Scheduler::retract(Request& request, Retracting&& retracting) {
  auto next = on(std::move(retracting), Land{steps_.landed()});
  std::visit(Overloaded{
                 [&](Retracting& state) { request.state.emplace<Retracting>(std::move(state)); },
                 [&](Waiting& state) {
                   request.state.emplace<Waiting>(std::move(state));
                   --num_draining_;
                   waiting_.push(request);
                 },
             },
             next);
}

// --- commit ---

Misuse Scheduler::commit(std::int64_t step, std::span<const TokenId> tokens, std::span<const std::int32_t> counts) {
  if (steps_.in_flight() == 0 || step != raw(steps_.oldest_in_flight())) return Misuse::kNoSuchStep;
  const auto samples = std::ranges::count_if(steps_.oldest_rows(), [](const Row& row) { return row.sample_index >= 0; });
  if (std::cmp_not_equal(tokens.size(), samples) || std::cmp_not_equal(counts.size(), samples)) {
    return Misuse::kWrongShape;
  }
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const bool failed = tokens[i] == kNotFinite && (counts[i] == 0 || counts[i] == 1);
    if (!failed && (tokens[i] < 0 || counts[i] != 1)) return Misuse::kBadResult;
  }

  outputs_.clear();
  const LandedStep landed = steps_.land();
  for (const Row& row : landed.rows()) {
    const TokenId token = row.sample_index < 0 ? kOnDevice : tokens[static_cast<std::size_t>(row.sample_index)];
    const RequestId id = row.request->id;
    if (land(*row.request, landed, row, token)) requests_.erase(id);
  }
  return Misuse::kNone;
}

bool Scheduler::land(Request& request, const LandedStep& step, const Row& row, TokenId token) {
  return std::visit(
      Overloaded{
          [&](Prefilling& state) {
            on(state, Fill{step.filled(row)});
            return false;
          },
          [&](Decoding& state) {
            if (!take_row(request, state, step, row, token)) return false;
            stop_running(request, state);
            return drain(request, on(std::move(state), Finish{}));
          },
          [&](Retracting& state) {
            if (take_row(request, state, step, row, token)) return drain(request, on(std::move(state), Finish{}));
            retract(request, std::move(state));
            return false;
          },
          [&](Draining& state) { return drain(request, std::move(state)); },
          [](Waiting&) -> bool { throw InvariantBroken("a step landed for a request that waits"); },
          [](Finished&) -> bool { throw InvariantBroken("a step landed for a request that has finished"); },
      },
      request.state);
}

template <class State>
std::optional<Ending> Scheduler::take_row(Request& request, State& state, const LandedStep& step, const Row& row,
                                          TokenId token) {
  if (row.sample_index < 0) {
    on(state, Fill{step.filled(row)});
    return std::nullopt;
  }
  std::optional<Ending> ending;
  const bool failed = token == kNotFinite;
  if (failed) {
    for (const Hash& hash : state.sequence().written()) pool_.withdraw(hash);
    ending = Ending{FinishReason::kError, -1};
  } else {
    on(state, Fill{step.filled(row)});
    ending = on(state, Append{token});
    ++counters_.generated_tokens;
  }
  outputs_.push_back({request.id, row.sample_index, token, failed ? 0 : 1,
                      ending ? ending->reason : FinishReason::kNone, ending ? ending->stop_id : -1,
                      request.cached_tokens});
  return ending;
}

// --- looking in ---

Request* Scheduler::find(RequestId id) const {
  const auto found = requests_.find(id);
  return found == requests_.end() ? nullptr : found->second.get();
}

const Sequence* Scheduler::sequence_of(RequestId id) const {
  const Request* request = find(id);
  if (!request) return nullptr;
  return std::visit(Overloaded{
                        [](const Waiting& state) { return &state.sequence(); },
                        [](const Running& state) { return &state.sequence(); },
                        [](const Draining&) -> const Sequence* { return nullptr; },
                        [](const Finished&) -> const Sequence* { return nullptr; },
                    },
                    request->state);
}

std::optional<std::int32_t> Scheduler::cached_tokens(RequestId id) const {
  if (sequence_of(id)) return std::max(find(id)->cached_tokens, 0);
  const auto ended = std::ranges::find(outputs_, id, &CommitOutput::id);
  if (ended == outputs_.end()) return std::nullopt;
  return ended->cached_tokens;
}

Counters Scheduler::counters() const {
  Counters now = counters_;
  now.running = running_.size();
  now.waiting = waiting_.size();
  now.draining = num_draining_;
  now.blocks_free = pool_.num_free();
  now.blocks_cached = pool_.num_cached();
  now.blocks_used = pool_.num_used();
  return now;
}

}  // namespace tokenspeed
