// Who gets what in a step.
//
// Objective: no stream that decodes ever waits for another's prompt longer than one step, and the step is as full
// as its token budget allows. So:
//
//   1. Every decoding request gets its one token first, oldest admission first.
//   2. Prefills that have begun get chunks of what is left, oldest admission first.
//   3. Waiting requests are admitted in order of priority, then arrival, while slots, tokens, table deltas and
//      blocks last. Only the head of the queue is looked at; nobody overtakes it.
//   4. If a decoding request needs a block and there is none, the request admitted last gives its memory back and
//      waits again; so the oldest always proceeds, and of two requests only the younger can be preempted by the
//      other. Nothing is preempted while memory is on its way back, and a plan that preempts admits nobody.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace tokenspeed {

// What is left of one step.
class StepBudget {
 public:
  StepBudget(std::int32_t tokens, std::int32_t deltas) : tokens_(tokens), deltas_(deltas) {}
  std::int32_t tokens() const { return tokens_; }
  bool has_deltas(std::int32_t count) const { return count <= deltas_; }
  void spend_tokens(std::int32_t count) { tokens_ -= count; }
  void spend_deltas(std::int32_t count) { deltas_ -= count; }

 private:
  std::int32_t tokens_;
  std::int32_t deltas_;
};

// How many of its `remaining` tokens a prefill computes in this step.
std::int32_t chunk(const StepBudget& budget, std::int32_t remaining);

// What the head of the waiting queue would take from the pool.
struct Demand {
  std::int32_t known;     // tokens
  std::int32_t num_hits;  // blocks found in the prefix cache
  std::int32_t num_cached_hits;  // of these, those that count as available until they are hit
};

// Blocks are there for all known tokens and the first new one, and one more for each running request, so that an
// admission is not followed at once by a preemption.
bool blocks_suffice(const Demand& demand, std::int32_t block_size, std::int32_t available, std::int32_t running);

}  // namespace tokenspeed
