// How often each transition was taken, counted only in builds that ask for it.
#pragma once

#include <cstdint>

namespace tokenspeed {

#ifdef TOKENSPEED_COUNT_TRANSITIONS
inline constexpr bool kCountTransitions = true;
#else
inline constexpr bool kCountTransitions = false;
#endif

template <class State, class Event>
inline std::int64_t times_taken = 0;

template <class State, class Event>
void taken() {
  if constexpr (kCountTransitions) ++times_taken<State, Event>;
}

}  // namespace tokenspeed
