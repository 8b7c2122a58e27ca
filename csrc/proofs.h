// The table of transitions.inc, proved whenever this compiles: every row has an overload of `on` with exactly the
// result of the row, taken exactly as the row says, and no other pair of state and event has any.
#pragma once

#include <concepts>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "transitions.h"

namespace tokenspeed::proofs {

// How a row takes its state. Each excludes the other: an rvalue does not bind to a reference that keeps, and no
// named state is consumed without std::move.
enum class Passing { moves, keeps };

template <class State, class Event>
concept Takes = requires(State state, Event event) { on(std::forward<State>(state), std::move(event)); };

template <class State, class Event, class Result>
concept Gives = requires(State state, Event event) {
  { on(std::forward<State>(state), std::move(event)) } -> std::same_as<Result>;
};

template <class State, class Event, Passing passing, class Result>
inline constexpr bool kLegal = passing == Passing::moves ? Gives<State&&, Event, Result> && !Takes<State&, Event>
                                                         : Gives<State&, Event, Result> && !Takes<State&&, Event>;

// A state moves and is never copied, and moving it cannot fail half-way.
template <class State>
concept MoveOnly = std::is_nothrow_move_constructible_v<State> && !std::is_copy_constructible_v<State> &&
                   !std::is_copy_assignable_v<State> && !std::is_default_constructible_v<State>;

// --- the rows ---

template <class State, class Event>
inline constexpr bool kInTable = false;

#define ROW(State, Event, passing, moved, ...)                       \
  template <>                                                        \
  inline constexpr bool kInTable<State, Event> = true;               \
  static_assert(kLegal<State, Event, Passing::passing, __VA_ARGS__>, \
                "a row without an overload, or its overload gives or takes something else");
#define REQUEST ROW
#define BLOCK ROW
#include "transitions.inc"
#undef ROW

#define REQUEST_STATE(State, owns) static_assert(MoveOnly<State>);
#define BLOCK_STATE(State, owns) static_assert(MoveOnly<State>);
#include "transitions.inc"

// --- the pairs without a row ---

struct End {};  // closes a list, and is itself neither a state nor an event
template <class... Members>
struct List {};
template <class T, class... Members>
constexpr bool has(List<Members...>) {
  return (std::same_as<T, Members> || ...);
}

// clang-format off
using RequestStates = List<
#define REQUEST_STATE(State, owns) State,
#include "transitions.inc"
    End>;
using RequestEvents = List<
#define REQUEST_EVENT(Event, meaning) Event,
#include "transitions.inc"
    End>;
using BlockStates = List<
#define BLOCK_STATE(State, owns) State,
#include "transitions.inc"
    End>;
using BlockEvents = List<
#define BLOCK_EVENT(Event, meaning) Event,
#include "transitions.inc"
    End>;
// clang-format on

// A failure names the pair.
template <class State, class Event>
constexpr bool only_with_a_row() {
  static_assert(kInTable<State, Event> ||
                    !(Takes<State&&, Event> || Takes<State&, Event> || Takes<const State&, Event>),
                "this pair of state and event has an overload but no row in transitions.inc");
  return true;
}

template <class State, class... Events>
constexpr bool only_rows_of(List<Events...>) {
  return (only_with_a_row<State, Events>() && ...);
}

template <class... States, class Events>
constexpr bool only_rows(List<States...>, Events events) {
  return (only_rows_of<States>(events) && ...);
}

static_assert(only_rows(RequestStates(), RequestEvents()) && only_rows(BlockStates(), BlockEvents()));
// Neither kind knows the other's events.
static_assert(only_rows(RequestStates(), BlockEvents()) && only_rows(BlockStates(), RequestEvents()));

// A block state is left by an event or by its destructor, which gives the block back.
#define BLOCK_RELEASE(State, when, Left)                                              \
  static_assert(has<State>(BlockStates()) && !std::is_trivially_destructible_v<State>); \
  static_assert(has<Left>(BlockStates()));
#include "transitions.inc"

// The table's request states are those that a request can have, in the same order.
template <class... States>
List<States..., End> list_of(std::type_identity<std::variant<States...>>);
static_assert(std::same_as<decltype(list_of(std::type_identity<RequestState>())), RequestStates>);

}  // namespace tokenspeed::proofs
