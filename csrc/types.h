// Names and numbers that every part of the control plane shares.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace tokenspeed {

using RequestId = std::int64_t;
using TokenId = std::int32_t;

// Ids of different kinds do not convert into each other.
enum class BlockId : std::int32_t {};
enum class HostId : std::int32_t {};    // a block's place in host memory
enum class TicketId : std::int32_t {};  // of a copy between the two
enum class SlotId : std::int32_t {};
enum class StepId : std::int64_t {};

constexpr std::int32_t raw(BlockId id) { return static_cast<std::int32_t>(id); }
constexpr std::int32_t raw(HostId id) { return static_cast<std::int32_t>(id); }
constexpr std::int32_t raw(TicketId id) { return static_cast<std::int32_t>(id); }
constexpr std::int32_t raw(SlotId id) { return static_cast<std::int32_t>(id); }
constexpr std::int64_t raw(StepId id) { return static_cast<std::int64_t>(id); }

// In a plan: the input token is `last_token[slot]` on the device.
inline constexpr TokenId kOnDevice = -1;
// In a step result: the logits of the row were not finite, nothing was sampled.
inline constexpr TokenId kNotFinite = -1;

// Values shared with tokenspeed.batch.Finish.
enum class FinishReason : std::int32_t { kNone = 0, kStop = 1, kLength = 2, kAbort = 3, kError = 4 };

// Why a submission is answered with "no". Values shared with tokenspeed._core.types.Refusal.
enum class Refusal : std::int32_t {
  kNone = 0,
  kQueueFull = 1,
  kTooLong = 2,
  kTooLongForCache = 3,
  kEmpty = 4,
  kDuplicateId = 5,
  kBadToken = 6,
  kFloor = 7,
  kNoRoom = 8,
  kFloorOutOfReach = 9,
};

// What the caller did wrong with a step. Nothing has changed when one of these is returned.
enum class Misuse : std::int32_t {
  kNone = 0,
  kTimeRunsBackwards = 1,
  kTooManyInFlight = 2,
  kNoSuchStep = 3,
  kWrongShape = 4,
  kBadResult = 5,
  kNoSuchTicket = 6,
};

// The largest batch, as in tokenspeed.batch.BatchLimits, and the sizes of what is shared out.
struct Limits {
  std::int32_t num_blocks;
  std::int32_t block_size;
  std::int32_t max_rows;    // also the number of slots
  std::int32_t max_tokens;  // of one step
  std::int32_t max_blocks;  // of one request
  std::int32_t max_deltas;  // of one step
  std::int32_t max_model_len;
  std::int32_t max_queued;
  std::int32_t num_host_blocks;  // of the second tier, 0: there is none
  std::int32_t max_copies;       // of one step, between the tiers
};

// The control plane found its own state inconsistent: the process must end, never continue.
class InvariantBroken : public std::logic_error {
  using std::logic_error::logic_error;
};

// A visitor made of lambdas. A state without a lambda does not compile.
template <class... Visits>
struct Overloaded : Visits... {
  using Visits::operator()...;
};

constexpr std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>((static_cast<std::int64_t>(a) + b - 1) / b);
}

}  // namespace tokenspeed
