// The self-check: everything that is counted as it changes is recounted here from the states themselves.
#include <algorithm>
#include <string>

#include "scheduler.h"

namespace tokenspeed {

namespace {

std::string number(std::int64_t value) { return std::to_string(value); }

std::string name(const Request& request) { return "request " + number(request.id); }

const Residence* residence_of(const Request& request) {
  return std::visit(Overloaded{
                        [](const Waiting&) -> const Residence* { return nullptr; },
                        [](const Residence& state) { return &state; },
                        [](const Finished&) -> const Residence* { return nullptr; },
                    },
                    request.state);
}

const Running* running_of(const Request& request) {
  return std::visit(Overloaded{
                        [](const Waiting&) -> const Running* { return nullptr; },
                        [](const Running& state) { return &state; },
                        [](const Draining&) -> const Running* { return nullptr; },
                        [](const Finished&) -> const Running* { return nullptr; },
                    },
                    request.state);
}

const char* state_name(const Request& request) {
  return std::visit(Overloaded{
                        [](const Waiting&) { return "Waiting"; },
                        [](const Prefilling&) { return "Prefilling"; },
                        [](const Decoding&) { return "Decoding"; },
                        [](const Retracting&) { return "Retracting"; },
                        [](const Draining&) { return "Draining"; },
                        [](const Finished&) { return "Finished"; },
                    },
                    request.state);
}

}  // namespace

// --- blocks ---

std::optional<std::string> BlockPool::check(std::span<const std::int32_t> holders,
                                            std::span<const std::int32_t> writers) const {
  for (std::int32_t id = 0; id < num_blocks(); ++id) {
    const Block& block = (*this)[BlockId{id}];
    const auto at = static_cast<std::size_t>(id);
    const std::string who = "block " + number(id);
    const bool held = block.kind != Kind::kFree && block.kind != Kind::kCached;
    if (block.refs != holders[at]) {
      return who + " counts " + number(block.refs) + " holders and has " + number(holders[at]);
    }
    if (held != (block.refs > 0)) return who + " is of the wrong kind for its " + number(block.refs) + " holders";
    if ((block.kind == Kind::kWritable) != (writers[at] > 0)) return who + " disagrees with its writer";
    if (block.kind == Kind::kWritable && holders[at] != 1) return who + " is written and shared";
  }
  if (auto broken = check_lists()) return broken;
  return check_index();
}

std::optional<std::string> BlockPool::check_lists() const {
  std::vector<bool> listed(blocks_.size());
  for (const BlockId id : free_) {
    if ((*this)[id].kind != Kind::kFree) return "block " + number(raw(id)) + " is in the free list but not free";
    if (listed[static_cast<std::size_t>(raw(id))]) return "block " + number(raw(id)) + " is free twice";
    listed[static_cast<std::size_t>(raw(id))] = true;
  }
  std::int32_t cached = 0;
  std::int32_t previous = kNone;
  for (std::int32_t id = oldest_; id != kNone; previous = id, id = (*this)[BlockId{id}].next) {
    if ((*this)[BlockId{id}].kind != Kind::kCached) return "block " + number(id) + " is in the LRU list but not cached";
    if ((*this)[BlockId{id}].previous != previous) return "the LRU list is torn at block " + number(id);
    if (++cached > num_cached_) return "the LRU list is longer than its count";
  }
  if (previous != newest_) return "the LRU list does not end at its newest block";
  const auto is = [this](Kind kind) {
    return std::ranges::count_if(blocks_, [kind](const Block& block) { return block.kind == kind; });
  };
  if (cached != num_cached_ || is(Kind::kCached) != cached) return "cached blocks are miscounted";
  if (is(Kind::kFree) != num_free()) return "free blocks are miscounted";
  return std::nullopt;
}

std::optional<std::string> BlockPool::check_index() const {
  std::int32_t entries = 0;
  for (const std::int32_t id : index_) {
    if (id == kNone) continue;
    ++entries;
    const Block& block = (*this)[BlockId{id}];
    if (block.kind != Kind::kSealed && block.kind != Kind::kCached) {
      return "block " + number(id) + " is in the prefix index but neither sealed nor cached";
    }
    if (find(block.hash) != BlockId{id}) return "the prefix index does not find block " + number(id);
  }
  const auto indexed = std::ranges::count_if(
      blocks_, [](const Block& block) { return block.kind == Kind::kSealed || block.kind == Kind::kCached; });
  if (entries != num_indexed_ || indexed != entries) return "the prefix index and the sealed blocks differ in number";
  return std::nullopt;
}

// --- the scheduler ---

std::optional<std::string> Scheduler::check() const {
  if (auto broken = check_requests()) return broken;
  if (auto broken = check_lists()) return broken;
  return check_blocks();
}

std::optional<std::string> Scheduler::check_requests() const {
  for (const auto& [id, request] : requests_) {
    if (request->id != id) return name(*request) + " is filed under another id";
    if (std::holds_alternative<Finished>(request->state)) return name(*request) + " has finished and is still here";
    const Residence* residence = residence_of(*request);
    if (residence && raw(residence->last_step()) >= raw(steps_.next())) {
      return name(*request) + " is touched by a step that is not launched";
    }
    const bool leaving = std::holds_alternative<Retracting>(request->state) ||
                         std::holds_alternative<Draining>(request->state);
    if (leaving && steps_.landed().covers(residence->last_step())) return name(*request) + " leaves but has landed";
    const Sequence* sequence = sequence_of(id);
    if (sequence && sequence->known() >= sequence->max_length()) return name(*request) + " is full and goes on";
    if (sequence && hasher_ && sequence->hashes().size() !=
                                   static_cast<std::size_t>(sequence->known() / limits_.block_size)) {
      return name(*request) + " has the wrong number of block hashes";
    }
    const Running* running = running_of(*request);
    if (!running) continue;
    if (running->computed() > sequence->known() + running->pending() ||
        running->computed() > running->table().size() * limits_.block_size) {
      return name(*request) + " has computed more than it knows or has room for";
    }
    std::int32_t pending = 0;
    steps_.for_each_in_flight([&](const Row& row) { pending += row.request == request.get() && row.sample_index >= 0; });
    if (pending != running->pending()) return name(*request) + " awaits the wrong number of tokens";
    const bool decodes = std::holds_alternative<Decoding>(request->state);
    if (decodes && running->computed() + 1 != sequence->known() + running->pending()) {
      return name(*request) + " decodes but is not one token short";
    }
  }
  return std::nullopt;
}

std::optional<std::string> Scheduler::check_lists() const {
  std::int32_t waiting = 0;
  std::int32_t running = 0;
  std::int32_t prefilling = 0;
  std::int32_t draining = 0;
  std::vector<std::int32_t> slot_uses(static_cast<std::size_t>(slots_.num_slots()));
  for (const auto& [id, request] : requests_) {
    const bool waits = std::holds_alternative<Waiting>(request->state);
    const bool prefills = std::holds_alternative<Prefilling>(request->state);
    const bool runs = prefills || std::holds_alternative<Decoding>(request->state);
    waiting += waits;
    prefilling += prefills;
    running += runs;
    draining += !waits && !runs;
    if (waits != (request->queue_place >= 0)) return name(*request) + " and the waiting queue disagree";
    if (waits && waiting_.heap()[static_cast<std::size_t>(request->queue_place)] != request.get()) {
      return name(*request) + " is not at its place in the waiting queue";
    }
    if (const Residence* residence = residence_of(*request)) {
      ++slot_uses[static_cast<std::size_t>(raw(residence->slot()))];
    }
  }
  for (const SlotId slot : slots_.free()) ++slot_uses[static_cast<std::size_t>(raw(slot))];
  for (std::size_t i = 0; i < slot_uses.size(); ++i) {
    if (slot_uses[i] != 1) return "slot " + number(static_cast<std::int64_t>(i)) + " has " + number(slot_uses[i]) + " owners";
  }
  if (waiting != waiting_.size()) return "waiting requests are miscounted";
  if (running != running_.size()) return "running requests are miscounted";
  if (prefilling != num_prefilling_) return "prefilling requests are miscounted";
  if (draining != num_draining_) return "draining requests are miscounted";
  const std::vector<Request*>& heap = waiting_.heap();
  for (std::size_t i = 1; i < heap.size(); ++i) {
    if (WaitingQueue::before(*heap[i], *heap[(i - 1) / 2])) return name(*heap[i]) + " waits behind one that it precedes";
  }
  const Request* previous = nullptr;
  for (const Request* request = running_.first(); request; previous = request, request = request->next) {
    if (request->previous != previous) return "the running list is torn at " + name(*request);
    if (previous && previous->admission >= request->admission) return name(*request) + " runs out of order";
    if (--running < 0) return "the running list is longer than its count";
  }
  if (previous != running_.last() || running != 0) return "the running list is shorter than its count";
  return std::nullopt;
}

std::optional<std::string> Scheduler::check_blocks() const {
  std::vector<std::int32_t> holders(static_cast<std::size_t>(pool_.num_blocks()));
  std::vector<std::int32_t> writers(holders.size());
  for (const auto& [id, request] : requests_) {
    const Residence* residence = residence_of(*request);
    if (!residence) continue;
    std::int32_t position = 0;
    for (const BlockTable::Entry& entry : residence->table().entries()) {
      const auto block = static_cast<std::size_t>(raw(residence->table()[position]));
      ++holders[block];
      const bool writable = std::holds_alternative<WritableBlock>(entry);
      writers[block] += writable;
      if (writable != (position >= residence->table().num_full())) return name(*request) + " has a hole in its table";
      ++position;
    }
  }
  return pool_.check(holders, writers);
}

std::vector<RequestDump> Scheduler::dump() const {
  std::vector<RequestDump> all;
  all.reserve(requests_.size());
  for (const auto& [id, request] : requests_) {
    RequestDump plain;
    plain.id = id;
    plain.state = state_name(*request);
    plain.priority = request->priority;
    plain.arrival = request->arrival;
    if (const Sequence* sequence = sequence_of(id)) plain.known = sequence->known();
    if (const Residence* residence = residence_of(*request)) {
      plain.slot = raw(residence->slot());
      plain.last_step = raw(residence->last_step());
      for (std::int32_t i = 0; i < residence->table().size(); ++i) plain.blocks.push_back(raw(residence->table()[i]));
    }
    if (const Running* running = running_of(*request)) {
      plain.computed = running->computed();
      plain.pending = running->pending();
    }
    all.push_back(std::move(plain));
  }
  std::ranges::sort(all, {}, &RequestDump::arrival);
  return all;
}

}  // namespace tokenspeed
