// Planning a step, by the rules of policy.h.
#include <algorithm>
#include <utility>

#include "scheduler.h"
#include "transitions.h"

namespace tokenspeed {

class Scheduler::Writer {
 public:
  Writer(PlanArrays& arrays, const Limits& limits, std::vector<Row>& rows, StepId step)
      : budget(limits.max_tokens, limits.max_deltas), step(step), arrays_(arrays), rows_(rows) {}

  StepBudget budget;
  const StepId step;
  bool preempted = false;

  // A row without its tokens. `samples`: it computes the last known token, so that the next one is sampled.
  void add_row(Request& request, const Running& state, std::int32_t count, bool samples) {
    const std::int32_t row = arrays_.num_rows++;
    arrays_.row_slot[row] = raw(state.slot());
    arrays_.row_new[row] = count;
    arrays_.row_computed[row] = state.computed();
    const std::int32_t sample = samples ? arrays_.num_samples++ : -1;
    if (samples) arrays_.sample_rows[sample] = row;
    rows_.push_back({&request, state.computed(), count, sample});
    budget.spend_tokens(count);
  }
  void add_token(TokenId token) { arrays_.token_ids[arrays_.num_tokens++] = token; }
  void add_tokens(std::span<const TokenId> tokens) {
    std::ranges::copy(tokens, arrays_.token_ids + arrays_.num_tokens);
    arrays_.num_tokens += static_cast<std::int32_t>(tokens.size());
  }
  void add_delta(SlotId slot, std::int32_t position, BlockId block) {
    std::int32_t* delta = arrays_.table_delta + 3 * static_cast<std::size_t>(arrays_.num_deltas++);
    delta[0] = raw(slot);
    delta[1] = position;
    delta[2] = raw(block);
    budget.spend_deltas(1);
  }
  void add_bound(SlotId slot, RequestId id) {
    const std::int32_t index = arrays_.num_bound++;
    arrays_.bound[2 * index] = raw(slot);
    arrays_.bound[2 * index + 1] = index;
    arrays_.bound_ids[index] = id;
  }
  void end_decodes() { arrays_.num_decode = arrays_.num_rows; }

