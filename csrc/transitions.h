// The events of a request: one overload for every legal pair of state and event, and no other.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <variant>

#include "request.h"
#include "taken.h"

namespace tokenspeed {

[[nodiscard]] inline Prefilling on(Waiting&& state, Admit event) {
  taken<Waiting, Admit>();
  const std::int32_t computed = event.num_hits * event.table.block_size();
  state.sequence_->note_hits(event.num_hits);
  return Prefilling(std::move(state.sequence_), std::move(event.slot), std::move(event.table), computed);
}

[[nodiscard]] inline Fetching on(Waiting&& state, Fetch event) {
  taken<Waiting, Fetch>();
  return Fetching(std::move(state.sequence_), std::move(event));
}

[[nodiscard]] inline LoadingBlock on(Fetching& state, Send event) {
  taken<Fetching, Send>();
  FreeBlock room = std::move(state.room_.back());
  state.room_.pop_back();
  HostBlock block = std::move(std::get<HostBlock>(state.at(event.place)));
  state.at(event.place).emplace<Lost>();
  state.skip_sent();
  return on(std::move(block), Load{std::move(room)});
}

inline void on(Fetching& state, Await event) {
  taken<Fetching, Await>();
  state.at(event.place).emplace<TicketId>(event.ticket);
}

inline void on(Fetching& state, Arrive event) {
  taken<Fetching, Arrive>();
  state.at(event.place).emplace<SealedBlock>(std::move(event.block));
  ++state.num_here_or_lost_;
  state.skip_sent();
}

inline void on(Fetching& state, Lose event) {
  taken<Fetching, Lose>();
  if (event.room) state.room_.push_back(*std::move(event.room));
  state.at(event.place).emplace<Lost>();
  ++state.num_here_or_lost_;
  state.skip_sent();
}

[[nodiscard]] inline std::variant<Fetching, Prefilling, Waiting> on(Fetching&& state, Start) {
  taken<Fetching, Start>();
  if (!state.complete()) return std::move(state);
  Fetching done = std::move(state);  // what it does not need goes back here
  const auto arrived = [](const PrefixBlock& block) {
    const auto* here = std::get_if<SealedBlock>(&block);
    return here && here->indexed();
  };
  // With a gap, what came after it is of no use and its room not enough for the rest.
  if (!std::ranges::all_of(done.prefix_, arrived)) return Waiting(std::move(done.sequence_));

  BlockTable& table = done.table_;
  const std::int32_t table_size = ceil_div(done.sequence_->known(), table.block_size());
  table.reserve(ceil_div(done.sequence_->max_length(), table.block_size()));
  for (PrefixBlock& block : done.prefix_) table.append(std::move(std::get<SealedBlock>(block)));
  const std::int32_t hits = table.size();
  for (; table.size() < table_size; done.room_.pop_back()) table.append(std::move(done.room_.back()));
  done.sequence_->note_hits(hits);
  const std::int32_t computed = hits * table.block_size();
  return Prefilling(std::move(done.sequence_), std::move(done.slot_), std::move(table), computed);
}

[[nodiscard]] inline Waiting on(Fetching&& state, Preempt) {
  taken<Fetching, Preempt>();
  Fetching done = std::move(state);  // its slot and blocks go back here
  return Waiting(std::move(done.sequence_));
}
[[nodiscard]] inline Finished on(Fetching&& state, Finish) {
  taken<Fetching, Finish>();
  const Fetching done = std::move(state);
  return {};
}
[[nodiscard]] inline Finished on(Fetching&& state, Abort) {
  taken<Fetching, Abort>();
  const Fetching done = std::move(state);
  return {};
}

[[nodiscard]] inline std::variant<Prefilling, Decoding> on(Prefilling&& state, Compute event) {
  taken<Prefilling, Compute>();
  state.compute(event);
  if (state.remaining() > 0) return std::move(state);
  state.pending_ = 1;
  return Decoding(std::move(state));
}

inline void on(Decoding& state, Grow event) {
  taken<Decoding, Grow>();
  state.table_.append(std::move(event.block));
}

inline void on(Decoding& state, Compute event) {
  taken<Decoding, Compute>();
  state.compute(event);
  ++state.pending_;
}

inline void on(Prefilling& state, Fill event) {
  taken<Prefilling, Fill>();
  state.fill(event);
}
inline void on(Decoding& state, Fill event) {
  taken<Decoding, Fill>();
  state.fill(event);
}
inline void on(Retracting& state, Fill event) {
  taken<Retracting, Fill>();
  state.fill(event);
}

[[nodiscard]] inline std::optional<Ending> on(Decoding& state, Append event) {
  taken<Decoding, Append>();
  return state.append(event);
}
[[nodiscard]] inline std::optional<Ending> on(Retracting& state, Append event) {
  taken<Retracting, Append>();
  return state.append(event);
}

[[nodiscard]] inline Retracting on(Prefilling&& state, Preempt) {
  taken<Prefilling, Preempt>();
  return Retracting(std::move(state));
}
[[nodiscard]] inline Retracting on(Decoding&& state, Preempt) {
  taken<Decoding, Preempt>();
  return Retracting(std::move(state));
}

[[nodiscard]] inline Finished on(Waiting&& state, Finish) {
  taken<Waiting, Finish>();
  const Waiting done = std::move(state);
  return {};
}
[[nodiscard]] inline Finished on(Waiting&& state, Abort) {
  taken<Waiting, Abort>();
  const Waiting done = std::move(state);
  return {};
}
[[nodiscard]] inline Draining on(Prefilling&& state, Finish) {
  taken<Prefilling, Finish>();
  return Draining(std::move(state));
}
[[nodiscard]] inline Draining on(Prefilling&& state, Abort) {
  taken<Prefilling, Abort>();
  return Draining(std::move(state));
}
[[nodiscard]] inline Draining on(Decoding&& state, Finish) {
  taken<Decoding, Finish>();
  return Draining(std::move(state));
}
[[nodiscard]] inline Draining on(Decoding&& state, Abort) {
  taken<Decoding, Abort>();
  return Draining(std::move(state));
}
[[nodiscard]] inline Draining on(Retracting&& state, Finish) {
  taken<Retracting, Finish>();
  return Draining(std::move(state));
}
[[nodiscard]] inline Draining on(Retracting&& state, Abort) {
  taken<Retracting, Abort>();
  return Draining(std::move(state));
}

[[nodiscard]] inline std::variant<Retracting, Waiting> on(Retracting&& state, Land event) {
  taken<Retracting, Land>();
  if (!event.landed.covers(state.last_step_)) return std::move(state);
  Retracting done = std::move(state);  // its slot and blocks go back here
  return Waiting(std::move(done.sequence_));
}

[[nodiscard]] inline std::variant<Draining, Finished> on(Draining&& state, Land event) {
  taken<Draining, Land>();
  if (!event.landed.covers(state.last_step_)) return std::move(state);
  const Draining done = std::move(state);  // its slot and blocks go back here
  return Finished();
}

}  // namespace tokenspeed
