// How often something has happened lately.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace tokenspeed {

// The last 64 times at which it happened.
class Rate {
 public:
  void begin(double now) {
    count_ = 0;
    note(now);
  }
  void note(double now) {
    times_[next_++ % times_.size()] = now;
    if (count_ < times_.size()) ++count_;
  }
  // Seconds from one to the next, the time since the last one included; nothing: it has hardly happened yet.
  std::optional<double> interval(double now) const {
    if (count_ < 2) return std::nullopt;
    const double first = times_[(next_ - count_) % times_.size()];
    return (now - first) / static_cast<double>(count_);
  }

 private:
  std::array<double, 64> times_{};
  std::size_t next_ = 0;
  std::size_t count_ = 0;
};

}  // namespace tokenspeed
