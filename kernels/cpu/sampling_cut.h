// What sampling does not do in vectors, compiled once for all instruction sets.
#pragma once

#include <cstdint>

namespace tokenspeed::cpu {

// Puts the n-th largest (from 0) of `count` in its place, larger ones before it.
void select_descending(float* values, int64_t count, int64_t n);
void sort_descending(float* values, int64_t count);

// The uniform number in [0, 1) of (seed, position): the upper 53 bits of the (position + 1)-th output of SplitMix64
// started at mix(seed) (Steele, Lea and Flood, 2014).
double uniform(int64_t seed, int64_t position);

}  // namespace tokenspeed::cpu
