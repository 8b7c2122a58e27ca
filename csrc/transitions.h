// The events of a request: one overload for every legal pair of state and event, and no other.
#pragma once

#include <concepts>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "request.h"

namespace tokenspeed {

[[nodiscard]] inline Prefilling on(Waiting&& state, Admit event) {
  const std::int32_t computed = event.num_hits * event.table.block_size();
  state.sequence_->note_hits(event.num_hits);
  return Prefilling(std::move(state.sequence_), std::move(event.slot), std::move(event.table), computed);
}

[[nodiscard]] inline std::variant<Prefilling, Decoding> on(Prefilling&& state, Compute event) {
  state.compute(event);
  if (state.remaining() > 0) return std::move(state);
  state.pending_ = 1;
  return Decoding(std::move(state));
}

inline void on(Decoding& state, Grow event) { state.table_.append(std::move(event.block)); }

inline void on(Decoding& state, Compute event) {
  state.compute(event);
  ++state.pending_;
}

inline void on(Prefilling& state, Fill event) { state.fill(event); }
inline void on(Decoding& state, Fill event) { state.fill(event); }
inline void on(Retracting& state, Fill event) { state.fill(event); }

[[nodiscard]] inline std::optional<Ending> on(Decoding& state, Append event) { return state.append(event); }
[[nodiscard]] inline std::optional<Ending> on(Retracting& state, Append event) { return state.append(event); }

[[nodiscard]] inline Retracting on(Prefilling&& state, Preempt) { return Retracting(std::move(state)); }
[[nodiscard]] inline Retracting on(Decoding&& state, Preempt) { return Retracting(std::move(state)); }

[[nodiscard]] inline Finished on(Waiting&& state, Finish) {
  state.sequence_.reset();
  return {};
}
[[nodiscard]] inline Finished on(Waiting&& state, Abort) { return on(std::move(state), Finish{}); }
[[nodiscard]] inline Draining on(Prefilling&& state, Finish) { return Draining(std::move(state)); }
[[nodiscard]] inline Draining on(Prefilling&& state, Abort) { return Draining(std::move(state)); }
[[nodiscard]] inline Draining on(Decoding&& state, Finish) { return Draining(std::move(state)); }
[[nodiscard]] inline Draining on(Decoding&& state, Abort) { return Draining(std::move(state)); }
[[nodiscard]] inline Draining on(Retracting&& state, Finish) { return Draining(std::move(state)); }
[[nodiscard]] inline Draining on(Retracting&& state, Abort) { return Draining(std::move(state)); }

[[nodiscard]] inline std::variant<Retracting, Waiting> on(Retracting&& state, Land event) {
  if (!event.landed.covers(state.last_step_)) return std::move(state);
  Retracting done = std::move(state);  // its slot and blocks go back here
  return Waiting(std::move(done.sequence_));
}

[[nodiscard]] inline std::variant<Draining, Finished> on(Draining&& state, Land event) {
  if (!event.landed.covers(state.last_step_)) return std::move(state);
  const Draining done = std::move(state);  // its slot and blocks go back here
  return Finished();
}

// --- the table of request.h, proved whenever this compiles ---

template <class State, class Event, class Result>
concept Gives = requires(State&& state, Event event) {
  { on(std::forward<State>(state), std::move(event)) } -> std::same_as<Result>;
};

static_assert(Gives<Waiting, Admit, Prefilling>);
static_assert(Gives<Waiting, Finish, Finished> && Gives<Waiting, Abort, Finished>);
static_assert(Gives<Prefilling, Compute, std::variant<Prefilling, Decoding>>);
static_assert(Gives<Prefilling&, Fill, void>);
static_assert(Gives<Prefilling, Preempt, Retracting>);
static_assert(Gives<Prefilling, Finish, Draining> && Gives<Prefilling, Abort, Draining>);
static_assert(Gives<Decoding&, Grow, void> && Gives<Decoding&, Compute, void> && Gives<Decoding&, Fill, void>);
static_assert(Gives<Decoding&, Append, std::optional<Ending>>);
static_assert(Gives<Decoding, Preempt, Retracting>);
static_assert(Gives<Decoding, Finish, Draining> && Gives<Decoding, Abort, Draining>);
static_assert(Gives<Retracting&, Fill, void> && Gives<Retracting&, Append, std::optional<Ending>>);
static_assert(Gives<Retracting, Land, std::variant<Retracting, Waiting>>);
static_assert(Gives<Retracting, Finish, Draining> && Gives<Retracting, Abort, Draining>);
static_assert(Gives<Draining, Land, std::variant<Draining, Finished>>);

static_assert(Gives<FreeBlock, Open, WritableBlock>);
static_assert(Gives<WritableBlock, Seal, FullBlock>);
static_assert(Gives<SealedBlock, Withdraw, WithdrawnBlock>);
static_assert(Gives<CachedBlock, Hit, SealedBlock>);
static_assert(Gives<CachedBlock, Evict, FreeBlock> && Gives<CachedBlock, Withdraw, FreeBlock>);

// A state moves and is never copied, and moving it cannot fail half-way.
template <class State>
concept MoveOnly = std::is_nothrow_move_constructible_v<State> && !std::is_copy_constructible_v<State> &&
                   !std::is_copy_assignable_v<State>;

static_assert(MoveOnly<Waiting> && MoveOnly<Prefilling> && MoveOnly<Decoding>);
static_assert(MoveOnly<Retracting> && MoveOnly<Draining> && MoveOnly<Finished>);
static_assert(MoveOnly<FreeBlock> && MoveOnly<WritableBlock> && MoveOnly<SealedBlock>);
static_assert(MoveOnly<WithdrawnBlock> && MoveOnly<CachedBlock>);

}  // namespace tokenspeed
