#include "cache_log.h"

namespace tokenspeed {

namespace {

std::int64_t name(const Hash& hash) { return static_cast<std::int64_t>(hash.low); }

}  // namespace

void CacheLog::note_filled(std::int32_t id, const BlockContent& block) {
  device_.told[static_cast<std::size_t>(id)] = block.shared;
  if (!block.shared || host_.find(block.hash) != HashIndex::kNone) return;
  const Hash* parent = block.previous;
  records_.push_back({name(block.hash), parent ? name(*parent) : 0, CacheChange::kStored, parent != nullptr});
  tokens_.insert(tokens_.end(), block.tokens.begin(), block.tokens.end());
  told_.add(block.hash);
}

void CacheLog::note_copied(const Tier& from, Tier& to, std::int32_t id) {
  to.told[static_cast<std::size_t>(id)] = from.tells(from.find(to.index->hash(id)));
}

void CacheLog::note_losing(const Tier& tier, const Tier& other, std::int32_t id) {
  const Hash& hash = tier.index->hash(id);
  if (!tier.tells(id) || other.find(hash) != HashIndex::kNone) return;
  records_.push_back({name(hash), 0, CacheChange::kRemoved, 0});
  --told_.blocks;
  told_.hashes -= hash.low;
}

void CacheLog::dropped() {
  if (told_.blocks > 0 || records_.empty()) return;
  taken();
  records_.push_back({0, 0, CacheChange::kCleared, 0});
}

}  // namespace tokenspeed
