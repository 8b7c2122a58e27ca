// The tokens of one request, the hashes of their blocks, and the rule by which they end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "hash.h"
#include "types.h"

namespace tokenspeed {

// When generation ends: at a stop id once `min_tokens` are generated, at the latest at `max_length` tokens,
// prompt included.
struct StopRule {
  std::int32_t max_length;
  std::int32_t min_tokens;
  std::vector<TokenId> stop_ids;
};

// Why a sequence ended, and with which stop id, −1: none.
struct Ending {
  FinishReason reason;
  TokenId stop_id;
};

class Sequence {
 public:
  // `hasher` null: the prefix cache is off, no hashes are kept. Without `reuse_prefix` nothing is ever matched,
  // but its blocks are hashed, because others may reuse them.
  Sequence(std::span<const TokenId> prompt, StopRule rule, const ChainHasher* hasher, std::span<const std::byte> salt,
           std::int32_t block_size, bool reuse_prefix)
      : rule_(std::move(rule)),
        hasher_(hasher),
        block_size_(static_cast<std::size_t>(block_size)),
        prompt_length_(static_cast<std::int32_t>(prompt.size())),
        reuse_prefix_(reuse_prefix),
        salted_(!salt.empty()) {
    std::ranges::sort(rule_.stop_ids);
    // Room for all that may come, so that a step allocates nothing; pages that are never written cost nothing.
    tokens_.reserve(static_cast<std::size_t>(rule_.max_length));
    tokens_.insert(tokens_.end(), prompt.begin(), prompt.end());
    if (!hasher_) return;
    root_ = hasher_->root(salt);
    hashes_.reserve(static_cast<std::size_t>(rule_.max_length) / block_size_);
    while ((hashes_.size() + 1) * block_size_ <= tokens_.size()) hash_next_block();
  }

  std::int32_t known() const { return static_cast<std::int32_t>(tokens_.size()); }
  std::int32_t prompt_length() const { return prompt_length_; }
  std::int32_t num_generated() const { return known() - prompt_length_; }
  std::int32_t max_length() const { return rule_.max_length; }
  std::span<const TokenId> tokens() const { return tokens_; }
  // One for each block that the known tokens fill; none when the prefix cache is off.
  std::span<const Hash> hashes() const { return hashes_; }
  // What the block of `hashes()[i]` holds.
  BlockContent block(std::size_t i) const {
    return {hashes_[i], i == 0 ? nullptr : &hashes_[i - 1], tokens().subspan(i * block_size_, block_size_), !salted_};
  }
  // The hashes that may be matched: at least one known token is always computed, or nothing could be sampled.
  std::span<const Hash> matchable() const {
    if (!hasher_ || !reuse_prefix_) return {};
    return hashes().first((tokens_.size() - 1) / block_size_);
  }

  // A sampled token becomes known. Its ending, if it ends the sequence.
  std::optional<Ending> append(TokenId token) {
    tokens_.push_back(token);
    if (hasher_ && tokens_.size() % block_size_ == 0) hash_next_block();
    if (num_generated() >= rule_.min_tokens && std::ranges::binary_search(rule_.stop_ids, token)) {
      return Ending{FinishReason::kStop, token};
    }
    if (known() >= rule_.max_length) return Ending{FinishReason::kLength, -1};
    return std::nullopt;
  }

  // An admission found this many blocks in the cache. Blocks that were hits every time were never written here.
  void note_hits(std::int32_t blocks) { untouched_blocks_ = std::min(untouched_blocks_, blocks); }
  // Hashes of all blocks that this request may have written.
  std::span<const Hash> written() const {
    return hashes().subspan(std::min(hashes_.size(), static_cast<std::size_t>(untouched_blocks_)));
  }

 private:
  void hash_next_block() {
    const std::span<const TokenId> block = tokens().subspan(hashes_.size() * block_size_, block_size_);
    hashes_.push_back(hasher_->next(hashes_.empty() ? root_ : hashes_.back(), block));
  }

  std::vector<TokenId> tokens_;
  std::vector<Hash> hashes_;
  StopRule rule_;
  const ChainHasher* hasher_;
  Hash root_;
  std::size_t block_size_;
  std::int32_t prompt_length_;
  std::int32_t untouched_blocks_ = INT32_MAX;
  bool reuse_prefix_;
  bool salted_;
};

}  // namespace tokenspeed
