// The states of a KV block, each a move-only type, and the events that lead from one to another. The table of legal
// pairs is transitions.inc; docs/states.md draws it.
//
// Release is the destructor: a block that goes out of scope goes where it belongs. A FreeBlock or WritableBlock
// goes to the free list; the last holder of a SealedBlock leaves it cached, or free if it was withdrawn meanwhile;
// the last holder of a WithdrawnBlock leaves it free; a CachedBlock goes back to the least-recently-used list; a
// FreeHostBlock and a HostBlock go back to the host pool's lists.
//
// There is no overload for any other pair, so it does not compile. What types cannot see: that somebody else has
// withdrawn a block that one also holds or copies. The pools keep that, and Release and Copied ask them.
#pragma once

#include <utility>
#include <variant>

#include "hash.h"
#include "types.h"

namespace tokenspeed {

class BlockPool;
class BlockTable;
class CopyLedger;
class HostPool;

// What all states on the device share: which block, of which pool. Moved from, it holds nothing.
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

// Likewise for the states in host memory.
class HostHandle {
 public:
  HostHandle(const HostHandle&) = delete;
  HostHandle& operator=(const HostHandle&) = delete;
  HostId id() const { return id_; }

 protected:
  HostHandle(HostPool& pool, HostId id) : pool_(&pool), id_(id) {}
  HostHandle(HostHandle&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}
  HostHandle& operator=(HostHandle&&) = delete;
  ~HostHandle() = default;

  HostPool* pool_;
  HostId id_;
};

class FreeBlock;
class WritableBlock;
class SealedBlock;
class WithdrawnBlock;
class CachedBlock;
class OffloadingBlock;
class LoadingBlock;
class FreeHostBlock;
class HostBlock;

struct Open {};
struct Hit {};
struct Evict {};
struct Withdraw {};
struct Offload;  // with room on the host
struct Load;     // with room on the device

// Only a block table can make one, and only from the proof that the block's positions have landed.
class Seal {
 public:
  const BlockContent& content() const { return content_; }

 private:
  friend class BlockTable;
  explicit Seal(const BlockContent& content) : content_(content) {}
  BlockContent content_;
};

// The copy of a ticket has landed, or has failed. Only the ledger of tickets can say so.
class Copied {
  friend class CopyLedger;
  Copied() = default;
};
class CopyFailed {
  friend class CopyLedger;
  CopyFailed() = default;
};

// What a sealing gives: the block is in the index, or an equal one already was.
using FullBlock = std::variant<SealedBlock, WithdrawnBlock>;
// What the end of a copy gives: both ends. The second alternatives: the content was withdrawn while it was copied.
using Offloaded = std::pair<FreeBlock, std::variant<HostBlock, FreeHostBlock>>;
using Loaded = std::pair<std::variant<SealedBlock, FreeBlock>, FreeHostBlock>;
using BothFree = std::pair<FreeBlock, FreeHostBlock>;

// Not in use, content worthless.
class [[nodiscard]] FreeBlock : public BlockHandle {
 public:
  FreeBlock(FreeBlock&&) noexcept = default;
  ~FreeBlock();

 private:
  FreeBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend class BlockPool;
  friend WritableBlock on(FreeBlock&&, Open);
  friend LoadingBlock on(HostBlock&&, Load);
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
  // False once another holder has withdrawn it: nobody may build on it from then on.
  bool indexed() const;

 private:
  SealedBlock(BlockPool& pool, BlockId id) : BlockHandle(pool, id) {}
  friend class BlockPool;
  friend FullBlock on(WritableBlock&&, Seal);
  friend SealedBlock on(CachedBlock&&, Hit);
  friend WithdrawnBlock on(SealedBlock&&, Withdraw);
  friend Loaded on(LoadingBlock&&, Copied);
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

// In the prefix index without a holder: a hit revives it, shortage evicts it or sends it to the host.
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
  friend OffloadingBlock on(CachedBlock&&, Offload);
};

// A place in host memory, not in use.
class [[nodiscard]] FreeHostBlock : public HostHandle {
 public:
  FreeHostBlock(FreeHostBlock&&) noexcept = default;
  ~FreeHostBlock();

