#include "policy.h"

#include <algorithm>
#include <ranges>

namespace tokenspeed {

namespace {

// Of the time that the floor leaves, what prompts get; the rest is for errors of the model.
constexpr double kSafety = 0.85;
// A sliding second may have so much less than the floor.
constexpr double kTolerance = 0.05;
// Where the floor leaves nothing: the prompts' part of the streams' own time, and seconds spent at once.
constexpr double kLeastShare = 0.5;
constexpr double kLeastBurst = 0.1;
// Smaller parts of a prompt read all weights for few tokens.
constexpr std::int32_t kLeastChunk = 512;

}  // namespace

void Pace::earn(const Work& decode, double floor) {
  const bool asked = decode.rows > 0 && floor > 0;
  learning_ = asked && lessons_ > 0 && model.wants_decodes_alone();
  lessons_ -= learning_;
  limited_ = asked && model.trusted();
  if (!limited_) return;
  decode_ = decode;
  alone_ = model.predict(decode);
  const double left = 1.0 / floor - alone_;
  const double pace = alone_ + kSafety * left;  // seconds from one token of a stream to the next, on average
  burst_ = left > 0 ? std::max(1.0 - (1.0 - kTolerance) * floor * pace, 0.0) : kLeastBurst;
  credit_ = std::min(credit_ + std::max(kSafety * left, kLeastShare * alone_), burst_);
}

bool Pace::reaches(std::int64_t context, double floor) const {
  Work one;
  one.add_decode(context);
  return carries(one, floor);
}

std::int32_t Pace::prompt_tokens(std::int32_t computed, std::int32_t remaining, std::int32_t most) const {
  if (learning_) return 0;
  if (!limited_) return most;
  std::int32_t fits = 0;
  for (std::int32_t beyond = most + 1; beyond - fits > 1;) {
    const std::int32_t middle = fits + (beyond - fits) / 2;
    (cost(computed, middle) <= credit_ ? fits : beyond) = middle;
  }
  const std::int32_t wanted = std::min(remaining, most);
  if (fits >= wanted) return fits;
  // Only a part of it: as large a part as can be saved up for.
  return credit_ < burst_ ? 0 : std::max(fits, std::min(wanted, kLeastChunk));
}

void Pace::spend(const Work& planned) {
  if (limited_) credit_ -= model.predict(planned) - alone_;  // 0 where nothing was added
}

double Pace::cost(std::int32_t computed, std::int32_t tokens) const {
  Work both = decode_;
  both.add_prompt(computed, tokens);
  return model.predict(both) - alone_;
}

void Promises::add(std::int64_t known, double floor) {
  if (floor > 0) ++floors_[floor];
  ++count_;
  known_ += known;
}

void Promises::remove(std::int64_t known, double floor) {
  const auto held = floors_.find(floor);
  if (floor > 0 && --held->second == 0) floors_.erase(held);
  --count_;
  known_ -= known;
}

Work Promises::streams(std::int32_t more, std::int32_t most) const {
  const std::int64_t all = count_ + 1;
  Work work;
  work.rows = static_cast<std::int32_t>(std::min<std::int64_t>(all, most));
  work.tokens = work.rows;
  work.context = (known_ + more) * work.rows / all;
  return work;
}

double Promises::tightest(const Pace& pace) const {
  for (const auto& [floor, count] : std::views::reverse(floors_)) {
    if (pace.reaches(0, floor)) return floor;
  }
  return 0;
}

}  // namespace tokenspeed
