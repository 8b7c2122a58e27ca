// All KV blocks of one device pool: the free list, the prefix index, and the cached blocks in the order of their
// last use. Every operation is O(1).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "block.h"
#include "cache_log.h"
#include "hash_index.h"
#include "lru.h"

namespace tokenspeed {

class BlockPool {
 public:
  // `log` is told which blocks the index gains and loses.
  BlockPool(std::int32_t num_blocks, std::int32_t block_size, CacheLog& log);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // A free block, or the least recently used cached one, evicted. Nothing: every block has a holder.
  [[nodiscard]] std::optional<FreeBlock> take();
  // A block that is free already.
  [[nodiscard]] std::optional<FreeBlock> take_free();
  // The least recently used cached block; there must be one.
  [[nodiscard]] CachedBlock take_oldest() { return take_cached(oldest()); }
  BlockId oldest() const { return BlockId{cached_.oldest()}; }

  // Where a hash is found: nowhere, in a block that can be hit, or in one that a copy is under way to or from.
  struct Found {
    enum class Where { kNowhere, kHere, kInTransit } where = Where::kNowhere;
    BlockId id{};
    bool held = false;  // by somebody; else it counts as available until it is hit
  };
  Found find(const Hash& hash) const;
  // A share in a block that `find` found here.
  [[nodiscard]] SealedBlock hit(BlockId id);
  // Takes the block of this hash out of the index, whoever holds it. Unknown: nothing to do.
  void withdraw(const Hash& hash);
  // Frees every cached block; gives how many there were.
  std::int32_t drop_cached();
  // The hash of an indexed block.
  const Hash& hash(BlockId id) const { return index_.hash(raw(id)); }
  const HashIndex& hashes() const { return index_; }

  std::int32_t block_size() const { return block_size_; }
  std::int32_t num_blocks() const { return static_cast<std::int32_t>(blocks_.size()); }
  std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }
  std::int32_t num_cached() const { return cached_.size(); }
  std::int32_t num_available() const { return num_free() + num_cached(); }
  std::int32_t num_used() const { return num_blocks() - num_available(); }
  // Grows whenever an admission that failed for want of blocks might succeed now.
  std::uint64_t gains() const { return gains_; }

  // The handles of one block that exist outside of the pool.
  struct Census {
    std::int32_t holders = 0;  // WritableBlock, SealedBlock, WithdrawnBlock
    std::int32_t writers = 0;  // of these, WritableBlock
    std::int32_t reserved = 0;  // FreeBlock
    std::int32_t copies = 0;  // OffloadingBlock, LoadingBlock
  };
  // Recounts everything against a census, one entry a block. The first violation in words, or nothing.
  std::optional<std::string> check(std::span<const Census> census) const;

 private:
  // kReserved: a FreeBlock holds it; kCopying: a ticket is under way and the block is in the index; kUnwanted:
  // likewise, but withdrawn.
  enum class Kind : std::int32_t { kFree, kReserved, kWritable, kSealed, kWithdrawn, kCached, kCopying, kUnwanted };

  struct Block {
    std::int32_t refs = 0;
    Kind kind = Kind::kFree;
  };

  friend class FreeBlock;
  friend class WritableBlock;
  friend class SealedBlock;
  friend class WithdrawnBlock;
  friend class CachedBlock;
  friend class OffloadingBlock;
  friend class LoadingBlock;
  friend WritableBlock on(FreeBlock&&, Open);
  friend FullBlock on(WritableBlock&&, Seal);
  friend SealedBlock on(CachedBlock&&, Hit);
  friend FreeBlock on(CachedBlock&&, Evict);
  friend FreeBlock on(CachedBlock&&, Withdraw);
  friend WithdrawnBlock on(SealedBlock&&, Withdraw);
  friend OffloadingBlock on(CachedBlock&&, Offload);
  friend Offloaded on(OffloadingBlock&&, Copied);
  friend BothFree on(OffloadingBlock&&, CopyFailed);
  friend LoadingBlock on(HostBlock&&, Load);
  friend Loaded on(LoadingBlock&&, Copied);
  friend BothFree on(LoadingBlock&&, CopyFailed);

  Block& operator[](BlockId id) { return blocks_[static_cast<std::size_t>(raw(id))]; }
  const Block& operator[](BlockId id) const { return blocks_[static_cast<std::size_t>(raw(id))]; }

  FreeBlock reserve(BlockId id);
  void put_free(BlockId id);
  void put_cached(BlockId id);
  void let_go(BlockId id);
  CachedBlock take_cached(BlockId id);
  bool index(const Hash& hash, BlockId id);
  void unindex(BlockId id) {
    log_.losing(id);
    index_.erase(raw(id));
  }
  // The copy is over, one way or the other: the block leaves the index unless it was withdrawn before.
  void end_copy(BlockId id);

  std::optional<std::string> check_lists() const;
  std::optional<std::string> check_index() const;

  std::int32_t block_size_;
  std::vector<Block> blocks_;
  std::vector<BlockId> free_;
  HashIndex index_;
  CacheLog& log_;
  LruList cached_;
  std::uint64_t gains_ = 0;
};

}  // namespace tokenspeed
