#include "hash.h"

#include <bit>
#include <cstring>

namespace tokenspeed {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

namespace {

std::uint64_t load64(const std::byte* bytes) {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// The four words of SipHash's state, fed one 64-bit word at a time.
class SipState {
 public:
  explicit SipState(HashKey key)
      : v0_(key.k0 ^ 0x736f6d6570736575ULL),
        v1_(key.k1 ^ 0x646f72616e646f6dULL ^ 0xee),
        v2_(key.k0 ^ 0x6c7967656e657261ULL),
        v3_(key.k1 ^ 0x7465646279746573ULL) {}

  void feed(std::uint64_t word) {
    v3_ ^= word;
    round();
    round();
    v0_ ^= word;
  }

  Hash finish() {
    v2_ ^= 0xee;
    const std::uint64_t low = squeeze();
    v1_ ^= 0xdd;
    return {low, squeeze()};
  }

 private:
  void round() {
    v0_ += v1_;
    v2_ += v3_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v1_;
    v0_ += v3_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ = std::rotl(v2_, 32);
  }

  std::uint64_t squeeze() {
    for (int i = 0; i < 4; ++i) round();
    return v0_ ^ v1_ ^ v2_ ^ v3_;
  }

  std::uint64_t v0_, v1_, v2_, v3_;
};

// The bytes after the last full word, with the message's length in the top byte.
std::uint64_t last_word(std::span<const std::byte> tail, std::size_t length) {
  std::uint64_t word = static_cast<std::uint64_t>(length & 0xff) << 56;
  for (std::size_t i = 0; i < tail.size(); ++i) word |= std::to_integer<std::uint64_t>(tail[i]) << (8 * i);
  return word;
}

void feed_all(SipState& state, std::span<const std::byte> message, std::size_t total_length) {
  const std::size_t whole = message.size() / 8 * 8;
  for (std::size_t i = 0; i < whole; i += 8) state.feed(load64(message.data() + i));
  state.feed(last_word(message.subspan(whole), total_length));
}

}  // namespace

HashKey HashKey::from_bytes(std::span<const std::byte, 16> bytes) {
  return {load64(bytes.data()), load64(bytes.data() + 8)};
}

Hash siphash128(HashKey key, std::span<const std::byte> message) {
  SipState state(key);
  feed_all(state, message, message.size());
  return state.finish();
}

Hash ChainHasher::root(std::span<const std::byte> salt) const {
  // Another key than the blocks' own, so that no salt can be made to look like a block.
  return siphash128({key_.k0, ~key_.k1}, salt);
}

Hash ChainHasher::next(const Hash& previous, std::span<const TokenId> block) const {
  SipState state(key_);
  state.feed(previous.low);
  state.feed(previous.high);
  const auto bytes = std::as_bytes(block);
  feed_all(state, bytes, sizeof(Hash) + bytes.size());
  return state.finish();
}

}  // namespace tokenspeed
