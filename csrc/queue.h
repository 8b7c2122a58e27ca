// The requests that wait, and the list of those that run. Both are intrusive: no allocation a step.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "request.h"

namespace tokenspeed {

// Who computes first, of those that wait or prefill: priority, then rank, then arrival.
inline bool goes_before(const Request& a, const Request& b) {
  if (a.order.priority != b.order.priority) return a.order.priority < b.order.priority;
  return a.rank != b.rank ? a.rank < b.rank : a.order.arrival < b.order.arrival;
}

// A binary heap in this order. A preempted request keeps its rank, so it comes back ahead of those that arrived
// later. Any member leaves in O(log n); nobody else is touched.
class WaitingQueue {
 public:
  bool empty() const { return heap_.empty(); }
  std::int32_t size() const { return static_cast<std::int32_t>(heap_.size()); }
  Request* head() const { return heap_.empty() ? nullptr : heap_.front(); }
  const std::vector<Request*>& heap() const { return heap_; }
  void reserve(std::int32_t requests) { heap_.reserve(static_cast<std::size_t>(requests)); }

  void push(Request& request) {
    heap_.push_back(&request);
    rise(heap_.size() - 1);
  }

  void remove(Request& request) {
    const auto hole = static_cast<std::size_t>(std::exchange(request.queue_place, -1));
    Request* last = heap_.back();
    heap_.pop_back();
    if (last == &request) return;
    put(hole, last);
    rise(hole);
    sink(static_cast<std::size_t>(last->queue_place));
  }

 private:
  void put(std::size_t place, Request* request) {
    heap_[place] = request;
    request->queue_place = static_cast<std::int32_t>(place);
  }

  void rise(std::size_t place) {
    Request* request = heap_[place];
    while (place > 0 && goes_before(*request, *heap_[(place - 1) / 2])) {
      put(place, heap_[(place - 1) / 2]);
      place = (place - 1) / 2;
    }
    put(place, request);
  }

  void sink(std::size_t place) {
    Request* request = heap_[place];
    for (std::size_t child; (child = 2 * place + 1) < heap_.size(); place = child) {
      if (child + 1 < heap_.size() && goes_before(*heap_[child + 1], *heap_[child])) ++child;
      if (!goes_before(*heap_[child], *request)) break;
      put(place, heap_[child]);
    }
    put(place, request);
  }

  std::vector<Request*> heap_;
};

// The requests that are Fetching, Prefilling or Decoding, in the order of their admission.
class RunningList {
 public:
  Request* first() const { return first_; }
  Request* last() const { return last_; }
  std::int32_t size() const { return size_; }
  // Who gives way when memory is short. O(n); there must be one.
  Request& last_in_order() const {
    Request* last = first_;
    for (Request* request = first_; request; request = request->next) {
      if (request->order > last->order) last = request;
    }
    return *last;
  }

  void push(Request& request) {
    request.previous = last_;
    (last_ ? last_->next : first_) = &request;
    last_ = &request;
    ++size_;
  }

  void remove(Request& request) {
    (request.previous ? request.previous->next : first_) = request.next;
    (request.next ? request.next->previous : last_) = request.previous;
    request.previous = request.next = nullptr;
    --size_;
  }

 private:
  Request* first_ = nullptr;
  Request* last_ = nullptr;
  std::int32_t size_ = 0;
};

}  // namespace tokenspeed
