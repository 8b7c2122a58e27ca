// The longest prefix of a request that the two tiers know.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block_pool.h"
#include "host_pool.h"

namespace tokenspeed {

// Valid until a pool changes.
struct PrefixMatch {
  struct Place {
    std::int32_t id;  // of a device block, or of a place on the host
    bool on_host;
  };
  std::vector<Place> places;
  std::int32_t num_host = 0;
  std::int32_t num_unheld = 0;  // device blocks without a holder, which count as available until they are hit
  bool in_transit = false;      // the next block is being copied: the prefix will be longer soon

  std::int32_t size() const { return static_cast<std::int32_t>(places.size()); }
  std::int32_t num_device() const { return size() - num_host; }
};

// Fills `match`, in O(matched blocks).
inline void match_prefix(const BlockPool& device, const HostPool& host, std::span<const Hash> hashes,
                         PrefixMatch& match) {
  match.places.clear();
  match.num_host = match.num_unheld = 0;
  match.in_transit = false;
  for (const Hash& hash : hashes) {
    const BlockPool::Found here = device.find(hash);
    if (here.where == BlockPool::Found::Where::kHere) {
      match.places.push_back({raw(here.id), false});
      match.num_unheld += !here.held;
      continue;
    }
    const HostPool::Found there = host.find(hash);
    match.in_transit = here.where == BlockPool::Found::Where::kInTransit || there.where == HostPool::Found::Where::kHeld;
    if (match.in_transit || there.where == HostPool::Found::Where::kNowhere) return;
    match.places.push_back({raw(there.id), true});
    ++match.num_host;
  }
}

}  // namespace tokenspeed
