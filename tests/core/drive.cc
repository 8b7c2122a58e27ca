// Random calls against the control plane without Python, for sanitizers and long runs: the self-check runs after
// every call, and when all is over nothing may be left.
//
//   drive OPERATIONS FIRST_SEED SEEDS
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "scheduler.h"

namespace {

using namespace tokenspeed;

class Driver {
 public:
  explicit Driver(std::uint64_t seed) : random_(seed), limits_(draw()), scheduler_(limits_, chance(90), {seed, ~seed}) {
    rows_.resize(static_cast<std::size_t>(limits_.max_rows) * 7);
    tokens_.resize(static_cast<std::size_t>(limits_.max_tokens));
    deltas_.resize(static_cast<std::size_t>(limits_.max_deltas) * 3);
    ids_.resize(static_cast<std::size_t>(limits_.max_rows));
    overlap_ = below(2);
    hungry_ = chance(50);
  }

  void run(std::int64_t operations) {
    for (std::int64_t i = 0; i < operations; ++i) {
      const int dice = below(100);
      if (dice < 12) {
        submit();
      } else if (dice < (hungry_ ? 13 : 15)) {
        changed_ += scheduler_.abort(below(8) ? some_id() : -1);
      } else if (dice < (hungry_ ? 14 : 17)) {
        finish();
      } else {
        advance();
      }
      check();
    }
    for (int i = 0; scheduler_.num_unfinished() > 0; ++i) {
      if (i > 1'000'000) fail("requests never end");
      advance();
      check();
    }
    const Counters end = scheduler_.counters();
    if (end.running + end.waiting + end.draining + end.blocks_used != 0) fail("something is left at the end");
    preemptions_ = end.preemptions;
  }

  std::int64_t changed() const { return changed_; }
  std::int64_t preemptions() const { return preemptions_; }

 private:
  int below(int n) { return static_cast<int>(random_() % static_cast<std::uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }

  Limits draw() {
    Limits limits{};
    limits.block_size = 1 + below(5);
    limits.num_blocks = 2 + below(30);
    limits.max_rows = 1 + below(8);
    limits.max_tokens = limits.max_rows + below(20);
    limits.max_blocks = 4 + below(20);
    limits.max_deltas = limits.max_blocks + limits.max_rows + ceil_div(limits.max_tokens, limits.block_size);
    limits.max_model_len = 4 + below(100);
    limits.max_queued = 1 + below(12);
    return limits;
  }

  // One of the latest ids, in use or not.
  RequestId some_id() {
    return ids_given_ == 0 ? 0 : ids_given_ - 1 - below(static_cast<int>(std::min<RequestId>(ids_given_, 12)));
  }

  void submit() {
    const int longest = hungry_ ? limits_.max_model_len / 4 + 2 : limits_.max_model_len + 2;
    std::vector<TokenId> prompt(static_cast<std::size_t>(below(longest)));
    const int split = below(static_cast<int>(prompt.size()) + 1);
    for (int i = 0; i < static_cast<int>(prompt.size()); ++i) {
      prompt[static_cast<std::size_t>(i)] = i < split ? i % 5 : below(5);
    }
    const TokenId stop[] = {below(5)};
    const std::byte salt[] = {std::byte{1}};
    Submission s{};
    s.id = chance(3) ? some_id() : ids_given_;
    s.prompt = prompt;
    s.max_tokens = hungry_ || chance(20) ? -1 : 1 + below(40);
    s.min_tokens = below(3);
    if (!hungry_ && chance(40)) s.stop_ids = stop;
    if (chance(20)) s.salt = salt;
    s.priority = below(3);
    s.reuse_prefix = chance(90);
    if (scheduler_.submit(s) == Refusal::kNone) {
      ++changed_;
      ids_given_ = std::max(ids_given_, s.id + 1);
    }
  }

  void finish() {
    const RequestId id = some_id();
    const Sequence* sequence = scheduler_.sequence_of(id);
    changed_ += scheduler_.finish(id, sequence ? below(sequence->num_generated() + 1) : 0);
  }

  void advance() {
    const int in_flight = scheduler_.in_flight();
    if (in_flight == 0 || (in_flight <= overlap_ && chance(70))) {
      if (plan()) return;
      if (in_flight == 0 && scheduler_.num_unfinished() > 0) fail("work is left and nothing moves");
    }
    if (scheduler_.in_flight() > 0) commit();
  }

  bool plan() {
    PlanArrays plan{};
    const auto rows = static_cast<std::size_t>(limits_.max_rows);
    plan.row_slot = rows_.data();
    plan.row_new = plan.row_slot + rows;
    plan.row_computed = plan.row_new + rows;
    plan.sample_rows = plan.row_computed + rows;
    plan.released = plan.sample_rows + rows;
    plan.bound = plan.released + rows;
    plan.token_ids = tokens_.data();
    plan.table_delta = deltas_.data();
    plan.bound_ids = ids_.data();
    if (scheduler_.plan(static_cast<double>(++planned_), plan) != Misuse::kNone) fail("a plan was refused");
    if (plan.num_rows == 0) return false;
    samples_.push_back(plan.num_samples);
    ++changed_;
    return true;
  }

  void commit() {
    const auto count = static_cast<std::size_t>(samples_.front());
    samples_.erase(samples_.begin());
    std::vector<TokenId> tokens(count);
    std::vector<std::int32_t> counts(count, 1);
    for (TokenId& token : tokens) token = chance(2) ? kNotFinite : below(5);
    if (scheduler_.commit(++committed_, tokens, counts) != Misuse::kNone) fail("a commit was refused");
    if (scheduler_.commit(committed_, tokens, counts) != Misuse::kNoSuchStep) fail("a step was committed twice");
    ++changed_;
  }

  void check() {
    if (const auto broken = scheduler_.check()) fail(*broken);
  }

  [[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "after %lld changes: %s\n", static_cast<long long>(changed_), what.c_str());
    std::exit(1);
  }

  std::mt19937_64 random_;
  Limits limits_;
  Scheduler scheduler_;
  std::vector<std::int32_t> rows_, tokens_, deltas_;
  std::vector<std::int64_t> ids_;
  std::vector<std::int32_t> samples_;
  RequestId ids_given_ = 0;
  int overlap_ = 0;
  bool hungry_ = false;  // requests are short and go on to their greatest length, so that they starve each other
  std::int64_t planned_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t changed_ = 0;
  std::int64_t preemptions_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: drive OPERATIONS FIRST_SEED SEEDS\n");
    return 2;
  }
  const std::int64_t operations = std::atoll(argv[1]);
  const std::int64_t first = std::atoll(argv[2]);
  const std::int64_t seeds = std::atoll(argv[3]);
  std::int64_t changed = 0;
  std::int64_t preemptions = 0;
  for (std::int64_t seed = first; seed < first + seeds; ++seed) {
    Driver driver(static_cast<std::uint64_t>(seed));
    driver.run(operations);
    changed += driver.changed();
    preemptions += driver.preemptions();
  }
  std::printf("%lld seeds, %lld calls that changed state, %lld preemptions, 0 violations\n",
              static_cast<long long>(seeds), static_cast<long long>(changed), static_cast<long long>(preemptions));
  return 0;
}
