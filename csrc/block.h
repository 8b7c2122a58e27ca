// The states of a KV block, each a move-only type, and the events that lead from one to another.
//
//   FreeBlock --Open--> WritableBlock --Seal--> SealedBlock      full, indexed, shared by counted holders
//                                          \--> WithdrawnBlock   full, not indexed: an equal block already was
//   SealedBlock --Withdraw--> WithdrawnBlock
//   CachedBlock --Hit--> SealedBlock,  --Evict--> FreeBlock,  --Withdraw--> FreeBlock
//
// Release is the destructor: a block that goes out of scope goes where it belongs. A FreeBlock or WritableBlock
// goes to the free list; the last holder of a SealedBlock leaves it cached, or free if it was withdrawn meanwhile;
// the last holder of a WithdrawnBlock leaves it free; a CachedBlock goes back to the least-recently-used list.
//
// There is no overload for any other pair, so it does not compile. What types cannot see: that another holder has
// withdrawn a block one also holds. The pool keeps that, and Release asks it.
#pragma once

#include <utility>
#include <variant>

#include "hash.h"
#include "types.h"

namespace tokenspeed {

class BlockPool;
class BlockTable;

// What all block states share: which block, of which pool. Moved from, it holds nothing.
class BlockHandle {
 public:
  BlockHandle(const BlockHandle&) = delete;
  BlockHandle& operator=(const BlockHandle&) = delete;
  BlockId id() const { return id_; }

 protected:
  BlockHandle(BlockPool& pool, BlockId id) : pool_(&pool), id_(id) {}
  BlockHandle(BlockHandle&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}
  BlockHandle& operator=(BlockHandle&&) = delete;
  ~BlockHandle() = default;

  BlockPool* pool_;
  BlockId id_;
};

struct Open {};
struct Hit {};
struct Evict {};
struct Withdraw {};

// Only a block table can make one, and only from the proof that the block's positions have landed.
class Seal {
 public:
  const Hash& hash() const { return hash_; }

 private:
  friend class BlockTable;
  explicit Seal(const Hash& hash) : hash_(hash) {}
  const Hash& hash_;
};

class FreeBlock;
class WritableBlock;
class SealedBlock;
class WithdrawnBlock;
class CachedBlock;
using FullBlock = std::variant<SealedBlock, WithdrawnBlock>;

// Not in use, content worthless.
class [[nodiscard]] FreeBlock : public BlockHandle {
 public:
  FreeBlock(FreeBlock&&) noexcept = default;
  ~FreeBlock();

 private:
  FreeBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend class BlockPool;
  friend WritableBlock on(FreeBlock&&, Open);
  friend FreeBlock on(CachedBlock&&, Evict);
  friend FreeBlock on(CachedBlock&&, Withdraw);
};

// Being filled by its one owner.
class [[nodiscard]] WritableBlock : public BlockHandle {
 public:
  WritableBlock(WritableBlock&&) noexcept = default;
  ~WritableBlock();

 private:
  WritableBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend WritableBlock on(FreeBlock&&, Open);
  friend FullBlock on(WritableBlock&&, Seal);
};

// One holder's share of a full, immutable block in the prefix index.
class [[nodiscard]] SealedBlock : public BlockHandle {
 public:
  SealedBlock(SealedBlock&&) noexcept = default;
  ~SealedBlock();

 private:
  SealedBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend class BlockPool;
  friend FullBlock on(WritableBlock&&, Seal);
  friend SealedBlock on(CachedBlock&&, Hit);
  friend WithdrawnBlock on(SealedBlock&&, Withdraw);
};

// One holder's share of a full, immutable block that nobody else can find.
class [[nodiscard]] WithdrawnBlock : public BlockHandle {
 public:
  WithdrawnBlock(WithdrawnBlock&&) noexcept = default;
  ~WithdrawnBlock();

 private:
  WithdrawnBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend FullBlock on(WritableBlock&&, Seal);
  friend WithdrawnBlock on(SealedBlock&&, Withdraw);
};

// In the prefix index without a holder: a hit revives it, shortage evicts it.
class [[nodiscard]] CachedBlock : public BlockHandle {
 public:
  CachedBlock(CachedBlock&&) noexcept = default;
  ~CachedBlock();

 private:
  CachedBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend class BlockPool;
  friend SealedBlock on(CachedBlock&&, Hit);
  friend FreeBlock on(CachedBlock&&, Evict);
  friend FreeBlock on(CachedBlock&&, Withdraw);
};

[[nodiscard]] WritableBlock on(FreeBlock&&, Open);
[[nodiscard]] FullBlock on(WritableBlock&&, Seal);
[[nodiscard]] SealedBlock on(CachedBlock&&, Hit);
[[nodiscard]] FreeBlock on(CachedBlock&&, Evict);
[[nodiscard]] FreeBlock on(CachedBlock&&, Withdraw);
[[nodiscard]] WithdrawnBlock on(SealedBlock&&, Withdraw);

}  // namespace tokenspeed
