// Which KV blocks a lookup can find, told as they come and go: for whoever sends requests to where their prefix is.
//
// Every entrance into the indexes of the two tiers passes here, and every exit. A block is told of when the first tier
// has it, and again when the last one has lost it; in between it may move. Blocks of salted requests are never told:
// nobody else can hit them. Nothing is planned by what is here, so one rank may keep the log and another not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "hash.h"
#include "hash_index.h"
#include "types.h"

namespace tokenspeed {

// Values shared with tokenspeed.batch.CacheChange.
enum class CacheChange : std::int32_t { kStored = 0, kRemoved = 1, kCleared = 2 };

// Python reads it as it lies in memory (tokenspeed.batch.CACHE_RECORD). A block goes by the low half of its hash.
struct CacheRecord {
  std::int64_t hash;    // 0: all blocks
  std::int64_t parent;  // of a stored block: the one before it in its chain
  CacheChange change;
  std::int32_t chained;  // 0: it has no parent
};
static_assert(sizeof(CacheRecord) == 24 && std::is_trivially_copyable_v<CacheRecord>);

class CacheLog {
 public:
  CacheLog() = default;
  CacheLog(const CacheLog&) = delete;
  CacheLog& operator=(const CacheLog&) = delete;

  // From now on; nothing may be in an index yet. At most `num_blocks` hashes are at once.
  void open(std::size_t num_blocks) {
    open_ = true;
    known_.reserve(num_blocks);
  }

  // A block has been filled, and the index of the device has it now.
  void filled(const BlockContent& block) {
    if (open_) note_filled(block);
  }
  // A block is in the index of one tier, and now in that of the other as well.
  void copied(const Hash& hash) {
    if (open_) ++known_.at(hash).tiers;
  }
  // One tier has lost it.
  void lost(const Hash& hash) {
    if (open_) note_lost(hash);
  }
  // Whatever nobody holds was dropped. If no block is left that was told of, one record says all there is to say.
  void dropped();

  // What has not been taken yet, in the order in which it came about; and the tokens of the stored blocks, one after
  // another.
  const std::vector<CacheRecord>& records() const { return records_; }
  const std::vector<TokenId>& tokens() const { return tokens_; }
  void taken() {
    records_.clear();
    tokens_.clear();
  }

  // Recounts everything against the indexes: whoever has read all records knows of just the blocks that can be found.
  std::optional<std::string> check(const HashIndex& device, const HashIndex& host, std::int32_t block_size) const;

 private:
  // A hash of an index: in how many of them it is, and whether it is told.
  struct Known {
    std::int32_t tiers;
    bool told;
  };
  // What a reader of all records knows, as far as two sums can say it.
  struct Tally {
    std::uint64_t blocks = 0;
    std::uint64_t hashes = 0;
    friend bool operator==(const Tally&, const Tally&) = default;
  };
  struct LowHalf {
    std::size_t operator()(const Hash& hash) const { return static_cast<std::size_t>(hash.low); }
  };

  void note_filled(const BlockContent& block);
  void note_lost(const Hash& hash);

  bool open_ = false;
  std::unordered_map<Hash, Known, LowHalf> known_;
  std::vector<CacheRecord> records_;
  std::vector<TokenId> tokens_;
  Tally told_;
};

}  // namespace tokenspeed
