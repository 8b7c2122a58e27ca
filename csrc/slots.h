// Device slots: the row of the device tables that a running request owns.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "types.h"

namespace tokenspeed {

class SlotPool;

// The right to one slot. Its destructor gives the slot back.
class [[nodiscard]] Slot {
 public:
  Slot(Slot&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}
  Slot& operator=(Slot&&) = delete;
  inline ~Slot();
  SlotId id() const { return id_; }

 private:
  friend class SlotPool;
  Slot(SlotPool& pool, SlotId id) : pool_(&pool), id_(id) {}
  SlotPool* pool_;
  SlotId id_;
};

class SlotPool {
 public:
  explicit SlotPool(std::int32_t num_slots) : num_slots_(num_slots) {
    free_.reserve(static_cast<std::size_t>(num_slots));
    released_.reserve(static_cast<std::size_t>(num_slots));
    for (std::int32_t id = num_slots; id-- > 0;) free_.push_back(SlotId{id});
  }
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  bool empty() const { return free_.empty(); }
  std::int32_t num_slots() const { return num_slots_; }
  const std::vector<SlotId>& free() const { return free_; }

  // A free slot; there must be one.
  Slot take() {
    const SlotId id = free_.back();
    free_.pop_back();
    return {*this, id};
  }
  // Slots given back since the last call of `clear_released`. A slot is in it at most once: it can only be taken
  // again by a plan, and that plan reports it.
  const std::vector<SlotId>& released() const { return released_; }
  void clear_released() { released_.clear(); }

 private:
  friend class Slot;
  void give_back(SlotId id) {
    free_.push_back(id);
    released_.push_back(id);
  }
  std::int32_t num_slots_;
  std::vector<SlotId> free_;
  std::vector<SlotId> released_;
};

inline Slot::~Slot() {
  if (pool_) pool_->give_back(id_);
}

}  // namespace tokenspeed
