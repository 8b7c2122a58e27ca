// Keyed, chained block hashes: equal hashes mean equal tokens from the first one on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "types.h"

namespace tokenspeed {

struct Hash {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  friend bool operator==(const Hash&, const Hash&) = default;
};

// A full block of a chain, for as long as its sequence does not change.
struct BlockContent {
  const Hash& hash;
  const Hash* previous;  // of the block before it, null: it is the first
  std::span<const TokenId> tokens;
  bool shared;  // with everybody: it was hashed without a salt
};

struct HashKey {
  std::uint64_t k0 = 0;
  std::uint64_t k1 = 0;
  static HashKey from_bytes(std::span<const std::byte, 16> bytes);
};

// SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012,
// and the double-length output of its reference code).
Hash siphash128(HashKey key, std::span<const std::byte> message);

// Hash of block j = SipHash(key, hash of block j − 1, tokens of block j). The chain starts at a root that
// depends on a tenant's salt, so that tenants share no block. Without the key nobody can aim at a collision.
class ChainHasher {
 public:
  explicit ChainHasher(HashKey key) : key_(key) {}
  Hash root(std::span<const std::byte> salt) const;
  Hash next(const Hash& previous, std::span<const TokenId> block) const;

 private:
  HashKey key_;
};

}  // namespace tokenspeed
