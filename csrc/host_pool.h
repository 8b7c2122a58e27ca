// The second tier: places for KV blocks in host memory, found by content hash, in the order of their last use.
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

class HostPool {
 public:
  // `log` is told which blocks the index gains and loses.
  HostPool(std::int32_t num_blocks, CacheLog& log);
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  // A free place, or that of the least recently used block, evicted. Nothing: all are held or being copied.
  [[nodiscard]] std::optional<FreeHostBlock> take();

  struct Found {
    enum class Where { kNowhere, kHere, kHeld } where = Where::kNowhere;
    HostId id{};
  };
  Found find(const Hash& hash) const;
  // A block that `find` found here, kept from eviction while it is held.
  [[nodiscard]] HostBlock hold(HostId id);
  // Takes the block of this hash out of the index, whoever holds it. Unknown: nothing to do.
  void withdraw(const Hash& hash);
  // Frees every place whose block nobody holds; gives how many there were.
  std::int32_t drop_resting();
  // False once somebody has withdrawn a held block: its content must not be used.
  bool indexed(HostId id) const { return (*this)[id] != Kind::kWithdrawn; }
  const Hash& hash(HostId id) const { return index_.hash(raw(id)); }
  const HashIndex& hashes() const { return index_; }

  std::int32_t num_blocks() const { return static_cast<std::int32_t>(kinds_.size()); }
  std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }
  std::int32_t num_resting() const { return resting_.size(); }
  std::uint64_t gains() const { return gains_; }

  // Recounts everything; `reserved[b]` FreeHostBlocks and `holders[b]` HostBlocks of place b exist.
  std::optional<std::string> check(std::span<const std::int32_t> reserved, std::span<const std::int32_t> holders) const;

 private:
  // kReserved: a FreeHostBlock holds it; kHeld: a HostBlock does; kWithdrawn: likewise, but out of the index.
  enum class Kind : std::int8_t { kFree, kReserved, kResting, kHeld, kWithdrawn };

  friend class FreeHostBlock;
  friend class HostBlock;
  friend Offloaded on(OffloadingBlock&&, Copied);
  friend Loaded on(LoadingBlock&&, Copied);
  friend BothFree on(LoadingBlock&&, CopyFailed);
  friend FreeHostBlock on(HostBlock&&, Evict);
  friend FreeHostBlock on(HostBlock&&, Withdraw);

  Kind& operator[](HostId id) { return kinds_[static_cast<std::size_t>(raw(id))]; }
  const Kind& operator[](HostId id) const { return kinds_[static_cast<std::size_t>(raw(id))]; }

  void put_free(HostId id);
  void put_back(HostId id);
  bool index(const Hash& hash, HostId id);
  void unindex(HostId id);
  // The content of a held place is not needed any more: out of the index with it.
  FreeHostBlock forget(HostId id);

  std::vector<Kind> kinds_;
  std::vector<HostId> free_;
  HashIndex index_;
  CacheLog& log_;
  LruList resting_;
  std::uint64_t gains_ = 0;
};

}  // namespace tokenspeed
