#include "scheduler.h"

#include <algorithm>
#include <limits>

#include "transitions.h"
#include "proofs.h"

namespace tokenspeed {

namespace {

const Sequence* sequence_in(const Request& request) {
  return std::visit(Overloaded{
                        [](const Waiting& state) { return &state.sequence(); },
                        [](const Fetching& state) { return &state.sequence(); },
                        [](const Running& state) { return &state.sequence(); },
                        [](const Draining&) -> const Sequence* { return nullptr; },
                        [](const Finished&) -> const Sequence* { return nullptr; },
                    },
                    request.state);
}

}  // namespace

Scheduler::Scheduler(const Limits& limits, const PolicySettings& policy, bool prefix_caching, HashKey key)
    : limits_(limits),
      policy_(policy),
      max_length_(static_cast<std::int32_t>(std::min<std::int64_t>(
          limits.max_model_len,
          static_cast<std::int64_t>(std::min(limits.num_blocks, limits.max_blocks)) * limits.block_size))),
      hasher_(prefix_caching ? std::optional<ChainHasher>(key) : std::nullopt),
      pool_(limits.num_blocks, limits.block_size, cache_log_),
      host_(limits.num_host_blocks, cache_log_),
      slots_(limits.max_rows),
      sessions_(session_capacity(limits.num_blocks + limits.num_host_blocks)),
      now_(-std::numeric_limits<double>::infinity()),
      next_turnover_(now_),
      last_launch_(now_) {
  ready_.reserve(limits.max_queued + limits.max_rows);
  outside_.reserve(limits.max_queued + limits.max_rows);
  prefilling_.reserve(static_cast<std::size_t>(limits.max_rows));
  fetching_.reserve(static_cast<std::size_t>(limits.max_rows));
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

  const double now = std::max(now_, s.now);
  const std::int32_t waiting = ready_.size() + outside_.size();
  // There is a place in the queue, or among the streams, when the next one departs.
  if (requests_.empty()) departures_.begin(now);
  retry_after_ = std::clamp(departures_.interval(now).value_or(0), 1.0, kLongestRetry);
  if (waiting >= limits_.max_queued) return Refusal::kQueueFull;
  const double floor = s.tps_floor < 0 ? policy_.tps_floor : s.tps_floor;
  const bool promised = floor > 0 && (s.tps_floor > 0 || policy_.floor_is_promise);
  const auto known = static_cast<std::int32_t>(length);
  // What is refused is never observed: a model that was wrong must get a chance to learn it.
  const bool fresh = promises_.count() > 0 || now - last_launch_ < kStale;
  if (fresh && promised && !pace_.reaches(known, floor)) return Refusal::kFloorOutOfReach;
  if (fresh && breaks_a_promise(promised ? floor : 0, known)) return Refusal::kFloor;

  const std::int64_t wanted = s.max_tokens < 0 ? max_length_ : length + s.max_tokens;
  StopRule rule{static_cast<std::int32_t>(std::min<std::int64_t>(wanted, max_length_)), s.min_tokens,
                {s.stop_ids.begin(), s.stop_ids.end()}};
  auto sequence = std::make_unique<Sequence>(s.prompt, std::move(rule), hasher_ ? &*hasher_ : nullptr, s.salt,
                                             limits_.block_size, s.reuse_prefix);
  const bool in_session = policy_.footprints && !sequence->matchable().empty();
  if (in_session) {
    const std::optional<double> wait = wait_for_room(now);
    if (wait && *wait > policy_.max_queue_seconds && !sessions_.is_resident(s.session, sequence->hashes())) {
      retry_after_ = std::min(*wait, kLongestRetry);
      return Refusal::kNoRoom;
    }
  }
  match_prefix(pool_, host_, sequence->matchable(), match_);
  const std::int32_t uncached = known - match_.size() * limits_.block_size;
  const std::span<const Hash> hashes = sequence->hashes();
  auto owned = std::make_unique<Request>(s.id, Order{s.priority, arrivals_}, floor, promised, now,
                                         kPatience * pace_.model.seconds_per_prompt_token(), uncached, nullptr,
                                         Waiting(std::move(sequence)));
  Request& request = *owned;
  request.rank_by(uncached);
  // Whatever may want for memory comes first, so that nothing has changed when it fails.
  promises_.add(known, promised ? floor : 0);
  try {
    requests_.emplace(s.id, std::move(owned));
    if (in_session) request.session = &sessions_.arrive(s.session, hashes, ceil_div(known + 1, limits_.block_size));
  } catch (...) {
    promises_.remove(known, promised ? floor : 0);
    requests_.erase(s.id);
    throw;
  }
  ++arrivals_;
  enqueue(request);
  settle_sessions(now);  // so that those who wait outside do so for want of room
  if (request.outside && outside_.size() == 1) settlements_.begin(now);
  return Refusal::kNone;
}

bool Scheduler::breaks_a_promise(double floor, std::int32_t known) const {
  const Work streams = promises_.streams(known, limits_.max_rows);
  floor = std::max(floor, promises_.tightest(pace_));
  return floor > 0 && !pace_.carries(streams, floor);
}

// How long a session would wait behind those that wait already. Nothing: nobody waits, or it cannot be said.
std::optional<double> Scheduler::wait_for_room(double now) const {
  const std::optional<double> interval = settlements_.interval(now);
  if (outside_.empty() || !interval) return std::nullopt;
  return *interval * (outside_.size() + 1);
}

void Scheduler::enqueue(Request& request) {
  request.outside = request.session && !request.session->resident;
  (request.outside ? outside_ : ready_).push(request);
  counters_.waiting_uncached_tokens += request.uncached;
  if (request.outside) looked_outside_ = UINT64_MAX;
}

void Scheduler::leave_queue(Request& request) {
  (request.outside ? outside_ : ready_).remove(request);
  counters_.waiting_uncached_tokens -= request.uncached;
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
  if (const Sequence* sequence = sequence_in(request)) depart(request, sequence->known());
  return std::visit(Overloaded{
                        [&](Waiting& state) {
                          leave_queue(request);
                          request.state.emplace<Finished>(on(std::move(state), Event{}));
                          return true;
                        },
                        [&](Fetching& state) {
                          stop_running(request, state);
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

// The request has ended: what others judge by it, apart from its memory, ends too.
void Scheduler::depart(Request& request, std::int32_t known) {
  const double now = std::max(now_, request.arrived);  // it may have come after the last plan
  departures_.note(now);
  promises_.remove(known, request.promised ? request.floor : 0);
  if (request.session) sessions_.leave(*request.session, ceil_div(known, limits_.block_size), now);
  request.session = nullptr;
}

// Its copies land for nobody from now on.
void Scheduler::stop_running(Request& request, const Fetching& state) {
  running_.remove(request);
  std::erase(fetching_, &request);
  for (const PrefixBlock& block : state.prefix()) {
    if (const auto* ticket = std::get_if<TicketId>(&block)) copies_.disown(*ticket);
  }
}

void Scheduler::stop_running(Request& request, const Prefilling&) {
  running_.remove(request);
  std::erase(prefilling_, &request);
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
                   enqueue(request);
                 },
             },
             next);
}

// --- commit ---

Misuse Scheduler::commit(std::int64_t step, std::span<const TokenId> tokens, std::span<const std::int32_t> counts,
                         double seconds) {
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
  if (seconds > 0) pace_.model.observe(steps_.oldest_work(), seconds);
  const LandedStep landed = steps_.land();
  for (const Row& row : landed.rows()) {
    if (row.count > 1) blocked_ = {};  // of a prompt: who waits may want to compute the same
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
            depart(request, state.sequence().known());
            stop_running(request, state);
            return drain(request, on(std::move(state), Finish{}));
          },
          [&](Retracting& state) {
            if (take_row(request, state, step, row, token)) {
              depart(request, state.sequence().known());
              return drain(request, on(std::move(state), Finish{}));
            }
            retract(request, std::move(state));
            return false;
          },
          [&](Draining& state) { return drain(request, std::move(state)); },
          [](Waiting&) -> bool { throw InvariantBroken("a step landed for a request that waits"); },
          [](Fetching&) -> bool { throw InvariantBroken("a step landed for a request that computes nothing yet"); },
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
    for (const Hash& hash : state.sequence().written()) {
      pool_.withdraw(hash);
      host_.withdraw(hash);
    }
    ending = Ending{FinishReason::kError, -1};
  } else {
    on(state, Fill{step.filled(row)});
    ending = on(state, Append{token});
    ++counters_.generated_tokens;
    promises_.grow();
  }
  outputs_.push_back({request.id, row.sample_index, token, failed ? 0 : 1,
                      ending ? ending->reason : FinishReason::kNone, ending ? ending->stop_id : -1,
                      request.cached_tokens});
  return ending;
}

Misuse Scheduler::land_copies(std::span<const std::int32_t> landed, std::span<const std::int32_t> failed) {
  std::vector<std::int32_t> tickets(landed.begin(), landed.end());
  tickets.insert(tickets.end(), failed.begin(), failed.end());
  std::ranges::sort(tickets);
  const bool known = std::ranges::all_of(tickets, [this](std::int32_t ticket) { return copies_.knows(ticket); });
  if (!known || std::ranges::adjacent_find(tickets) != tickets.end()) return Misuse::kNoSuchTicket;

  const auto arrive = [](Arrival&& arrival) {
    auto& state = std::get<Fetching>(arrival.for_whom.request->state);
    const std::int32_t place = arrival.for_whom.place;
    std::visit(Overloaded{
                   [&](SealedBlock& block) { on(state, Arrive{place, std::move(block)}); },
                   [&](FreeBlock& block) { on(state, Lose{place, std::move(block)}); },
               },
               arrival.block);
  };
  for (const std::int32_t ticket : landed) copies_.land(TicketId{ticket}, false, arrive);
  for (const std::int32_t ticket : failed) copies_.land(TicketId{ticket}, true, arrive);
  return Misuse::kNone;
}

// --- the prefix cache ---

std::int32_t Scheduler::drop_cached() {
  const std::int32_t dropped = pool_.drop_cached() + host_.drop_resting();
  cache_log_.dropped();
  return dropped;
}

bool Scheduler::open_cache_log() {
  if (arrivals_ > 0) return false;
  cache_log_.open(pool_.hashes(), pool_.num_blocks(), host_.hashes(), host_.num_blocks());
  return true;
}

// --- looking in ---

Request* Scheduler::find(RequestId id) const {
  const auto found = requests_.find(id);
  return found == requests_.end() ? nullptr : found->second.get();
}

const Sequence* Scheduler::sequence_of(RequestId id) const {
  const Request* request = find(id);
  return request ? sequence_in(*request) : nullptr;
}

std::optional<std::int32_t> Scheduler::cached_tokens(RequestId id) const {
  if (sequence_of(id)) return std::max(find(id)->cached_tokens, 0);
  const auto ended = std::ranges::find(outputs_, id, &CommitOutput::id);
  if (ended == outputs_.end()) return std::nullopt;
  return ended->cached_tokens;
}

Familiarity Scheduler::familiarity(std::span<const Hash> prompt, std::int64_t session) const {
  PrefixMatch match;
  match_prefix(pool_, host_, prompt, match);
  return {sessions_.knows(session), match.size() * limits_.block_size};
}

Counters Scheduler::counters() const {
  Counters now = counters_;
  now.running = running_.size();
  now.waiting = ready_.size() + outside_.size();
  now.draining = num_draining_;
  now.blocks_free = pool_.num_free();
  now.blocks_cached = pool_.num_cached();
  now.blocks_used = pool_.num_used();
  now.host_blocks_used = host_.num_blocks() - host_.num_free();
  now.copies_in_flight = copies_.in_flight();
  now.sessions_resident = sessions_.num_resident();
  now.sessions_waiting = outside_.size();
  return now;
}

}  // namespace tokenspeed
