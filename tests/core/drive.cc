// Random calls against the control plane without Python, for sanitizers and long runs: the self-check runs after
// every call, and when all is over nothing may be left.
//
//   drive OPERATIONS FIRST_SEED SEEDS
//
// Built with -DTOKENSPEED_COUNT_TRANSITIONS it also prints how often each legal pair of state and event was taken.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

#include "scheduler.h"
#include "taken.h"

namespace {

using namespace tokenspeed;

class Driver {
 public:
  explicit Driver(std::uint64_t seed)
      : seed_(seed), random_(seed), limits_(draw()), scheduler_(limits_, draw_policy(), chance(90), {seed, ~seed}) {
    rows_.resize(static_cast<std::size_t>(limits_.max_rows) * 7);
    copies_.resize(static_cast<std::size_t>(limits_.max_copies) * 4);
    tokens_.resize(static_cast<std::size_t>(limits_.max_tokens));
    deltas_.resize(static_cast<std::size_t>(limits_.max_deltas) * 3);
    ids_.resize(static_cast<std::size_t>(limits_.max_rows));
    overlap_ = below(2);
    hungry_ = chance(50);
    slow_copies_ = chance(40);
    slow_loads_ = chance(40);
    if (seed % 4 && !scheduler_.open_cache_log()) fail("a log that begins with the scheduler was refused");
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
      } else if (dice < 20) {
        chance(90) ? abuse() : drop_cached();
      } else if (dice < 22) {
        end_one_that("Retracting", "Fetching");
      } else if (dice < (slow_copies_ ? 24 : 40) && !tickets_.empty()) {
        land_copies(!slow_loads_);
      } else {
        advance();
      }
      check();
    }
    for (int i = 0; scheduler_.num_unfinished() > 0 || scheduler_.in_flight() > 0 || !tickets_.empty(); ++i) {
      if (i > 1'000'000) fail("requests never end");
      if (!tickets_.empty() && chance(50)) land_copies();
      advance();
      check();
    }
    drop_cached();
    check();
    read_cache_log();
    if (!told_.empty()) fail("blocks are left in the cache log at the end");
    const Counters end = scheduler_.counters();
    if (end.running + end.waiting + end.draining + end.copies_in_flight + end.blocks_used != 0) {
      fail("something is left at the end");
    }
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
    limits.num_host_blocks = chance(70) ? 1 + below(40) : 0;
    limits.max_copies = 1 + below(12);
    return limits;
  }

  PolicySettings draw_policy() {
    PolicySettings policy{};
    policy.tps_floor = chance(60) ? 1 + below(200) : 0;
    policy.floor_is_promise = chance(20);
    policy.footprints = chance(70);
    policy.max_queue_seconds = below(100);
    return policy;
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
    s.now = now_;
    s.session = chance(30) ? 1 + below(5) : 0;
    s.tps_floor = chance(80) ? -1 : below(100);
    if (scheduler_.submit(s) == Refusal::kNone) {
      ++changed_;
      ids_given_ = std::max(ids_given_, s.id + 1);
    }
  }

  // States that a request is seldom in would seldom see an end.
  void end_one_that(const std::string& is, const std::string& or_is) {
    if (scheduler_.counters().draining == 0 && tickets_.empty()) return;
    for (const RequestDump& request : scheduler_.dump()) {
      if (request.state != is && request.state != or_is) continue;
      changed_ += chance(50) ? scheduler_.abort(request.id) : scheduler_.finish(request.id, 0);
      return;
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
      if (in_flight == 0 && !tickets_.empty()) return land_copies();
      if (in_flight == 0 && scheduler_.num_unfinished() > 0) fail("work is left and nothing moves");
    }
    if (scheduler_.in_flight() > 0) commit();
  }

  // Some of the copies that are under way end, in any order.
  void land_copies(bool loads_too = true) {
    std::vector<std::int32_t> landed, failed;
    for (int i = 1 + below(static_cast<int>(tickets_.size())); i > 0; --i) {
      const auto at = static_cast<std::size_t>(below(static_cast<int>(tickets_.size())));
      if (tickets_[at].is_load && !loads_too) continue;
      (chance(5) ? failed : landed).push_back(tickets_[at].id);
      tickets_[at] = tickets_.back();
      tickets_.pop_back();
    }
    if (landed.empty() && failed.empty()) return;
    if (scheduler_.land_copies(landed, failed) != Misuse::kNone) fail("the end of a copy was refused");
    if (scheduler_.land_copies(landed, failed) != Misuse::kNoSuchTicket) fail("a copy ended twice");
    ++changed_;
  }

  void drop_cached() {
    const Counters before = scheduler_.counters();
    const std::int32_t dropped = scheduler_.drop_cached();
    const Counters after = scheduler_.counters();
    if (after.blocks_cached != 0 || after.blocks_free != before.blocks_free + before.blocks_cached ||
        dropped != before.blocks_cached + before.host_blocks_used - after.host_blocks_used) {
      fail("not every cached block was dropped");
    }
    ++changed_;
  }

  // Calls that make no sense: `check` runs after them, and the counters must be what they were.
  void abuse() {
    const Counters before = scheduler_.counters();
    const std::int32_t some = tickets_.empty() ? 0 : tickets_.front().id;
    const std::int32_t twice[] = {some, some};
    const std::int32_t unknown[] = {1'000'000};
    if (scheduler_.land_copies(twice, {}) != Misuse::kNoSuchTicket) fail("a ticket was accepted twice");
    if (scheduler_.land_copies({}, unknown) != Misuse::kNoSuchTicket) fail("an unknown ticket was accepted");
    if (scheduler_.commit(planned_ + 100, {}, {}, 0) != Misuse::kNoSuchStep) fail("an unknown step was committed");
    PlanArrays none{};
    if (planned_ && scheduler_.in_flight() < 2 && scheduler_.plan(-1, none) != Misuse::kTimeRunsBackwards) {
      fail("time ran backwards");
    }
    if (scheduler_.abort(-5) || scheduler_.finish(-5, 0)) fail("an unknown request ended");
    const Counters after = scheduler_.counters();
    if (std::memcmp(&before, &after, sizeof before) != 0) fail("a call that makes no sense changed something");
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
    plan.copies = copies_.data();
    now_ += chance(3) ? below(200) : 0.01;
    ++planned_;
    if (scheduler_.plan(now_, plan) != Misuse::kNone) fail("a plan was refused");
    if (plan.empty()) return false;
    if (plan.num_tokens > limits_.max_tokens || plan.num_deltas > limits_.max_deltas ||
        plan.num_copies > limits_.max_copies || plan.num_rows > limits_.max_rows) {
      fail("a plan is larger than its limits");
    }
    for (std::int32_t i = 0; i < plan.num_copies; ++i) {
      const std::int32_t* copy = &copies_[static_cast<std::size_t>(i) * 4];
      tickets_.push_back({copy[0], copy[1] == kToDevice});
    }
    samples_.push_back(plan.num_samples);
    ++changed_;
    return true;
  }

  void commit() {
    const auto count = static_cast<std::size_t>(samples_.front());
    samples_.erase(samples_.begin());
    std::vector<TokenId> tokens(count);
    std::vector<std::int32_t> counts(count, 1);
    const double seconds = chance(90) ? (1 + below(50)) * 1e-3 : 0;
    for (TokenId& token : tokens) token = chance(2) ? kNotFinite : below(5);
    if (scheduler_.commit(++committed_, tokens, counts, seconds) != Misuse::kNone) fail("a commit was refused");
    if (scheduler_.commit(committed_, tokens, counts, 0) != Misuse::kNoSuchStep) fail("a step was committed twice");
    ++changed_;
    if (chance(50)) read_cache_log();
  }

  // Whoever reads it hears of a block's end only after its beginning, and in turns.
  void read_cache_log() {
    CacheLog& log = scheduler_.cache_log();
    for (const CacheRecord& record : log.records()) {
      if (record.change == CacheChange::kCleared) {
        told_.clear();
      } else if (record.change == CacheChange::kStored ? !told_.insert(record.hash).second : !told_.erase(record.hash)) {
        fail("a block is told of twice");
      }
    }
    log.taken();
  }

  void check() {
    if (const auto broken = scheduler_.check()) fail(*broken);
  }

  [[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "seed %llu, after %lld changes: %s\n", static_cast<unsigned long long>(seed_),
                 static_cast<long long>(changed_), what.c_str());
    for (const RequestDump& request : scheduler_.dump()) {
      std::fprintf(stderr, "  request %lld %s: %d known, %d computed, %zu blocks\n", static_cast<long long>(request.id),
                   request.state.c_str(), request.known, request.computed, request.blocks.size());
    }
    const Counters now = scheduler_.counters();
    std::fprintf(stderr, "  %d of %d blocks free, %d cached, %d of %d host blocks used, %d copies, %d sessions wait\n",
                 now.blocks_free, limits_.num_blocks, now.blocks_cached, now.host_blocks_used, limits_.num_host_blocks,
                 now.copies_in_flight, now.sessions_waiting);
    std::exit(1);
  }

  std::uint64_t seed_;
  std::mt19937_64 random_;
  Limits limits_;
  Scheduler scheduler_;
  std::vector<std::int32_t> rows_, tokens_, deltas_, copies_;
  struct Ticket {
    std::int32_t id;
    bool is_load;
  };
  std::vector<Ticket> tickets_;
  std::vector<std::int64_t> ids_;
  std::vector<std::int32_t> samples_;
  std::unordered_set<std::int64_t> told_;  // of the cache log
  RequestId ids_given_ = 0;
  int overlap_ = 0;
  bool hungry_ = false;  // requests are short and go on to their greatest length, so that they starve each other
  double now_ = 0;
  bool slow_copies_ = false;
  bool slow_loads_ = false;  // they land only when nothing else moves
  std::int64_t planned_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t changed_ = 0;
  std::int64_t preemptions_ = 0;
};

void print_transitions() {
#define PAIR(State, Event, ...) \
  std::printf("%-16s %-10s %14lld\n", #State, #Event, static_cast<long long>(times_taken<State, Event>));
#define REQUEST PAIR
#define BLOCK PAIR
#include "transitions.inc"
}

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
  if (kCountTransitions) print_transitions();
  return 0;
}
