// The blocks of one request in the order of its positions, and the steps whose landing fills them.
#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "block_pool.h"
#include "sequence.h"
#include "steps.h"

namespace tokenspeed {

class BlockTable {
 public:
  using Entry = std::variant<WritableBlock, SealedBlock, WithdrawnBlock>;

  explicit BlockTable(BlockPool& pool) : block_size_(pool.block_size()) {}
  BlockTable(BlockTable&&) noexcept = default;
  BlockTable& operator=(BlockTable&&) = delete;
  // The tail first: a cached chain is then evicted from its end, and its head stays useful.
  ~BlockTable() {
    while (!entries_.empty()) entries_.pop_back();
  }

  void reserve(std::int32_t blocks) { entries_.reserve(static_cast<std::size_t>(blocks)); }
  void append(SealedBlock&& block) {
    entries_.emplace_back(std::move(block));
    ++num_full_;
  }
  void append(FreeBlock&& block) { entries_.emplace_back(on(std::move(block), Open{})); }

  // Seals every block whose positions have all landed. `sequence` has hashed at least these.
  void seal(Filled filled, const Sequence& sequence) {
    const auto full = static_cast<std::size_t>(filled.num_tokens() / block_size_);
    for (; num_full_ < full; ++num_full_) {
      Entry& entry = entries_[num_full_];
      FullBlock block = on(std::move(std::get<WritableBlock>(entry)), Seal(sequence.block(num_full_)));
      std::visit([&entry]<class Full>(Full& b) { entry.emplace<Full>(std::move(b)); }, block);
    }
  }

  std::int32_t block_size() const { return block_size_; }
  std::int32_t size() const { return static_cast<std::int32_t>(entries_.size()); }
  std::int32_t num_full() const { return static_cast<std::int32_t>(num_full_); }
  std::span<const Entry> entries() const { return entries_; }
  BlockId operator[](std::int32_t position) const {
    return std::visit([](const BlockHandle& block) { return block.id(); }, entries_[static_cast<std::size_t>(position)]);
  }

 private:
  std::vector<Entry> entries_;
  std::size_t num_full_ = 0;  // entries before it are full, entries from it on are writable
  std::int32_t block_size_;
};

}  // namespace tokenspeed