 private:
  FreeHostBlock(HostPool& pool, HostId id) : HostHandle(pool, id) {}
  friend class HostPool;
  friend Offloaded on(OffloadingBlock&&, Copied);
};

// A full block in host memory: content, hash, no device block. Whoever holds this keeps it from being evicted.
class [[nodiscard]] HostBlock : public HostHandle {
 public:
  HostBlock(HostBlock&&) noexcept = default;
  ~HostBlock();

 private:
  HostBlock(HostPool& pool, HostId id) : HostHandle(pool, id) {}
  friend class HostPool;
  friend Offloaded on(OffloadingBlock&&, Copied);
  friend LoadingBlock on(HostBlock&&, Load);
  friend Loaded on(LoadingBlock&&, Copied);
  friend BothFree on(LoadingBlock&&, CopyFailed);
  friend FreeHostBlock on(HostBlock&&, Evict);
  friend FreeHostBlock on(HostBlock&&, Withdraw);
};

struct Offload {
  FreeHostBlock room;
};
struct Load {
  FreeBlock room;
};

// On its way to the host: one copy ticket pins both ends, and neither may be used otherwise before it lands.
class [[nodiscard]] OffloadingBlock : public BlockHandle {
 public:
  OffloadingBlock(OffloadingBlock&&) noexcept = default;
  ~OffloadingBlock();
  HostId host_id() const { return room_.id(); }

 private:
  OffloadingBlock(BlockPool& pool, BlockId id, FreeHostBlock&& room) : BlockHandle(pool, id), room_(std::move(room)) {}
  friend OffloadingBlock on(CachedBlock&&, Offload);
  friend Offloaded on(OffloadingBlock&&, Copied);
  friend BothFree on(OffloadingBlock&&, CopyFailed);
  FreeHostBlock room_;
};

// On its way back: the device block is reserved, and not readable before the ticket lands.
class [[nodiscard]] LoadingBlock : public BlockHandle {
 public:
  LoadingBlock(LoadingBlock&&) noexcept = default;
  ~LoadingBlock();
  HostId host_id() const { return source_.id(); }

 private:
  LoadingBlock(BlockPool& pool, BlockId id, HostBlock&& source) : BlockHandle(pool, id), source_(std::move(source)) {}
  friend LoadingBlock on(HostBlock&&, Load);
  friend Loaded on(LoadingBlock&&, Copied);
  friend BothFree on(LoadingBlock&&, CopyFailed);
  HostBlock source_;
};

[[nodiscard]] WritableBlock on(FreeBlock&&, Open);
[[nodiscard]] FullBlock on(WritableBlock&&, Seal);
[[nodiscard]] SealedBlock on(CachedBlock&&, Hit);
[[nodiscard]] FreeBlock on(CachedBlock&&, Evict);
[[nodiscard]] FreeBlock on(CachedBlock&&, Withdraw);
[[nodiscard]] WithdrawnBlock on(SealedBlock&&, Withdraw);
[[nodiscard]] OffloadingBlock on(CachedBlock&&, Offload);
[[nodiscard]] Offloaded on(OffloadingBlock&&, Copied);
[[nodiscard]] BothFree on(OffloadingBlock&&, CopyFailed);
[[nodiscard]] LoadingBlock on(HostBlock&&, Load);
[[nodiscard]] Loaded on(LoadingBlock&&, Copied);
[[nodiscard]] BothFree on(LoadingBlock&&, CopyFailed);
[[nodiscard]] FreeHostBlock on(HostBlock&&, Evict);
[[nodiscard]] FreeHostBlock on(HostBlock&&, Withdraw);

}  // namespace tokenspeed
