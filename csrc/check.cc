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
                        [](const Fetching&) -> const Residence* { return nullptr; },
                        [](const Residence& state) { return &state; },
                        [](const Finished&) -> const Residence* { return nullptr; },
                    },
                    request.state);
}

const Running* running_of(const Request& request) {
  return std::visit(Overloaded{
                        [](const Waiting&) -> const Running* { return nullptr; },
                        [](const Fetching&) -> const Running* { return nullptr; },
                        [](const Running& state) { return &state; },
                        [](const Draining&) -> const Running* { return nullptr; },
                        [](const Finished&) -> const Running* { return nullptr; },
                    },
                    request.state);
}

const char* state_name(const Request& request) {
  return std::visit(Overloaded{
                        [](const Waiting&) { return "Waiting"; },
                        [](const Fetching&) { return "Fetching"; },
                        [](const Prefilling&) { return "Prefilling"; },
                        [](const Decoding&) { return "Decoding"; },
                        [](const Retracting&) { return "Retracting"; },
                        [](const Draining&) { return "Draining"; },
                        [](const Finished&) { return "Finished"; },
                    },
                    request.state);
}

// The list is whole, and everything in it is what `belongs` says.
std::optional<std::string> check_lru(const LruList& list, auto&& belongs) {
  std::int32_t count = 0;
  std::int32_t previous = LruList::kNone;
  for (std::int32_t id = list.oldest(); id != LruList::kNone; previous = id, id = list.newer(id)) {
    if (!belongs(id)) return "block " + number(id) + " is in a list of unused ones but in use";
    if (list.older(id) != previous) return "a list of unused blocks is torn at block " + number(id);
    if (++count > list.size()) return "a list of unused blocks is longer than its count";
  }
  if (previous != list.newest() || count != list.size()) return "a list of unused blocks does not end at its newest";
  return std::nullopt;
}

// The index finds exactly the ids that belong in it.
std::optional<std::string> check_hashes(const HashIndex& index, std::int32_t num_ids, auto&& belongs) {
  std::int32_t entries = 0;
  for (const std::int32_t id : index.table()) {
    if (id == HashIndex::kNone) continue;
    ++entries;
    if (!belongs(id)) return "block " + number(id) + " is in the prefix index but not to be found there";
    if (index.find(index.hash(id)) != id) return "the prefix index does not find block " + number(id);
  }
  std::int32_t indexed = 0;
  for (std::int32_t id = 0; id < num_ids; ++id) indexed += belongs(id);
  if (entries != index.size() || indexed != entries) return "the prefix index and its blocks differ in number";
  return std::nullopt;
}

}  // namespace

// --- blocks ---

