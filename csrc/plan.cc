// Planning a step, by the rules of policy.h.
#include <algorithm>
#include <ranges>
#include <utility>

#include "scheduler.h"
#include "transitions.h"

namespace tokenspeed {

class Scheduler::Writer {
 public:
  Writer(PlanArrays& arrays, const Limits& limits, std::vector<Row>& rows, StepId step)
      : budget(limits.max_tokens, limits.max_deltas, limits.max_copies), step(step), arrays(arrays), rows_(rows) {}

  StepBudget budget;
  const StepId step;
  PlanArrays& arrays;
  Work work;
  double floor = 0;  // the tightest of the rows that decode
  bool preempted = false;

  // A row without its tokens. `samples`: it computes the last known token, so that the next one is sampled.
  void add_row(Request& request, const Running& state, std::int32_t count, bool samples) {
    const std::int32_t row = arrays.num_rows++;
    arrays.row_slot[row] = raw(state.slot());
    arrays.row_new[row] = count;
    arrays.row_computed[row] = state.computed();
    const std::int32_t sample = samples ? arrays.num_samples++ : -1;
    if (samples) arrays.sample_rows[sample] = row;
    rows_.push_back({&request, state.computed(), count, sample});
    budget.spend_tokens(count);
  }
  void add_token(TokenId token) { arrays.token_ids[arrays.num_tokens++] = token; }
  void add_tokens(std::span<const TokenId> tokens) {
    std::ranges::copy(tokens, arrays.token_ids + arrays.num_tokens);
    arrays.num_tokens += static_cast<std::int32_t>(tokens.size());
  }
  void add_delta(SlotId slot, std::int32_t position, BlockId block) {
    std::int32_t* delta = arrays.table_delta + 3 * static_cast<std::size_t>(arrays.num_deltas++);
    delta[0] = raw(slot);
    delta[1] = position;
    delta[2] = raw(block);
    budget.spend_deltas(1);
  }
  void add_bound(SlotId slot, RequestId id) {
    const std::int32_t index = arrays.num_bound++;
    std::int32_t* bound = arrays.bound + 2 * static_cast<std::size_t>(index);
    bound[0] = raw(slot);
    bound[1] = index;
    arrays.bound_ids[index] = id;
  }
  void add_copy(TicketId ticket, std::int32_t direction, std::int32_t from, std::int32_t to) {
    std::int32_t* copy = arrays.copies + 4 * static_cast<std::size_t>(arrays.num_copies++);
    copy[0] = raw(ticket);
    copy[1] = direction;
    copy[2] = from;
    copy[3] = to;
    budget.spend_copy();
  }

