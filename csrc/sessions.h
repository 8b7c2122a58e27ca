// Sessions: requests that grow out of each other, and the blocks that they keep between their turns.
//
// A request belongs to the session whose id it names, or whose earlier prompt it continues: each session remembers
// hashes near the end of its last prompt (anchors), and a request whose prompt contains one of them is its next turn.
//
// The blocks of all resident sessions together fit in the tiers. A session becomes resident when it fits, if need be
// in the place of sessions that are idle: only when nothing has come from them for kIdleSeconds, but those that never
// had a second turn at once where such ones seldom come back. Resident sessions grow, and take the room of those that
// are idle longest; where nobody is idle, a session that comes back with its next turn has lost its place. It is
// remembered for a while, so that its next turn is known to be one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "hash.h"
#include "types.h"

namespace tokenspeed {

struct Session {
  std::int64_t key = 0;     // in the table
  std::int32_t blocks = 0;  // of its longest active request, or of its last one
  std::int32_t active = 0;  // requests that have not ended
  bool resident = false;
  bool returned = false;  // has come back after being idle
  double idle_since = 0;
  Session* older = nullptr;  // in a list of idle or displaced sessions
  Session* newer = nullptr;
  std::vector<Hash> anchors;
};

class Sessions {
 public:
  // Idle sessions keep their place at least so long.
  static constexpr double kIdleSeconds = 90;
  // So many displaced sessions are remembered.
  static constexpr std::int32_t kMostDisplaced = 1024;

  explicit Sessions(std::int32_t capacity) : capacity_(capacity) {}
  Sessions(const Sessions&) = delete;
  Sessions& operator=(const Sessions&) = delete;

  // Whether the session of a request with these prompt hashes is known and resident.
  bool is_resident(std::int64_t id, std::span<const Hash> prompt) const {
    const Session* session = find(id, prompt);
    return session && session->resident;
  }
  // Whether one of this name is known: a displaced one is remembered for a while.
  bool knows(std::int64_t id) const { return id > 0 && sessions_.contains(id); }
  // The session of a new request with these prompt hashes, and `blocks` of its own. `id` 0: none is named.
  Session& arrive(std::int64_t id, std::span<const Hash> prompt, std::int32_t blocks);
  // One of its requests has ended with `blocks`.
  void leave(Session& session, std::int32_t blocks, double now);
  // Whether there is room for a session that is not resident.
  bool fits(const Session& session) const { return fits_beside(session, blocks_); }
  // What a session may do to get a place.
  enum class Claim {
    kPatient,  // take those of sessions that have been idle for kIdleSeconds
    kUrgent,   // take those of all idle sessions
    kOverdue,  // the same, and have one although it does not fit
  };
  // Makes it resident if its claim suffices. True: it is resident.
  bool settle(Session& session, double now, Claim claim);
  // Grows whenever there is more room.
  std::uint64_t gains() const { return gains_; }

  std::int32_t capacity() const { return capacity_; }
  std::int32_t blocks() const { return blocks_; }
  std::int32_t num_resident() const { return num_resident_; }

  // Recounts everything; `active` requests name a session each, from outside.
  std::optional<std::string> check(const std::unordered_map<const Session*, std::int32_t>& active) const;

 private:
  struct List {
    Session* oldest = nullptr;
    Session* newest = nullptr;
    std::int32_t size = 0;
    void push(Session& session);
    void remove(Session& session);
  };
  struct HashOfHash {
    std::size_t operator()(const Hash& hash) const { return static_cast<std::size_t>(hash.low); }
  };

  Session* find(std::int64_t id, std::span<const Hash> prompt) const;
  bool fits_beside(const Session& session, std::int32_t blocks) const;
  Session* to_displace() const;
  bool gives_way(const Session& session, double now) const;
  void anchor(Session& session, std::span<const Hash> prompt);
  void drop_anchors(Session& session);
  void resize(Session& session, std::int32_t blocks);
  void make_room();
  void lose_place(Session& session);
  void forget(Session& session);
  void displace(Session& session);
  List& list_of(const Session& session) {
    return !session.resident ? displaced_ : session.returned ? returned_ : fresh_;
  }

  std::int32_t capacity_;
  std::int32_t blocks_ = 0;  // of resident sessions
  std::int32_t num_resident_ = 0;
  std::uint64_t gains_ = 0;
  double chance_of_return_ = 1;  // of a session that has had one turn; agents come back
  std::int64_t nameless_ = 0;  // sessions without an id are keyed downwards from −1
  std::unordered_map<std::int64_t, std::unique_ptr<Session>> sessions_;
  std::unordered_map<Hash, Session*, HashOfHash> anchors_;
  // All sessions without active requests: resident ones, those that have returned apart, and displaced ones.
  List fresh_;
  List returned_;
  List displaced_;
};

}  // namespace tokenspeed
