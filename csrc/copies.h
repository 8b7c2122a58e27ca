// The copies between the tiers that are under way, each with its ticket, and the proof that one has ended.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "block.h"
#include "types.h"

namespace tokenspeed {

struct Request;

// Who waits for a loaded block, and for which block of its prefix. Nobody any more: it is cached when it lands.
struct Awaiting {
  Request* request = nullptr;
  std::int32_t place = 0;
};

// What the end of a load gives to whoever waits for it.
struct Arrival {
  Awaiting for_whom;
  std::variant<SealedBlock, FreeBlock> block;
};

class CopyLedger {
 public:
  CopyLedger() = default;
  CopyLedger(const CopyLedger&) = delete;
  CopyLedger& operator=(const CopyLedger&) = delete;

  std::int32_t in_flight() const { return in_flight_; }
  // Of these, copies to the host: each gives back a device block when it ends.
  std::int32_t offloads() const { return offloads_; }

  TicketId begin(OffloadingBlock&& block) {
    ++offloads_;
    return enter(std::move(block), {});
  }
  TicketId begin(LoadingBlock&& block, Awaiting waiter) { return enter(std::move(block), waiter); }

  bool knows(std::int32_t ticket) const {
    return ticket >= 0 && static_cast<std::size_t>(ticket) < entries_.size() &&
           !std::holds_alternative<std::monostate>(entries_[static_cast<std::size_t>(ticket)].block);
  }
  // Of these, copies that give back memory when they end: those to the host, and loads that nobody waits for.
  std::int32_t coming_back() const { return offloads_ + disowned_; }
  // The waiter of this ticket does not want the block any more.
  void disown(TicketId ticket) {
    entry(ticket).waiter = {};
    ++disowned_;
  }

  // The end of a copy. What nobody waits for goes where it belongs.
  void land(TicketId ticket, bool failed, auto&& arrive) {
    Entry ended = std::move(entry(ticket));
    replace(entry(ticket), Entry{});
    free_.push_back(ticket);
    --in_flight_;
    std::visit(Overloaded{
                   [](std::monostate) { throw InvariantBroken("a ticket that is not under way has landed"); },
                   [&](OffloadingBlock& block) {
                     --offloads_;
                     if (failed) {
                       const BothFree both = on(std::move(block), CopyFailed{});
                     } else {
                       const Offloaded both = on(std::move(block), Copied{});
                     }
                   },
                   [&](LoadingBlock& block) {
                     disowned_ -= ended.waiter.request == nullptr;
                     if (failed) {
                       BothFree both = on(std::move(block), CopyFailed{});
                       if (ended.waiter.request) arrive(Arrival{ended.waiter, std::move(both.first)});
                     } else {
                       Loaded both = on(std::move(block), Copied{});
                       if (ended.waiter.request) arrive(Arrival{ended.waiter, std::move(both.first)});
                     }
                   },
               },
               ended.block);
  }

  // For the self-check: every ticket is under way or free to be used again.
  bool is_whole() const { return free_.size() + static_cast<std::size_t>(in_flight_) == entries_.size(); }
  // Likewise: each copy with its ticket and waiter.
  void for_each(auto&& visit) const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const Entry& e = entries_[i];
      const TicketId ticket{static_cast<std::int32_t>(i)};
      std::visit(Overloaded{[](std::monostate) {}, [&](const auto& block) { visit(ticket, block, e.waiter); }}, e.block);
    }
  }

 private:
  using Block = std::variant<std::monostate, OffloadingBlock, LoadingBlock>;
  struct Entry {
    Block block;
    Awaiting waiter;
    Entry() = default;
    Entry(Block&& block, Awaiting waiter) : block(std::move(block)), waiter(waiter) {}
    Entry(Entry&&) noexcept = default;
  };
  // The blocks are moved into their place once and never assigned.
  static void replace(Entry& old, Entry&& by) {
    std::destroy_at(&old);
    std::construct_at(&old, std::move(by));
  }

  TicketId enter(Block&& block, Awaiting waiter) {
    ++in_flight_;
    if (free_.empty()) {
      entries_.emplace_back(std::move(block), waiter);
      return TicketId{static_cast<std::int32_t>(entries_.size()) - 1};
    }
    const TicketId ticket = free_.back();
    free_.pop_back();
    replace(entry(ticket), Entry(std::move(block), waiter));
    return ticket;
  }

  Entry& entry(TicketId ticket) { return entries_[static_cast<std::size_t>(raw(ticket))]; }

  std::vector<Entry> entries_;
  std::vector<TicketId> free_;
  std::int32_t in_flight_ = 0;
  std::int32_t offloads_ = 0;
  std::int32_t disowned_ = 0;
};

}  // namespace tokenspeed
