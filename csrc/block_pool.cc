#include "block_pool.h"

#include <bit>

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

// --- the events ---

WritableBlock on(FreeBlock&& block, Open) {
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool[block.id_].kind = BlockPool::Kind::kWritable;
  pool[block.id_].refs = 1;
  return {pool, block.id_};
}

FullBlock on(WritableBlock&& block, Seal seal) {
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  if (pool.index_insert(seal.hash(), block.id_)) {
    pool[block.id_].kind = BlockPool::Kind::kSealed;
    return SealedBlock(pool, block.id_);
  }
  pool[block.id_].kind = BlockPool::Kind::kWithdrawn;
  return WithdrawnBlock(pool, block.id_);
}

SealedBlock on(CachedBlock&& block, Hit) {
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool[block.id_].kind = BlockPool::Kind::kSealed;
  pool[block.id_].refs = 1;
  return {pool, block.id_};
}

FreeBlock on(CachedBlock&& block, Evict) {
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  pool.index_erase(block.id_);
  return {pool, block.id_};
}

FreeBlock on(CachedBlock&& block, Withdraw) { return on(std::move(block), Evict{}); }

WithdrawnBlock on(SealedBlock&& block, Withdraw) {
  BlockPool& pool = *std::exchange(block.pool_, nullptr);
  if (pool[block.id_].kind == BlockPool::Kind::kSealed) {  // else another holder was here before
    pool.index_erase(block.id_);
    pool[block.id_].kind = BlockPool::Kind::kWithdrawn;
  }
  return {pool, block.id_};
}

// --- the pool ---

BlockPool::BlockPool(std::int32_t num_blocks, std::int32_t block_size)
    : block_size_(block_size),
      blocks_(static_cast<std::size_t>(num_blocks)),
      index_(std::bit_ceil(2 * static_cast<std::size_t>(num_blocks)), kNone) {
  free_.reserve(blocks_.size());
  for (std::int32_t id = num_blocks; id-- > 0;) free_.push_back(BlockId{id});
}

std::optional<FreeBlock> BlockPool::take() {
  if (!free_.empty()) {
    const BlockId id = free_.back();
    free_.pop_back();
    return FreeBlock(*this, id);
  }
  if (oldest_ == kNone) return std::nullopt;
  return on(take_cached(BlockId{oldest_}), Evict{});
}

void BlockPool::match(std::span<const Hash> hashes, PrefixMatch& match) const {
  match.blocks.clear();
  match.num_cached = 0;
  for (const Hash& hash : hashes) {
    const std::optional<BlockId> id = find(hash);
    if (!id) return;
    match.blocks.push_back(*id);
    match.num_cached += (*this)[*id].refs == 0;
  }
}

SealedBlock BlockPool::hit(BlockId id) {
  Block& block = (*this)[id];
  if (block.kind == Kind::kCached) return on(take_cached(id), Hit{});
  if (block.kind != Kind::kSealed) throw InvariantBroken("a hit on a block that is not in the prefix index");
  ++block.refs;
  return {*this, id};
}

void BlockPool::withdraw(const Hash& hash) {
  const std::optional<BlockId> id = find(hash);
  if (!id) return;
  if ((*this)[*id].kind == Kind::kCached) {
    const FreeBlock freed = on(take_cached(*id), Withdraw{});
  } else {
    const WithdrawnBlock withdrawn = on(hit(*id), Withdraw{});
  }
}

void BlockPool::put_free(BlockId id) {
  (*this)[id].kind = Kind::kFree;
  free_.push_back(id);
  ++gains_;
}

void BlockPool::put_cached(BlockId id) {
  Block& block = (*this)[id];
  block.kind = Kind::kCached;
  block.previous = newest_;
  block.next = kNone;
  (newest_ == kNone ? oldest_ : (*this)[BlockId{newest_}].next) = raw(id);
  newest_ = raw(id);
  ++num_cached_;
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
  Block& block = (*this)[id];
  (block.previous == kNone ? oldest_ : (*this)[BlockId{block.previous}].next) = block.next;
  (block.next == kNone ? newest_ : (*this)[BlockId{block.next}].previous) = block.previous;
  --num_cached_;
  return {*this, id};
}

std::optional<BlockId> BlockPool::find(const Hash& hash) const {
  for (std::size_t at = index_home(hash); index_[at] != kNone; at = (at + 1) & (index_.size() - 1)) {
    if ((*this)[BlockId{index_[at]}].hash == hash) return BlockId{index_[at]};
  }
  return std::nullopt;
}

bool BlockPool::index_insert(const Hash& hash, BlockId id) {
  std::size_t at = index_home(hash);
  for (; index_[at] != kNone; at = (at + 1) & (index_.size() - 1)) {
    if ((*this)[BlockId{index_[at]}].hash == hash) return false;
  }
  index_[at] = raw(id);
  (*this)[id].hash = hash;
  ++num_indexed_;
  ++gains_;
  return true;
}

void BlockPool::index_erase(BlockId id) {
  const std::size_t mask = index_.size() - 1;
  std::size_t hole = index_home((*this)[id].hash);
  while (index_[hole] != raw(id)) hole = (hole + 1) & mask;
  // Close the gap, so that no search stops early: move up every later entry whose home is not past the hole.
  for (std::size_t at = (hole + 1) & mask; index_[at] != kNone; at = (at + 1) & mask) {
    const std::size_t home = index_home((*this)[BlockId{index_[at]}].hash);
    if (((at - home) & mask) < ((at - hole) & mask)) continue;
    index_[hole] = index_[at];
    hole = at;
  }
  index_[hole] = kNone;
  --num_indexed_;
}

}  // namespace tokenspeed