 private:
  std::vector<Row>& rows_;
};

Misuse Scheduler::plan(double now, PlanArrays& plan) {
  if (steps_.in_flight() >= StepLedger::kMaxInFlight) return Misuse::kTooManyInFlight;
  if (!(now >= now_)) return Misuse::kTimeRunsBackwards;
  now_ = now;

  Writer writer(plan, limits_, steps_.begin(), steps_.next());
  plan_decodes(writer);
  plan.num_decode = plan.num_rows;
  pace_.earn(writer.work, writer.floor);
  settle_sessions(now);
  plan_starts(writer);
  do {
    plan_prompts(writer);
    plan_loads(writer);
  } while (plan_offloads(writer) && plan.empty());
  if (plan.empty()) return Misuse::kNone;

  pace_.spend(writer.work);
  for (const SlotId slot : slots_.released()) plan.released[plan.num_released++] = raw(slot);
  slots_.clear_released();
  plan.step = raw(steps_.launch(writer.work));
  last_launch_ = now;
  return Misuse::kNone;
}

void Scheduler::plan_decodes(Writer& writer) {
  Request* next = nullptr;
  for (Request* request = running_.first(); request; request = next) {
    auto* state = std::get_if<Decoding>(&request->state);
    if (state && state->wants_token() && state->last_step() != writer.step) {
      const std::int32_t position = state->computed() / limits_.block_size;
      if (position == state->table().size()) {
        std::optional<FreeBlock> block = block_for(*request, writer);
        if (!std::holds_alternative<Decoding>(request->state)) {
          next = running_.first();  // it gave way itself and is in no list: those that have their row are skipped
          continue;
        }
        if (!block) {
          next = request->next;
          continue;
        }
        writer.add_delta(state->slot(), position, block->id());
        on(*state, Grow{*std::move(block)});
      }
      writer.add_token(state->next_input());
      writer.work.add_decode(state->computed());
      if (request->floor > writer.floor && pace_.reaches(state->computed(), request->floor)) {
        writer.floor = request->floor;
      }
      writer.add_row(*request, *state, 1, true);
      on(*state, Compute{writer.step, 1});
    }
    next = request->next;  // read after a preemption may have shortened the list
  }
}

std::optional<FreeBlock> Scheduler::block_for(Request& needy, Writer& writer) {
  for (;;) {
    if (std::optional<FreeBlock> block = pool_.take()) return block;
    if (num_draining_ + copies_.coming_back() > 0) return std::nullopt;  // memory is on its way back
    Request& last = running_.last_in_order();
    writer.preempted = true;
    preempt(last);
    if (&last == &needy) return std::nullopt;
  }
}

void Scheduler::preempt(Request& request) {
  ++counters_.preemptions;
  const auto give_way = [&](auto& state) {
    stop_running(request, state);
    retract(request, on(std::move(state), Preempt{}));
  };
  std::visit(Overloaded{
                 [&](Fetching& state) {
                   stop_running(request, state);
                   request.state.emplace<Waiting>(on(std::move(state), Preempt{}));
                   enqueue(request);
                 },
                 [&](Prefilling& state) { give_way(state); },
                 [&](Decoding& state) { give_way(state); },
                 [](Waiting&) { throw InvariantBroken("preempted a request that waits"); },
                 [](Retracting&) { throw InvariantBroken("preempted a request twice"); },
                 [](Draining&) { throw InvariantBroken("preempted a request that drains"); },
                 [](Finished&) { throw InvariantBroken("preempted a request that has finished"); },
             },
             request.state);
}

// --- prompts ---

// Those whose prefix has arrived from the host begin.
void Scheduler::plan_starts(Writer& writer) {
  std::erase_if(fetching_, [&](Request* request) {
    auto& state = std::get<Fetching>(request->state);
    if (!state.complete() || !writer.budget.has_deltas(ceil_div(state.sequence().known(), limits_.block_size))) {
      return false;
    }
    auto next = on(std::move(state), Start{});
    std::visit(Overloaded{
                   [&](Fetching& same) { request->state.emplace<Fetching>(std::move(same)); },
                   [&](Prefilling& started) {
                     bind(*request, std::move(started), writer);
                     prefilling_.push_back(request);
                   },
                   [&](Waiting& waiting) {
                     request->state.emplace<Waiting>(std::move(waiting));
                     running_.remove(*request);
                     enqueue(*request);
                   },
               },
               next);
    return true;
  });
}

void Scheduler::plan_prompts(Writer& writer) {
  // Nearly sorted already: only what the last plan computed has moved.
  for (std::size_t i = 1; i < prefilling_.size(); ++i) {
    for (std::size_t j = i; j > 0 && goes_before(*prefilling_[j], *prefilling_[j - 1]); --j) {
      std::swap(prefilling_[j], prefilling_[j - 1]);
    }
  }
  bool admitting = !writer.preempted || running_.size() == 0;
  const Request* first = prefilling_.empty() ? nullptr : prefilling_.front();
  const Request* head = admitting ? ready_.head() : nullptr;
  if (head && (!first || goes_before(*head, *first))) first = head;
  if (!first) return;
  const auto* begun = std::get_if<Prefilling>(&first->state);
  const std::int32_t remaining = begun ? begun->remaining() : first->uncached;
  const std::int32_t computed = sequence_of(first->id)->known() - remaining;
  writer.arrays.allowed_prompt_tokens = pace_.prompt_tokens(computed, remaining, writer.budget.tokens());
  writer.budget.limit_tokens(writer.arrays.allowed_prompt_tokens);

  std::size_t at = 0;
  while (writer.budget.tokens() > 0) {
    Request* next = at < prefilling_.size() ? prefilling_[at] : nullptr;
    Request* waiting = admitting ? ready_.head() : nullptr;
    if (waiting && (!next || goes_before(*waiting, *next))) {
      admitting = admit(*waiting, writer);
      if (!admitting || std::holds_alternative<Fetching>(waiting->state)) continue;
      prefilling_.insert(prefilling_.begin() + static_cast<std::ptrdiff_t>(at), waiting);
      next = waiting;
    }
    if (!next) return;
    if (compute_prompt(*next, writer)) {
      prefilling_.erase(prefilling_.begin() + static_cast<std::ptrdiff_t>(at));
    } else {
      ++at;
    }
  }
}

// True: its last known token is computed, it decodes from now on.
bool Scheduler::compute_prompt(Request& request, Writer& writer) {
  auto& state = std::get<Prefilling>(request.state);
  const std::int32_t count = std::min(writer.budget.tokens(), state.remaining());
  writer.add_tokens(state.sequence().tokens().subspan(static_cast<std::size_t>(state.computed()),
                                                      static_cast<std::size_t>(count)));
  writer.work.add_prompt(state.computed(), count);
  writer.add_row(request, state, count, count == state.remaining());
  auto next = on(std::move(state), Compute{writer.step, count});
  return std::visit(Overloaded{
                        [&](Prefilling& same) {
                          request.rank_by(same.remaining());
                          request.state.emplace<Prefilling>(std::move(same));
                          return false;
                        },
                        [&](Decoding& decoding) {
                          request.state.emplace<Decoding>(std::move(decoding));
                          return true;
                        },
                    },
                    next);
}

bool Scheduler::admit(Request& request, Writer& writer) {
  if (slots_.empty()) return false;
  auto& state = std::get<Waiting>(request.state);
  if (!has_room_for(request, state.sequence(), writer)) return false;

  leave_queue(request);
  request.admission = admissions_++;
  running_.push(request);
  if (match_.num_host > 0) {
    fetch(request, state);
    return true;
  }
  const std::int32_t table_size = ceil_div(state.sequence().known(), limits_.block_size);
  BlockTable table(pool_);
  table.reserve(ceil_div(state.sequence().max_length(), limits_.block_size));
  for (const PrefixMatch::Place& place : match_.places) table.append(pool_.hit(BlockId{place.id}));
  while (table.size() < table_size) {
    std::optional<FreeBlock> block = pool_.take();
    if (!block) throw InvariantBroken("the blocks that an admission counted are not there");
    table.append(*std::move(block));
  }
  bind(request, on(std::move(state), Admit{slots_.take(), std::move(table), match_.size()}), writer);
  return true;
}

bool Scheduler::has_room_for(const Request& request, const Sequence& sequence, Writer& writer) {
  const std::uint64_t gains = pool_.gains() + host_.gains();
  const bool looked = blocked_.arrival == request.order.arrival && blocked_.gains == gains;
  if (looked && blocked_.running <= running_.size()) return false;
  const std::int32_t known = sequence.known();
  if (!writer.budget.has_deltas(ceil_div(known, limits_.block_size))) return false;

  match_prefix(pool_, host_, sequence.matchable(), match_);
  const Demand demand{known, match_.num_device(), match_.num_unheld};
  bool room = blocks_suffice(demand, limits_.block_size, pool_.num_available(), running_.size());
  wanted_free_ = 0;
  if (room && host_.num_blocks() > 0) {
    // Cached blocks are not evicted for it but go to the host first; its own prefix last of all.
    const std::int32_t wanted = blocks_wanted(demand, limits_.block_size, running_.size());
    if (wanted > pool_.num_free()) {
      room = false;
      wanted_free_ = wanted;
      for (const PrefixMatch::Place& place : std::views::reverse(match_.places)) {
        if (place.on_host) {
          const HostBlock touched = host_.hold(HostId{place.id});
        } else {
          const SealedBlock touched = pool_.hit(BlockId{place.id});
        }
      }
    }
  }
  if (room && !match_.in_transit) return true;
  blocked_ = {request.order.arrival, pool_.gains() + host_.gains(), running_.size()};
  return false;
}

void Scheduler::bind(Request& request, Prefilling&& admitted, Writer& writer) {
  for (std::int32_t i = 0; i < admitted.table().size(); ++i) writer.add_delta(admitted.slot(), i, admitted.table()[i]);
  writer.add_bound(admitted.slot(), request.id);
  if (request.cached_tokens < 0) {
    request.cached_tokens = admitted.computed();
    counters_.prompt_tokens += admitted.sequence().prompt_length();
    counters_.cached_prompt_tokens += request.cached_tokens;
  }
  request.rank_by(admitted.remaining());
  request.state.emplace<Prefilling>(std::move(admitted));
}

// --- the second tier ---

// Room for all its blocks is taken before any of them moves.
void Scheduler::fetch(Request& request, Waiting& state) {
  const std::int32_t table_size = ceil_div(state.sequence().known(), limits_.block_size);
  std::vector<PrefixBlock> prefix;
  std::vector<FreeBlock> room;
  prefix.reserve(match_.places.size());
  room.reserve(static_cast<std::size_t>(table_size - match_.num_device()));
  for (const PrefixMatch::Place& place : match_.places) {
    if (place.on_host) {
      prefix.emplace_back(host_.hold(HostId{place.id}));
    } else {
      prefix.emplace_back(pool_.hit(BlockId{place.id}));
    }
  }
  for (std::int32_t i = match_.num_device(); i < table_size; ++i) {
    std::optional<FreeBlock> block = pool_.take_free();
    if (!block) throw InvariantBroken("the blocks that a fetch counted are not there");
    room.push_back(*std::move(block));
  }
  request.state.emplace<Fetching>(
      on(std::move(state), Fetch{slots_.take(), std::move(prefix), std::move(room), BlockTable(pool_)}));
  fetching_.push_back(&request);
}

void Scheduler::plan_loads(Writer& writer) {
  for (Request* request : fetching_) {
    auto& state = std::get<Fetching>(request->state);
    while (std::cmp_less(state.next_to_send(), state.prefix().size())) {
      const std::int32_t place = state.next_to_send();
      const HostId from = std::get<HostBlock>(state.prefix()[static_cast<std::size_t>(place)]).id();
      if (!host_.indexed(from)) {
        on(state, Lose{place, std::nullopt});
        continue;
      }
      const BlockPool::Found found = pool_.find(host_.hash(from));
      if (found.where == BlockPool::Found::Where::kHere) {  // computed again meanwhile, by another request
        on(state, Arrive{place, pool_.hit(found.id)});
        continue;
      }
      if (found.where == BlockPool::Found::Where::kInTransit || writer.budget.copies() == 0) break;
      LoadingBlock loading = on(state, Send{place});
      const BlockId to = loading.id();
      const TicketId ticket = copies_.begin(std::move(loading), {request, place});
      on(state, Await{place, ticket});
      writer.add_copy(ticket, kToDevice, raw(from), raw(to));
      ++counters_.blocks_loaded;
    }
  }
}

// Makes free what the head of the queue wants, and a block for each running request. True: some are free at once,
// because the host has their content already.
bool Scheduler::plan_offloads(Writer& writer) {
  if (host_.num_blocks() == 0) return false;
  bool freed_some = false;
  const std::int32_t wanted = std::max(ready_.empty() ? 0 : wanted_free_, running_.size());
  while (writer.budget.copies() > 0 && pool_.num_free() + copies_.offloads() < wanted && pool_.num_cached() > 0) {
    const BlockId from = pool_.oldest();
    if (host_.find(pool_.hash(from)).where != HostPool::Found::Where::kNowhere) {  // it is there already
      const FreeBlock freed = on(pool_.take_oldest(), Evict{});
      freed_some = true;
      continue;
    }
    std::optional<FreeHostBlock> room = host_.take();
    if (!room) break;
    OffloadingBlock offloading = on(pool_.take_oldest(), Offload{*std::move(room)});
    const HostId to = offloading.host_id();
    writer.add_copy(copies_.begin(std::move(offloading)), kToHost, raw(from), raw(to));
    ++counters_.blocks_offloaded;
  }
  return freed_some;
}

}  // namespace tokenspeed