 private:
  PlanArrays& arrays_;
  std::vector<Row>& rows_;
};

Misuse Scheduler::plan(double now, PlanArrays& plan) {
  if (steps_.in_flight() >= StepLedger::kMaxInFlight) return Misuse::kTooManyInFlight;
  if (!(now >= now_)) return Misuse::kTimeRunsBackwards;
  now_ = now;

  Writer writer(plan, limits_, steps_.begin(), steps_.next());
  plan_decodes(writer);
  writer.end_decodes();
  plan_prefills(writer);
  if (!writer.preempted) plan_admissions(writer);
  if (plan.num_rows == 0) return Misuse::kNone;

  for (const SlotId slot : slots_.released()) plan.released[plan.num_released++] = raw(slot);
  slots_.clear_released();
  plan.step = raw(steps_.launch());
  return Misuse::kNone;
}

void Scheduler::plan_decodes(Writer& writer) {
  Request* next = nullptr;
  for (Request* request = running_.first(); request; request = next) {
    auto* state = std::get_if<Decoding>(&request->state);
    if (state && state->wants_token()) {
      const std::int32_t position = state->computed() / limits_.block_size;
      if (position == state->table().size()) {
        std::optional<FreeBlock> block = block_for(*request, writer);
        if (!std::holds_alternative<Decoding>(request->state)) return;  // it was the last, and gave way itself
        if (!block) {
          next = request->next;
          continue;
        }
        writer.add_delta(state->slot(), position, block->id());
        on(*state, Grow{*std::move(block)});
      }
      writer.add_token(state->next_input());
      writer.add_row(*request, *state, 1, true);
      on(*state, Compute{writer.step, 1});
    }
    next = request->next;  // read after a preemption may have shortened the list
  }
}

std::optional<FreeBlock> Scheduler::block_for(Request& needy, Writer& writer) {
  for (;;) {
    if (std::optional<FreeBlock> block = pool_.take()) return block;
    if (num_draining_ > 0) return std::nullopt;  // memory is on its way back
    Request& youngest = *running_.last();
    writer.preempted = true;
    preempt(youngest);
    if (&youngest == &needy) return std::nullopt;
  }
}

void Scheduler::preempt(Request& request) {
  ++counters_.preemptions;
  const auto give_way = [&](auto& state) {
    stop_running(request, state);
    retract(request, on(std::move(state), Preempt{}));
  };
  std::visit(Overloaded{
                 [&](Prefilling& state) { give_way(state); },
                 [&](Decoding& state) { give_way(state); },
                 [](Waiting&) { throw InvariantBroken("preempted a request that waits"); },
                 [](Retracting&) { throw InvariantBroken("preempted a request twice"); },
                 [](Draining&) { throw InvariantBroken("preempted a request that drains"); },
                 [](Finished&) { throw InvariantBroken("preempted a request that has finished"); },
             },
             request.state);
}

void Scheduler::plan_prefills(Writer& writer) {
  std::int32_t left = num_prefilling_;
  for (Request* request = running_.first(); left > 0 && writer.budget.tokens() > 0; request = request->next) {
    if (!std::holds_alternative<Prefilling>(request->state)) continue;
    --left;
    compute_prefill(*request, writer);
  }
}

void Scheduler::compute_prefill(Request& request, Writer& writer) {
  auto& state = std::get<Prefilling>(request.state);
  const std::int32_t count = chunk(writer.budget, state.remaining());
  writer.add_tokens(state.sequence().tokens().subspan(static_cast<std::size_t>(state.computed()),
                                                      static_cast<std::size_t>(count)));
  writer.add_row(request, state, count, count == state.remaining());
  auto next = on(std::move(state), Compute{writer.step, count});
  std::visit(Overloaded{
                 [&](Prefilling& same) { request.state.emplace<Prefilling>(std::move(same)); },
                 [&](Decoding& decoding) {
                   request.state.emplace<Decoding>(std::move(decoding));
                   --num_prefilling_;
                 },
             },
             next);
}

void Scheduler::plan_admissions(Writer& writer) {
  while (Request* head = waiting_.head()) {
    if (!admit(*head, writer)) return;
    compute_prefill(*head, writer);
  }
}

bool Scheduler::admit(Request& request, Writer& writer) {
  if (slots_.empty() || writer.budget.tokens() == 0) return false;
  if (blocked_.arrival == request.arrival && blocked_.gains == pool_.gains() && blocked_.running <= running_.size()) {
    return false;
  }
  auto& state = std::get<Waiting>(request.state);
  const std::int32_t known = state.sequence().known();
  const std::int32_t table_size = ceil_div(known, limits_.block_size);
  if (!writer.budget.has_deltas(table_size)) return false;
  pool_.match(state.sequence().matchable(), match_);
  const auto hits = static_cast<std::int32_t>(match_.blocks.size());
  if (!blocks_suffice({known, hits, match_.num_cached}, limits_.block_size, pool_.num_available(), running_.size())) {
    blocked_ = {request.arrival, pool_.gains(), running_.size()};
    return false;
  }

  BlockTable table(pool_);
  table.reserve(table_size + 1);
  for (const BlockId id : match_.blocks) table.append(pool_.hit(id));
  while (table.size() < table_size) {
    std::optional<FreeBlock> block = pool_.take();
    if (!block) throw InvariantBroken("the blocks that an admission counted are not there");
    table.append(*std::move(block));
  }

  waiting_.remove(request);
  Prefilling admitted = on(std::move(state), Admit{slots_.take(), std::move(table), hits});
  for (std::int32_t i = 0; i < table_size; ++i) writer.add_delta(admitted.slot(), i, admitted.table()[i]);
  writer.add_bound(admitted.slot(), request.id);
  if (request.cached_tokens < 0) {
    request.cached_tokens = admitted.computed();
    counters_.prompt_tokens += admitted.sequence().prompt_length();
    counters_.cached_prompt_tokens += request.cached_tokens;
  }
  request.admission = admissions_++;
  request.state.emplace<Prefilling>(std::move(admitted));
  running_.push(request);
  ++num_prefilling_;
  return true;
}

}  // namespace tokenspeed
