// Who gets what in a step.
//
// Objective: the most tokens a minute, while every stream that decodes keeps its floor of tokens per second, and
// nobody waits for ever. So:
//
//   1. Every decoding request gets its one token first.
//   2. Prompts get the time that the tightest floor leaves: steps that are faster than the floor asks earn credit,
//      a chunk of a prompt spends it (Pace). Where the streams alone are slower than their floor, prompts still get
//      a third of the time. Where nothing decodes or no floor is set, the token budget is the only limit. A floor that
//      its stream could not even keep alone does not count. The first few steps of streams with a floor are theirs
//      alone, since nothing else tells what prompts cost beside them.
//   3. Of the prompts, running or waiting, the one with the lowest rank goes first: its time of arrival plus
//      kPatience times what its uncached tokens take. So a short one overtakes a long one, which pauses at the border
//      of a chunk, and no prompt waits for more than those that arrive within its own patience. Of the waiting
//      ones only the first is looked at; the rank never changes while a request waits, so nobody else is touched.
//   4. A waiting request is admitted when there are blocks for all its known tokens and the next one, and one more
//      block for each running request, so that an admission is not followed at once by a preemption.
//   5. A session counts with all its blocks, also between its turns. A request of a session that is not resident
//      waits until it fits beside the resident ones (sessions.h): finishing a session's turns goes before starting
//      another's, and sessions do not evict each other in a circle. For Sessions::kIdleSeconds smaller ones may pass
//      one that does not fit. After max_queue_seconds it gets its place whatever it takes: all idle sessions give way, and
//      if they are not enough it has one too many. Only one does so in kTenure times what all of its prompt takes: else
//      the time would go into computing again what was displaced.
//   6. Somebody who needs a block when there is none takes it from the last in order. The order is priority, then
//      arrival, and never changes. So the first in order is never preempted and needs no more than the whole pool
//      (submit refuses what does not fit in it): it ends; then the next one is first. Hence every request ends, and
//      of two requests only the later can be preempted by the other. Nothing is preempted while memory is on its way
//      back, and a plan that preempts admits nobody, unless nobody runs any more.
#pragma once

#include <cstdint>
#include <map>

#include "step_time.h"
#include "types.h"

namespace tokenspeed {

struct PolicySettings {
  double tps_floor = 0;            // of requests that name none, 0: none
  bool floor_is_promise = false;   // refuse what would break it; else it only steers
  bool footprints = true;          // rule 5
  double max_queue_seconds = 300;  // a session that is expected to wait longer is refused
};

// Who is first when memory is short, from submission to the end.
struct Order {
  std::int32_t priority;  // lower goes first
  std::uint64_t arrival;
  friend auto operator<=>(const Order&, const Order&) = default;
};

// Of the blocks of both tiers, those that sessions may count on. The rest is what they leave behind (rewritten
// histories, sessions that have ended) and what is in both tiers while it is copied: without it the least recently
// used block is soon one that somebody comes back for.
constexpr std::int32_t session_capacity(std::int32_t blocks) { return blocks - blocks / 10; }

// How long others may overtake a prompt, in units of what its own computation takes.
inline constexpr double kPatience = 8;
// How long sessions keep their places after one of them had to give way to a prompt, likewise.
inline constexpr double kTenure = 16;
// What was learned from steps is not held against a request when none was launched for so many seconds.
inline constexpr double kStale = 60;
// The longest time after which a refused request is told to come back, in seconds.
inline constexpr double kLongestRetry = 600;

// What is left of one step.
class StepBudget {
 public:
  StepBudget(std::int32_t tokens, std::int32_t deltas, std::int32_t copies)
      : tokens_(tokens), deltas_(deltas), copies_(copies) {}
  std::int32_t tokens() const { return tokens_; }
  std::int32_t copies() const { return copies_; }
  bool has_deltas(std::int32_t count) const { return count <= deltas_; }
  void limit_tokens(std::int32_t most) { tokens_ = tokens_ < most ? tokens_ : most; }
  void spend_tokens(std::int32_t count) { tokens_ -= count; }
  void spend_deltas(std::int32_t count) { deltas_ -= count; }
  void spend_copy() { --copies_; }

 private:
  std::int32_t tokens_;
  std::int32_t deltas_;
  std::int32_t copies_;
};

// What the head of the waiting queue would take from the pool.
struct Demand {
  std::int32_t known;       // tokens
  std::int32_t num_hits;    // blocks of its prefix that are on the device
  std::int32_t num_unheld;  // of these, those that count as available until they are hit
};

// Blocks that an admission must find besides its hits: rule 4.
inline std::int32_t blocks_wanted(const Demand& demand, std::int32_t block_size, std::int32_t running) {
  return ceil_div(demand.known + 1, block_size) - demand.num_hits + running;
}
inline bool blocks_suffice(const Demand& demand, std::int32_t block_size, std::int32_t available,
                           std::int32_t running) {
  return blocks_wanted(demand, block_size, running) <= available - demand.num_unheld;
}

// Shares the time between the streams that decode and the prompts: rule 2.
class Pace {
 public:
  StepTimeModel model;

  // A step with these decoding rows, the tightest floor among them, is being planned.
  void earn(const Work& decode, double floor);
  // How many tokens of prompts fit beside them, at most `most`. The first prompt has `computed` positions in the cache
  // and `remaining` ones to go. All of them, while nothing is known.
  std::int32_t prompt_tokens(std::int32_t computed, std::int32_t remaining, std::int32_t most) const;
  // The step is planned as it is now: pays for what was added to the decoding rows.
  void spend(const Work& planned);
  // Whether streams with this work keep the floor, as far as is known.
  bool carries(const Work& decode, double floor) const { return !model.trusted() || model.predict(decode) <= 1 / floor; }
  // Whether a lone stream with this context does.
  bool reaches(std::int64_t context, double floor) const;

 private:
  static constexpr std::int32_t kMostLessons = 8;

  double cost(std::int32_t computed, std::int32_t tokens) const;

  Work decode_;  // of the step that is being planned
  double alone_ = 0;     // seconds that it takes
  double credit_ = 0;    // seconds; below 0: spent ahead
  double burst_ = 0;     // the most that is saved up, and spent at once
  bool limited_ = false;
  bool learning_ = false;  // no prompts: the model wants to see the streams alone
  std::int32_t lessons_ = kMostLessons;  // steps for which they may still be held back for that
};

// What the requests that have not ended would be as streams, and what was promised to them.
class Promises {
 public:
  // `floor` 0: nothing is promised.
  void add(std::int64_t known, double floor);
  std::int64_t count() const { return count_; }
  void grow() { ++known_; }
  void remove(std::int64_t known, double floor);

  // The step in which all of them decode, and one more with so many known tokens; at most `most` do so at once.
  Work streams(std::int32_t more, std::int32_t most) const;
  // The tightest promise that can be kept at all, by a lone stream without a context; 0: none.
  double tightest(const Pace& pace) const;

  friend bool operator==(const Promises&, const Promises&) = default;

 private:
  std::int64_t count_ = 0;
  std::int64_t known_ = 0;  // tokens of all of them
  std::map<double, std::int32_t> floors_;
};

}  // namespace tokenspeed
