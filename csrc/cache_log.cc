#include "cache_log.h"

namespace tokenspeed {

namespace {

std::int64_t name(const Hash& hash) { return static_cast<std::int64_t>(hash.low); }

}  // namespace

void CacheLog::note_filled(const BlockContent& block) {
  Known& known = known_.try_emplace(block.hash, Known{0, block.shared}).first->second;
  if (++known.tiers > 1 || !known.told) return;  // the host has it already
  const Hash* parent = block.previous;
  records_.push_back({name(block.hash), parent ? name(*parent) : 0, CacheChange::kStored, parent != nullptr});
  tokens_.insert(tokens_.end(), block.tokens.begin(), block.tokens.end());
  ++told_.blocks;
  told_.hashes += block.hash.low;
}

void CacheLog::note_lost(const Hash& hash) {
  const auto found = known_.find(hash);
  if (found == known_.end()) throw InvariantBroken("a block leaves the prefix cache that never entered it");
  if (--found->second.tiers > 0) return;
  if (found->second.told) {
    records_.push_back({name(hash), 0, CacheChange::kRemoved, 0});
    --told_.blocks;
    told_.hashes -= hash.low;
  }
  known_.erase(found);
}

void CacheLog::dropped() {
  if (!open_ || told_.blocks > 0 || records_.empty()) return;
  taken();
  records_.push_back({0, 0, CacheChange::kCleared, 0});
}

}  // namespace tokenspeed
