// A submission during which an allocation fails, whichever it is, throws std::bad_alloc and changes nothing.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "scheduler.h"

namespace {
std::int64_t allocations_left = -1;  // before one fails, < 0: none does
}

void* operator new(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using namespace tokenspeed;

constexpr Limits kLimits{.num_blocks = 64, .block_size = 2, .max_rows = 8, .max_tokens = 64, .max_blocks = 32,
                         .max_deltas = 80, .max_model_len = 64, .max_queued = 64, .num_host_blocks = 16,
                         .max_copies = 8};

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

void expect_sound(const Scheduler& scheduler) {
  if (const std::optional<std::string> broken = scheduler.check()) fail(*broken);
}

// How often a submission fails before it succeeds, when ever later allocations of it do.
int starve(Scheduler& scheduler, const Submission& submission) {
  for (int failures = 0;; ++failures) {
    const Counters before = scheduler.counters();
    allocations_left = failures;
    try {
      const Refusal refusal = scheduler.submit(submission);
      allocations_left = -1;
      if (refusal != Refusal::kNone) fail("refused");
      expect_sound(scheduler);
      return failures;
    } catch (const std::bad_alloc&) {
      allocations_left = -1;
    }
    const Counters after = scheduler.counters();
    if (std::memcmp(&before, &after, sizeof before) != 0) fail("a failed submission is counted");
    if (scheduler.holds(submission.id)) fail("a failed submission is held");
    expect_sound(scheduler);
  }
}

}  // namespace

int main() {
  std::vector<TokenId> prompt(40);
  std::iota(prompt.begin(), prompt.end(), 0);
  const std::vector<TokenId> stop_ids{3, 1, 2};
  Scheduler scheduler(kLimits, {}, true, {1, 2});
  RequestId id = 0;
  int failures = 0;
  for (const std::int64_t session : {0, 0, 7, 7}) {  // a new one, and its next turn
    for (const double floor : {-1.0, 5.0, 6.0}) {
      const Submission submission{.id = ++id, .now = 0, .prompt = prompt, .max_tokens = 9, .min_tokens = 0,
                                  .stop_ids = stop_ids, .salt = {}, .priority = 0, .reuse_prefix = true,
                                  .session = session, .tps_floor = floor};
      failures += starve(scheduler, submission);
      if (floor > 5) scheduler.abort(id);  // its session is idle when the next one comes
    }
  }
  while (id > 0) scheduler.abort(id--);
  expect_sound(scheduler);
  if (scheduler.num_unfinished() != 0) fail("something is left");
  std::printf("%d allocations failed, 0 violations\n", failures);
  return 0;
}
