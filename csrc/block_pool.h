// All KV blocks of one device pool: the free list, the prefix index, and the cached blocks in the order of their
// last use. Every operation costs O(1), or O(matched blocks) for a match.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "block.h"

namespace tokenspeed {

// The longest known prefix of a request, as found in the index. Valid until the pool changes.
struct PrefixMatch {
  std::vector<BlockId> blocks;
  std::int32_t num_cached = 0;  // of these, how many have no holder, and so count as available until they are hit
};

class BlockPool {
 public:
  BlockPool(std::int32_t num_blocks, std::int32_t block_size);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // A free block, or the least recently used cached one, evicted. Nothing: every block has a holder.
  [[nodiscard]] std::optional<FreeBlock> take();
  // Fills `match` with the blocks of the longest prefix of `hashes` that the index knows.
  void match(std::span<const Hash> hashes, PrefixMatch& match) const;
  // A share in a block that `match` found.
  [[nodiscard]] SealedBlock hit(BlockId id);
  // Takes the block of this hash out of the index, whoever holds it. Unknown: nothing to do.
  void withdraw(const Hash& hash);

  std::int32_t block_size() const { return block_size_; }
  std::int32_t num_blocks() const { return static_cast<std::int32_t>(blocks_.size()); }
  std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }
  std::int32_t num_cached() const { return num_cached_; }
  std::int32_t num_available() const { return num_free() + num_cached_; }
  std::int32_t num_used() const { return num_blocks() - num_available(); }
  // Grows whenever an admission that failed for want of blocks might succeed now.
  std::uint64_t gains() const { return gains_; }

  // Recounts everything against the holders found from outside: `holders[b]` handles of block b exist, and
  // `writers[b]` of them may write it. The first violation in words, or nothing.
  std::optional<std::string> check(std::span<const std::int32_t> holders, std::span<const std::int32_t> writers) const;

 private:
  enum class Kind : std::int32_t { kFree, kWritable, kSealed, kWithdrawn, kCached };

  struct Block {
    Hash hash;
    std::int32_t previous = kNone;  // towards the least recently used
    std::int32_t next = kNone;
    std::int32_t refs = 0;
    Kind kind = Kind::kFree;
  };

  static constexpr std::int32_t kNone = -1;

  friend class FreeBlock;
  friend class WritableBlock;
  friend class SealedBlock;
  friend class WithdrawnBlock;
  friend class CachedBlock;
  friend WritableBlock on(FreeBlock&&, Open);
  friend FullBlock on(WritableBlock&&, Seal);
  friend SealedBlock on(CachedBlock&&, Hit);
  friend FreeBlock on(CachedBlock&&, Evict);
  friend FreeBlock on(CachedBlock&&, Withdraw);
  friend WithdrawnBlock on(SealedBlock&&, Withdraw);

  Block& operator[](BlockId id) { return blocks_[static_cast<std::size_t>(raw(id))]; }
  const Block& operator[](BlockId id) const { return blocks_[static_cast<std::size_t>(raw(id))]; }

  void put_free(BlockId id);
  void put_cached(BlockId id);
  void let_go(BlockId id);
  CachedBlock take_cached(BlockId id);

  // The index is an open-addressed table of block ids; the hashes themselves lie in `blocks_`.
  std::optional<BlockId> find(const Hash& hash) const;
  bool index_insert(const Hash& hash, BlockId id);
  void index_erase(BlockId id);
  std::size_t index_home(const Hash& hash) const { return static_cast<std::size_t>(hash.low) & (index_.size() - 1); }

  std::optional<std::string> check_lists() const;
  std::optional<std::string> check_index() const;

  std::int32_t block_size_;
  std::vector<Block> blocks_;
  std::vector<BlockId> free_;
  std::vector<std::int32_t> index_;  // block id or kNone; a power of two, at most half full
  std::int32_t num_indexed_ = 0;
  std::int32_t num_cached_ = 0;
  std::int32_t oldest_ = kNone;
  std::int32_t newest_ = kNone;
  std::uint64_t gains_ = 0;
};

}  // namespace tokenspeed
