#include "policy.h"

namespace tokenspeed {

std::int32_t chunk(const StepBudget& budget, std::int32_t remaining) { return std::min(budget.tokens(), remaining); }

bool blocks_suffice(const Demand& demand, std::int32_t block_size, std::int32_t available, std::int32_t running) {
  const std::int32_t fresh = ceil_div(demand.known + 1, block_size) - demand.num_hits;
  return fresh + running <= available - demand.num_cached_hits;
}

}  // namespace tokenspeed
