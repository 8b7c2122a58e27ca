// From a content hash to the block that holds it, and the hash of each indexed block.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "hash.h"

namespace tokenspeed {

// An open-addressed table of ids below `num_ids`, at most half full. No allocation after construction.
class HashIndex {
 public:
  static constexpr std::int32_t kNone = -1;

  explicit HashIndex(std::int32_t num_ids)
      : hashes_(static_cast<std::size_t>(num_ids)), table_(std::bit_ceil(2 * hashes_.size() + 1), kNone) {}

  std::int32_t size() const { return size_; }
  const Hash& hash(std::int32_t id) const { return hashes_[static_cast<std::size_t>(id)]; }
  // The ids in the table, kNone in between.
  const std::vector<std::int32_t>& table() const { return table_; }

  // The id of this hash, or kNone.
  std::int32_t find(const Hash& hash) const {
    std::size_t at = home(hash);
    while (table_[at] != kNone && this->hash(table_[at]) != hash) at = next(at);
    return table_[at];
  }

  // False: another id has this hash already, nothing has changed.
  [[nodiscard]] bool insert(const Hash& hash, std::int32_t id) {
    std::size_t at = home(hash);
    for (; table_[at] != kNone; at = next(at)) {
      if (this->hash(table_[at]) == hash) return false;
    }
    table_[at] = id;
    hashes_[static_cast<std::size_t>(id)] = hash;
    ++size_;
    return true;
  }

  // Takes out an id, which must be in.
  void erase(std::int32_t id) {
    const std::size_t mask = table_.size() - 1;
    std::size_t hole = home(hash(id));
    while (table_[hole] != id) hole = next(hole);
    // Close the gap, so that no search stops early: move up every later entry whose home is not past the hole.
    for (std::size_t at = next(hole); table_[at] != kNone; at = next(at)) {
      if (((at - home(hash(table_[at]))) & mask) < ((at - hole) & mask)) continue;
      table_[hole] = table_[at];
      hole = at;
    }
    table_[hole] = kNone;
    --size_;
  }

 private:
  std::size_t home(const Hash& hash) const { return static_cast<std::size_t>(hash.low) & (table_.size() - 1); }
  std::size_t next(std::size_t at) const { return (at + 1) & (table_.size() - 1); }

  std::vector<Hash> hashes_;
  std::vector<std::int32_t> table_;
  std::int32_t size_ = 0;
};

}  // namespace tokenspeed