std::optional<std::string> BlockPool::check(std::span<const Census> census) const {
  for (std::int32_t id = 0; id < num_blocks(); ++id) {
    const Block& block = (*this)[BlockId{id}];
    const Census& found = census[static_cast<std::size_t>(id)];
    const std::string who = "block " + number(id);
    const bool held = block.kind == Kind::kWritable || block.kind == Kind::kSealed || block.kind == Kind::kWithdrawn;
    const bool copied = block.kind == Kind::kCopying || block.kind == Kind::kUnwanted;
    if (block.refs != found.holders) {
      return who + " counts " + number(block.refs) + " holders and has " + number(found.holders);
    }
    if (held != (block.refs > 0)) return who + " is of the wrong kind for its " + number(block.refs) + " holders";
    if ((block.kind == Kind::kWritable) != (found.writers > 0)) return who + " disagrees with its writer";
    if (block.kind == Kind::kWritable && found.holders != 1) return who + " is written and shared";
    if (found.reserved != (block.kind == Kind::kReserved)) return who + " disagrees with who reserved it";
    if (found.copies != copied) return who + " disagrees with its copy";
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
  const auto cached = [this](std::int32_t id) { return (*this)[BlockId{id}].kind == Kind::kCached; };
  if (auto broken = check_lru(cached_, cached)) return broken;
  const auto is = [this](Kind kind) {
    return std::ranges::count_if(blocks_, [kind](const Block& block) { return block.kind == kind; });
  };
  if (is(Kind::kCached) != num_cached()) return "cached blocks are miscounted";
  if (is(Kind::kFree) != num_free()) return "free blocks are miscounted";
  return std::nullopt;
}

std::optional<std::string> BlockPool::check_index() const {
  const auto belongs = [this](std::int32_t id) {
    const Kind kind = (*this)[BlockId{id}].kind;
    return kind == Kind::kSealed || kind == Kind::kCached || kind == Kind::kCopying;
  };
  return check_hashes(index_, num_blocks(), belongs);
}

std::optional<std::string> HostPool::check(std::span<const std::int32_t> reserved,
                                           std::span<const std::int32_t> holders) const {
  std::int32_t free = 0;
  std::int32_t resting = 0;
  for (std::int32_t id = 0; id < num_blocks(); ++id) {
    const Kind kind = (*this)[HostId{id}];
    const auto at = static_cast<std::size_t>(id);
    free += kind == Kind::kFree;
    resting += kind == Kind::kResting;
    if (reserved[at] != (kind == Kind::kReserved)) return "host block " + number(id) + " disagrees with who reserved it";
    const bool held = kind == Kind::kHeld || kind == Kind::kWithdrawn;
    if (holders[at] != held) return "host block " + number(id) + " disagrees with its holder";
  }
  if (free != num_free() || resting != num_resting()) return "host blocks are miscounted";
  for (const HostId id : free_) {
    if ((*this)[id] != Kind::kFree) return "host block " + number(raw(id)) + " is in the free list but not free";
  }
  const auto rests = [this](std::int32_t id) { return (*this)[HostId{id}] == Kind::kResting; };
  if (auto broken = check_lru(resting_, rests)) return broken;
  const auto belongs = [this](std::int32_t id) {
    return (*this)[HostId{id}] == Kind::kResting || (*this)[HostId{id}] == Kind::kHeld;
  };
  return check_hashes(index_, num_blocks(), belongs);
}

// --- the log of the prefix cache ---

std::optional<std::string> CacheLog::check(std::int32_t block_size) const {
  if (!device_.index) return std::nullopt;
  Tally findable;
  for (const std::int32_t id : device_.index->table()) {
    if (id == HashIndex::kNone) continue;
    const std::int32_t there = host_.find(device_.index->hash(id));
    if (there != HashIndex::kNone && host_.tells(there) != device_.tells(id)) return "a block is told of on one tier only";
    if (device_.tells(id)) findable.add(device_.index->hash(id));
  }
  for (const std::int32_t id : host_.index->table()) {
    if (id == HashIndex::kNone || device_.find(host_.index->hash(id)) != HashIndex::kNone) continue;
    if (host_.tells(id)) findable.add(host_.index->hash(id));
  }
  if (findable != told_) return "whoever reads the cache log knows other blocks than can be found";
  const auto is_stored = [](const CacheRecord& record) { return record.change == CacheChange::kStored; };
  if (std::cmp_not_equal(tokens_.size(), std::ranges::count_if(records_, is_stored) * block_size)) {
    return "the cache log does not have the tokens of its blocks";
  }
  return std::nullopt;
}

// --- sessions ---

std::optional<std::string> Sessions::check(const std::unordered_map<const Session*, std::int32_t>& active) const {
  std::int64_t blocks = 0;
  std::int32_t resident = 0;
  std::size_t idle = 0;
  std::size_t anchors = 0;
  std::size_t known = 0;
  for (const auto& [key, session] : sessions_) {
    const std::string who = "session " + number(key);
    const auto found = active.find(session.get());
    known += found != active.end();
    if (session->key != key) return who + " is filed under another key";
    if (session->active != (found == active.end() ? 0 : found->second)) return who + " miscounts its requests";
    idle += session->active == 0;
    blocks += session->resident ? session->blocks : 0;
    resident += session->resident;
    anchors += session->anchors.size();
    for (const Hash& hash : session->anchors) {
      const auto anchored = anchors_.find(hash);
      if (anchored == anchors_.end() || anchored->second != session.get()) return who + " has lost an anchor";
    }
  }
  if (known != active.size()) return "a request belongs to a session that is forgotten";
  if (blocks != blocks_ || resident != num_resident_) return "resident sessions are miscounted";
  if (anchors != anchors_.size()) return "anchors are miscounted";
  for (const List* list : {&fresh_, &returned_, &displaced_}) {
    const Session* previous = nullptr;
    std::int32_t size = 0;
    for (const Session* session = list->oldest; session; previous = session, session = session->newer) {
      if (session->older != previous || session->active != 0) return "a list of idle sessions is torn";
      const List* right = !session->resident ? &displaced_ : session->returned ? &returned_ : &fresh_;
      if (list != right) return "a session is in the wrong list of idle ones";
      if (idle-- == 0 || ++size > list->size) return "an idle session is listed twice";
    }
    if (previous != list->newest || size != list->size) return "a list of idle sessions does not end at its newest";
  }
  if (idle != 0) return "an idle session is in no list";
  return std::nullopt;
}

// --- the scheduler ---

std::optional<std::string> Scheduler::check() const {
  if (auto broken = check_requests()) return broken;
  if (auto broken = check_lists()) return broken;
  if (auto broken = check_blocks()) return broken;
  if (auto broken = check_sessions()) return broken;
  return cache_log_.check(limits_.block_size);
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
  std::int64_t uncached = 0;
  std::int32_t running = 0;
  std::int32_t prefilling = 0;
  std::int32_t fetching = 0;
  std::int32_t draining = 0;
  std::vector<std::int32_t> slot_uses(static_cast<std::size_t>(slots_.num_slots()));
  for (const auto& [id, request] : requests_) {
    const bool waits = std::holds_alternative<Waiting>(request->state);
    const bool prefills = std::holds_alternative<Prefilling>(request->state);
    const auto* fetches = std::get_if<Fetching>(&request->state);
    const bool runs = prefills || fetches || std::holds_alternative<Decoding>(request->state);
    waiting += waits;
    uncached += waits ? request->uncached : 0;
    prefilling += prefills;
    fetching += fetches != nullptr;
    running += runs;
    draining += !waits && !runs;
    if (waits != (request->queue_place >= 0)) return name(*request) + " and the waiting queue disagree";
    const WaitingQueue& queue = request->outside ? outside_ : ready_;
    if (waits && queue.heap()[static_cast<std::size_t>(request->queue_place)] != request.get()) {
      return name(*request) + " is not at its place in the waiting queue";
    }
    if (const Residence* residence = residence_of(*request)) {
      ++slot_uses[static_cast<std::size_t>(raw(residence->slot()))];
    }
    const bool linked = request->previous || request->next;
    if (linked && !runs) return name(*request) + " does not run and has neighbours that do";
    if (fetches) ++slot_uses[static_cast<std::size_t>(raw(fetches->slot()))];
  }
  for (const SlotId slot : slots_.free()) ++slot_uses[static_cast<std::size_t>(raw(slot))];
  for (std::size_t i = 0; i < slot_uses.size(); ++i) {
    if (slot_uses[i] != 1) return "slot " + number(static_cast<std::int64_t>(i)) + " has " + number(slot_uses[i]) + " owners";
  }
  if (waiting != ready_.size() + outside_.size()) return "waiting requests are miscounted";
  if (uncached != counters_.waiting_uncached_tokens) return "prompt tokens that wait are miscounted";
  if (running != running_.size()) return "running requests are miscounted";
  if (std::cmp_not_equal(prefilling, prefilling_.size())) return "prefilling requests are miscounted";
  if (std::cmp_not_equal(fetching, fetching_.size())) return "fetching requests are miscounted";
  if (draining != num_draining_) return "draining requests are miscounted";
  for (const WaitingQueue* queue : {&ready_, &outside_}) {
    const std::vector<Request*>& heap = queue->heap();
    for (std::size_t i = 1; i < heap.size(); ++i) {
      if (goes_before(*heap[i], *heap[(i - 1) / 2])) return name(*heap[i]) + " waits behind one that it precedes";
    }
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
  std::vector<BlockPool::Census> census(static_cast<std::size_t>(pool_.num_blocks()));
  std::vector<std::int32_t> host_reserved(static_cast<std::size_t>(host_.num_blocks()));
  std::vector<std::int32_t> host_held(host_reserved.size());
  const auto of = [&census](BlockId id) -> BlockPool::Census& { return census[static_cast<std::size_t>(raw(id))]; };
  std::int32_t awaited = 0;
  for (const auto& [id, request] : requests_) {
    if (const auto* fetching = std::get_if<Fetching>(&request->state)) {
      for (const FreeBlock& block : fetching->room()) ++of(block.id()).reserved;
      for (const PrefixBlock& place : fetching->prefix()) {
        std::visit(Overloaded{
                       [&](const SealedBlock& block) { ++of(block.id()).holders; },
                       [&](const HostBlock& block) { ++host_held[static_cast<std::size_t>(raw(block.id()))]; },
                       [&](TicketId) { ++awaited; },
                       [](Lost) {},
                   },
                   place);
      }
    }
    const Residence* residence = residence_of(*request);
    if (!residence) continue;
    std::int32_t position = 0;
    for (const BlockTable::Entry& entry : residence->table().entries()) {
      BlockPool::Census& block = of(residence->table()[position]);
      ++block.holders;
      const bool writable = std::holds_alternative<WritableBlock>(entry);
      block.writers += writable;
      if (writable != (position >= residence->table().num_full())) return name(*request) + " has a hole in its table";
      ++position;
    }
  }
  std::int32_t offloads = 0;
  std::int32_t disowned = 0;
  bool misdirected = false;
  copies_.for_each(Overloaded{
      [&](TicketId, const OffloadingBlock& block, const Awaiting&) {
        ++offloads;
        ++of(block.id()).copies;
        ++host_reserved[static_cast<std::size_t>(raw(block.host_id()))];
      },
      [&](TicketId ticket, const LoadingBlock& block, const Awaiting& waiter) {
        ++of(block.id()).copies;
        ++host_held[static_cast<std::size_t>(raw(block.host_id()))];
        disowned += !waiter.request;
        if (!waiter.request) return;
        --awaited;
        const auto* fetching = std::get_if<Fetching>(&waiter.request->state);
        const auto place = static_cast<std::size_t>(waiter.place);
        misdirected |= !fetching || !std::holds_alternative<TicketId>(fetching->prefix()[place]) ||
                       std::get<TicketId>(fetching->prefix()[place]) != ticket;
      }});
  if (!copies_.is_whole()) return "a ticket of a copy is lost";
  if (awaited != 0 || misdirected) return "a request waits for another copy than the one that is for it";
  if (offloads != copies_.offloads() || offloads + disowned != copies_.coming_back()) return "copies to the host are miscounted";
  if (auto broken = pool_.check(census)) return broken;
  return host_.check(host_reserved, host_held);
}

std::optional<std::string> Scheduler::check_sessions() const {
  std::unordered_map<const Session*, std::int32_t> active;
  Promises promises;
  for (const auto& [id, request] : requests_) {
    const bool left = std::holds_alternative<Draining>(request->state);
    if (left && request->session) return name(*request) + " has left and still counts in its session";
    if (request->session) ++active[request->session];
    const bool waits = std::holds_alternative<Waiting>(request->state);
    if (request->session && !waits && !request->session->resident) return name(*request) + " runs outside of its session";
    if (request->outside && waits && request->session->resident) return name(*request) + " waits for a session that is in";
    if (!left) promises.add(sequence_of(id)->known(), request->promised ? request->floor : 0);
  }
  if (promises != promises_) return "the streams or what was promised to them is miscounted";
  return sessions_.check(active);
}

std::vector<RequestDump> Scheduler::dump() const {
  std::vector<RequestDump> all;
  all.reserve(requests_.size());
  for (const auto& [id, request] : requests_) {
    RequestDump plain;
    plain.id = id;
    plain.state = state_name(*request);
    plain.priority = request->order.priority;
    plain.arrival = request->order.arrival;
    plain.rank = request->rank;
    if (const Sequence* sequence = sequence_of(id)) plain.known = sequence->known();
    if (const Residence* residence = residence_of(*request)) {
      plain.slot = raw(residence->slot());
      plain.last_step = raw(residence->last_step());
      for (std::int32_t i = 0; i < residence->table().size(); ++i) plain.blocks.push_back(raw(residence->table()[i]));
    }
    if (const auto* fetching = std::get_if<Fetching>(&request->state)) plain.slot = raw(fetching->slot());
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
