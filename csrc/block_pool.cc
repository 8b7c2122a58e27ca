#include "block_pool.h"

#include "host_pool.h"
#include "taken.h"

namespace tokenspeed {

// --- the states give back what they hold ---

FreeBlock::~FreeBlock() {
  if (pool_) pool_->put_free(id_);
}

WritableBlock::~WritableBlock() {
  if (pool_) pool_->let_go(id_);
}

SealedBlock::~SealedBlock() {
  if (pool_) pool_->let_go(id_);
}

WithdrawnBlock::~WithdrawnBlock() {
  if (pool_) pool_->let_go(id_);
}

CachedBlock::~CachedBlock() {
  if (pool_) pool_->put_cached(id_);
}

// Only when everything ends: before that, the ledger keeps them until their tickets land.
OffloadingBlock::~OffloadingBlock() {
  if (!pool_) return;
  pool_->end_copy(id_);
  pool_->put_free(id_);
}

LoadingBlock::~LoadingBlock() {
  if (!pool_) return;
  pool_->end_copy(id_);
  pool_->put_free(id_);
}

bool SealedBlock::indexed() const { return (*pool_)[id_].kind == BlockPool::Kind::kSealed; }

// --- the events ---

WritableBlock on(FreeBlock&& block, Open) {
  taken<FreeBlock, Open>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool[block.id_] = {1, BlockPool::Kind::kWritable};
  return {pool, block.id_};
}

FullBlock on(WritableBlock&& block, Seal seal) {
  taken<WritableBlock, Seal>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  if (pool.index(seal.content().hash, block.id_)) {
    pool.log_.filled(block.id_, seal.content());
    pool[block.id_].kind = BlockPool::Kind::kSealed;
    return SealedBlock(pool, block.id_);
  }
  pool[block.id_].kind = BlockPool::Kind::kWithdrawn;
  return WithdrawnBlock(pool, block.id_);
}

SealedBlock on(CachedBlock&& block, Hit) {
  taken<CachedBlock, Hit>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool[block.id_] = {1, BlockPool::Kind::kSealed};
  return {pool, block.id_};
}

FreeBlock on(CachedBlock&& block, Evict) {
  taken<CachedBlock, Evict>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool.unindex(block.id_);
  return pool.reserve(block.id_);
}

FreeBlock on(CachedBlock&& block, Withdraw) {
  taken<CachedBlock, Withdraw>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool.unindex(block.id_);
  return pool.reserve(block.id_);
}

WithdrawnBlock on(SealedBlock&& block, Withdraw) {
  taken<SealedBlock, Withdraw>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  if (pool[block.id_].kind == BlockPool::Kind::kSealed) {  // else another holder was here before
    pool.unindex(block.id_);
    pool[block.id_].kind = BlockPool::Kind::kWithdrawn;
  }
  return {pool, block.id_};
}

OffloadingBlock on(CachedBlock&& block, Offload event) {
  taken<CachedBlock, Offload>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool[block.id_].kind = BlockPool::Kind::kCopying;
  return {pool, block.id_, std::move(event.room)};
}

Offloaded on(OffloadingBlock&& block, Copied) {
  taken<OffloadingBlock, Copied>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  HostPool& host = *block.room_.pool_;
  const bool wanted = pool[block.id_].kind == BlockPool::Kind::kCopying;
  // Into the one index before it leaves the other: it can be found all the time.
  const bool kept = wanted && host.index(pool.hash(block.id_), block.room_.id_);
  pool.end_copy(block.id_);
  FreeBlock device = pool.reserve(block.id_);
  if (!kept) return {std::move(device), std::move(block.room_)};
  block.room_.pool_ = nullptr;
  return {std::move(device), HostBlock(host, block.room_.id_)};
}

BothFree on(OffloadingBlock&& block, CopyFailed) {
  taken<OffloadingBlock, CopyFailed>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool.end_copy(block.id_);
  return {pool.reserve(block.id_), std::move(block.room_)};
}

LoadingBlock on(HostBlock&& block, Load event) {
  taken<HostBlock, Load>();
  BlockPool& pool = *std::exchange(event.room.pool_, nullptr);
  const BlockId id = event.room.id_;
  if (!pool.index(block.pool_->hash(block.id_), id)) throw InvariantBroken("a block is loaded that is on the device");
  pool.log_.copied(id);
  pool[id].kind = BlockPool::Kind::kCopying;
  return {pool, id, std::move(block)};
}

Loaded on(LoadingBlock&& block, Copied) {
  taken<LoadingBlock, Copied>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  HostPool& host = *std::exchange(block.source_.pool_, nullptr);
  FreeHostBlock room = host.forget(block.source_.id_);
  if (pool[block.id_].kind == BlockPool::Kind::kUnwanted) return {pool.reserve(block.id_), std::move(room)};
  pool[block.id_] = {1, BlockPool::Kind::kSealed};
  ++pool.gains_;
  return {SealedBlock(pool, block.id_), std::move(room)};
}

BothFree on(LoadingBlock&& block, CopyFailed) {
  taken<LoadingBlock, CopyFailed>();
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  HostPool& host = *std::exchange(block.source_.pool_, nullptr);
  pool.end_copy(block.id_);
  return {pool.reserve(block.id_), host.forget(block.source_.id_)};
}

// --- the pool ---

BlockPool::BlockPool(std::int32_t num_blocks, std::int32_t block_size, CacheLog& log)
    : block_size_(block_size),
      blocks_(static_cast<std::size_t>(num_blocks)),
      index_(num_blocks),
      log_(log),
      cached_(num_blocks) {
  free_.reserve(blocks_.size());
  for (std::int32_t id = num_blocks; id-- > 0;) free_.push_back(BlockId{id});
}

std::optional<FreeBlock> BlockPool::take() {
  if (std::optional<FreeBlock> block = take_free()) return block;
  if (num_cached() == 0) return std::nullopt;
  return on(take_oldest(), Evict{});
}

std::optional<FreeBlock> BlockPool::take_free() {
  if (free_.empty()) return std::nullopt;
  const BlockId id = free_.back();
  free_.pop_back();
  return reserve(id);
}

BlockPool::Found BlockPool::find(const Hash& hash) const {
  const std::int32_t id = index_.find(hash);
  if (id == HashIndex::kNone) return {};
  const Block& block = (*this)[BlockId{id}];
  if (block.kind == Kind::kCopying) return {Found::Where::kInTransit, BlockId{id}, true};
  return {Found::Where::kHere, BlockId{id}, block.refs > 0};
}

SealedBlock BlockPool::hit(BlockId id) {
  Block& block = (*this)[id];
  if (block.kind == Kind::kCached) return on(take_cached(id), Hit{});
  if (block.kind != Kind::kSealed) throw InvariantBroken("a hit on a block that is not in the prefix index");
  ++block.refs;
  return {*this, id};
}

void BlockPool::withdraw(const Hash& hash) {
  const Found found = find(hash);
  if (found.where == Found::Where::kNowhere) return;
  if (found.where == Found::Where::kInTransit) {
    unindex(found.id);
    (*this)[found.id].kind = Kind::kUnwanted;
  } else if (!found.held) {
    const FreeBlock freed = on(take_cached(found.id), Withdraw{});
  } else {
    const WithdrawnBlock withdrawn = on(hit(found.id), Withdraw{});
  }
}

std::int32_t BlockPool::drop_cached() {
  const std::int32_t dropped = num_cached();
  while (num_cached() > 0) const FreeBlock freed = on(take_oldest(), Withdraw{});
  return dropped;
}

FreeBlock BlockPool::reserve(BlockId id) {
  (*this)[id] = {0, Kind::kReserved};
  return {*this, id};
}

void BlockPool::put_free(BlockId id) {
  (*this)[id] = {0, Kind::kFree};
  free_.push_back(id);
  ++gains_;
}

void BlockPool::put_cached(BlockId id) {
  (*this)[id].kind = Kind::kCached;
  cached_.push(raw(id));
  ++gains_;
}

void BlockPool::let_go(BlockId id) {
  Block& block = (*this)[id];
  if (--block.refs > 0) return;
  if (block.kind == Kind::kSealed) {
    put_cached(id);
  } else {
    put_free(id);
  }
}

CachedBlock BlockPool::take_cached(BlockId id) {
  cached_.remove(raw(id));
  return {*this, id};
}

bool BlockPool::index(const Hash& hash, BlockId id) {
  return index_.insert(hash, raw(id));
}

void BlockPool::end_copy(BlockId id) {
  ++gains_;  // who waited for it need not any more
  if ((*this)[id].kind == Kind::kCopying) unindex(id);
}

}  // namespace tokenspeed
