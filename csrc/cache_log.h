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

  // From now on; nothing may be in these indexes of `num_blocks` and `num_host_blocks` yet.
  void open(const HashIndex& device, std::int32_t num_blocks, const HashIndex& host, std::int32_t num_host_blocks) {
    device_ = {&device, std::vector<bool>(static_cast<std::size_t>(num_blocks))};
    host_ = {&host, std::vector<bool>(static_cast<std::size_t>(num_host_blocks))};
  }

  // A block has been filled, and the index of the device has it now.
  void filled(BlockId id, const BlockContent& block) {
    if (device_.index) note_filled(raw(id), block);
  }
  // A block that the other tier has is in the index of this one, too.
  void copied(BlockId id) {
    if (device_.index) note_copied(host_, device_, raw(id));
  }
  void copied(HostId id) {
    if (host_.index) note_copied(device_, host_, raw(id));
  }
  // A block is leaving the index of its tier.
  void losing(BlockId id) {
    if (device_.index) note_losing(device_, host_, raw(id));
  }
  void losing(HostId id) {
    if (host_.index) note_losing(host_, device_, raw(id));
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

  // Recounts everything: whoever has read all records knows of just the blocks that can be found.
  std::optional<std::string> check(std::int32_t block_size) const;

 private:
  // The index of a tier, null while the log is off, and which of its blocks are told of.
  struct Tier {
    const HashIndex* index = nullptr;
    std::vector<bool> told;
    std::int32_t find(const Hash& hash) const { return index->find(hash); }
    bool tells(std::int32_t id) const { return told[static_cast<std::size_t>(id)]; }
  };
  // What a reader of all records knows, as far as two sums can say it.
  struct Tally {
    std::uint64_t blocks = 0;
    std::uint64_t hashes = 0;
    void add(const Hash& hash) {
      ++blocks;
      hashes += hash.low;
    }
    friend bool operator==(const Tally&, const Tally&) = default;
  };

  void note_filled(std::int32_t id, const BlockContent& block);
  static void note_copied(const Tier& from, Tier& to, std::int32_t id);
  void note_losing(const Tier& tier, const Tier& other, std::int32_t id);

  Tier device_;
  Tier host_;
  std::vector<CacheRecord> records_;
  std::vector<TokenId> tokens_;
  Tally told_;
};

}  // namespace tokenspeed
