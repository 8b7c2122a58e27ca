#include "host_pool.h"

#include "taken.h"

namespace tokenspeed {

FreeHostBlock::~FreeHostBlock() {
  if (pool_) pool_->put_free(id_);
}

HostBlock::~HostBlock() {
  if (pool_) pool_->put_back(id_);
}

FreeHostBlock on(HostBlock&& block, Evict) {
  taken<HostBlock, Evict>();
  HostPool& pool = *std::exchange(block.pool_, nullptr);
  return pool.forget(block.id_);
}

FreeHostBlock on(HostBlock&& block, Withdraw) {
  taken<HostBlock, Withdraw>();
  HostPool& pool = *std::exchange(block.pool_, nullptr);
  return pool.forget(block.id_);
}

HostPool::HostPool(std::int32_t num_blocks, CacheLog& log)
    : kinds_(static_cast<std::size_t>(num_blocks), Kind::kFree), index_(num_blocks), log_(log), resting_(num_blocks) {
  free_.reserve(kinds_.size());
  for (std::int32_t id = num_blocks; id-- > 0;) free_.push_back(HostId{id});
}

std::optional<FreeHostBlock> HostPool::take() {
  if (!free_.empty()) {
    const HostId id = free_.back();
    free_.pop_back();
    (*this)[id] = Kind::kReserved;
    return FreeHostBlock(*this, id);
  }
  if (resting_.size() == 0) return std::nullopt;
  return on(hold(HostId{resting_.oldest()}), Evict{});
}

HostPool::Found HostPool::find(const Hash& hash) const {
  const std::int32_t id = index_.find(hash);
  if (id == HashIndex::kNone) return {};
  return {(*this)[HostId{id}] == Kind::kResting ? Found::Where::kHere : Found::Where::kHeld, HostId{id}};
}

HostBlock HostPool::hold(HostId id) {
  if ((*this)[id] != Kind::kResting) throw InvariantBroken("a host block is held twice");
  resting_.remove(raw(id));
  (*this)[id] = Kind::kHeld;
  return {*this, id};
}

void HostPool::withdraw(const Hash& hash) {
  const Found found = find(hash);
  if (found.where == Found::Where::kNowhere) return;
  if (found.where == Found::Where::kHere) {
    const FreeHostBlock freed = on(hold(found.id), Withdraw{});
  } else {
    unindex(found.id);
    (*this)[found.id] = Kind::kWithdrawn;
  }
}

std::int32_t HostPool::drop_resting() {
  const std::int32_t dropped = num_resting();
  while (num_resting() > 0) const FreeHostBlock freed = on(hold(HostId{resting_.oldest()}), Withdraw{});
  return dropped;
}

void HostPool::put_free(HostId id) {
  (*this)[id] = Kind::kFree;
  free_.push_back(id);
}

void HostPool::put_back(HostId id) {
  if ((*this)[id] == Kind::kWithdrawn) return put_free(id);
  (*this)[id] = Kind::kResting;
  resting_.push(raw(id));
  ++gains_;
}

bool HostPool::index(const Hash& hash, HostId id) {
  if (!index_.insert(hash, raw(id))) return false;
  log_.copied(id);
  (*this)[id] = Kind::kHeld;
  return true;
}

void HostPool::unindex(HostId id) {
  log_.losing(id);
  index_.erase(raw(id));
}

FreeHostBlock HostPool::forget(HostId id) {
  if ((*this)[id] == Kind::kHeld) unindex(id);
  (*this)[id] = Kind::kReserved;
  return {*this, id};
}

}  // namespace tokenspeed
