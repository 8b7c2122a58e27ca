// Ids in the order of their last use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenspeed {

// An intrusive list over ids below `num_ids`: every operation is O(1) and none allocates.
class LruList {
 public:
  static constexpr std::int32_t kNone = -1;

  explicit LruList(std::int32_t num_ids) : links_(static_cast<std::size_t>(num_ids)) {}

  std::int32_t size() const { return size_; }
  std::int32_t oldest() const { return oldest_; }
  std::int32_t newest() const { return newest_; }
  // The neighbour of an id in the list, kNone at an end.
  std::int32_t newer(std::int32_t id) const { return link(id).newer; }
  std::int32_t older(std::int32_t id) const { return link(id).older; }

  // Puts in an id that is not in the list, as the newest.
  void push(std::int32_t id) {
    link(id) = {newest_, kNone};
    (newest_ == kNone ? oldest_ : link(newest_).newer) = id;
    newest_ = id;
    ++size_;
  }

  // Takes out an id that is in the list.
  void remove(std::int32_t id) {
    const Link gone = link(id);
    (gone.older == kNone ? oldest_ : link(gone.older).newer) = gone.newer;
    (gone.newer == kNone ? newest_ : link(gone.newer).older) = gone.older;
    --size_;
  }

 private:
  struct Link {
    std::int32_t older = kNone;
    std::int32_t newer = kNone;
  };

  Link& link(std::int32_t id) { return links_[static_cast<std::size_t>(id)]; }
  const Link& link(std::int32_t id) const { return links_[static_cast<std::size_t>(id)]; }

  std::vector<Link> links_;
  std::int32_t oldest_ = kNone;
  std::int32_t newest_ = kNone;
  std::int32_t size_ = 0;
};

}  // namespace tokenspeed
