#include "sessions.h"

#include <algorithm>
#include <new>

namespace tokenspeed {

namespace {

// Sessions that never had a second turn give way at once when fewer than this come back.
constexpr double kSeldom = 0.5;
// Of a prompt of 2^31 blocks.
constexpr std::size_t kMostAnchors = 33;

}  // namespace

void Sessions::List::push(Session& session) {
  session.older = newest;
  session.newer = nullptr;
  (newest ? newest->newer : oldest) = &session;
  newest = &session;
  ++size;
}

void Sessions::List::remove(Session& session) {
  (session.older ? session.older->newer : oldest) = session.newer;
  (session.newer ? session.newer->older : newest) = session.older;
  session.older = session.newer = nullptr;
  --size;
}

Session* Sessions::find(std::int64_t id, std::span<const Hash> prompt) const {
  if (id != 0) {
    const auto named = sessions_.find(id);
    return named == sessions_.end() ? nullptr : named->second.get();
  }
  // From the end: the latest turn that the prompt contains.
  for (std::size_t i = prompt.size(); i-- > 0;) {
    const auto anchored = anchors_.find(prompt[i]);
    if (anchored != anchors_.end()) return anchored->second;
  }
  return nullptr;
}

Session& Sessions::arrive(std::int64_t id, std::span<const Hash> prompt, std::int32_t blocks) {
  Session* session = find(id, prompt);
  if (!session) {
    const std::int64_t key = id != 0 ? id : --nameless_;
    session = sessions_.emplace(key, std::make_unique<Session>()).first->second.get();
    session->key = key;
  } else if (session->active == 0) {
    list_of(*session).remove(*session);
    if (!session->returned) chance_of_return_ += (1 - chance_of_return_) / 8;
    session->returned = true;
  }
  const bool comes_back = session->active++ == 0;
  resize(*session, comes_back ? blocks : std::max(blocks, session->blocks));
  make_room();
  const bool crowded = session->resident && !fits_beside(*session, blocks_ - session->blocks);
  if (comes_back && crowded) lose_place(*session);
  drop_anchors(*session);
  anchor(*session, prompt);
  return *session;
}

void Sessions::leave(Session& session, std::int32_t blocks, double now) {
  if (--session.active > 0) return;
  resize(session, blocks);
  make_room();
  session.idle_since = now;
  list_of(session).push(session);
  if (displaced_.size > kMostDisplaced) forget(*displaced_.oldest);
}

// One that is larger than the tiers fits alone.
bool Sessions::fits_beside(const Session& session, std::int32_t blocks) const {
  return blocks + std::min(session.blocks, capacity_) <= capacity_;
}

bool Sessions::settle(Session& session, double now, Claim claim) {
  if (session.resident) return true;
  while (!fits(session)) {
    Session* leaver = to_displace();
    const bool yields = leaver && (claim != Claim::kPatient || gives_way(*leaver, now));
    if (!yields && claim == Claim::kOverdue) break;
    if (!yields) return false;
    displace(*leaver);
  }
  session.resident = true;
  ++num_resident_;
  blocks_ += session.blocks;
  return true;
}

// Of the idle sessions, the one that is least likely to come back.
Session* Sessions::to_displace() const {
  if (!fresh_.oldest || !returned_.oldest) return fresh_.oldest ? fresh_.oldest : returned_.oldest;
  if (chance_of_return_ < kSeldom) return fresh_.oldest;
  return fresh_.oldest->idle_since < returned_.oldest->idle_since ? fresh_.oldest : returned_.oldest;
}

bool Sessions::gives_way(const Session& session, double now) const {
  return (!session.returned && chance_of_return_ < kSeldom) || now - session.idle_since >= kIdleSeconds;
}

// Near the end of the prompt, ever further apart: a client that rewrites its last messages is still recognised, and
// what many sessions share at the beginning is not taken for one of them.
void Sessions::anchor(Session& session, std::span<const Hash> prompt) try {
  const std::size_t size = prompt.size();
  session.anchors.reserve(kMostAnchors);
  for (std::size_t back = 1; back <= size && 4 * (back - 1) <= size; back = back == 1 ? 2 : 2 * back - 1) {
    const Hash& hash = prompt[size - back];
    if (anchors_.try_emplace(hash, &session).second) session.anchors.push_back(hash);
  }
} catch (const std::bad_alloc&) {
  drop_anchors(session);  // there is no memory to recognise it by its prompt
}

void Sessions::drop_anchors(Session& session) {
  for (const Hash& hash : session.anchors) anchors_.erase(hash);
  session.anchors.clear();
}

void Sessions::resize(Session& session, std::int32_t blocks) {
  if (session.resident) {
    blocks_ += blocks - session.blocks;
    ++gains_;
  }
  session.blocks = blocks;
}

// Resident sessions have grown.
void Sessions::make_room() {
  while (blocks_ > capacity_) {
    Session* leaver = to_displace();
    if (!leaver) return;
    displace(*leaver);
  }
}

void Sessions::lose_place(Session& session) {
  blocks_ -= session.blocks;
  --num_resident_;
  session.resident = false;
  ++gains_;
}

void Sessions::displace(Session& session) {
  if (!session.returned) chance_of_return_ -= chance_of_return_ / 16;
  list_of(session).remove(session);
  lose_place(session);
  list_of(session).push(session);
  if (displaced_.size > kMostDisplaced) forget(*displaced_.oldest);
}

void Sessions::forget(Session& session) {
  drop_anchors(session);
  list_of(session).remove(session);
  sessions_.erase(session.key);
}

}  // namespace tokenspeed
