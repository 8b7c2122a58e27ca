// Who of those that wait outside gets a place beside the resident sessions: rule 5 of policy.h.
#include <vector>

#include "scheduler.h"

namespace tokenspeed {

void Scheduler::settle_sessions(double now) {
  while (Request* head = outside_.head()) {
    // Nothing runs: better to compute idle prefixes again later than to do nothing now.
    const bool idle_machine = running_.size() + num_draining_ == 0 && ready_.empty();
    const double waited = now - head->arrived;
    const bool overdue = waited >= policy_.max_queue_seconds && now >= next_turnover_ && !sessions_.fits(*head->session);
    if (overdue) next_turnover_ = now + kTenure * pace_.model.seconds_of_prompt(sequence_of(head->id)->known());
    const auto claim = overdue ? Sessions::Claim::kOverdue
                               : idle_machine ? Sessions::Claim::kUrgent : Sessions::Claim::kPatient;
    const bool in = sessions_.settle(*head->session, now, claim);
    Request* first = in ? head : waited < Sessions::kIdleSeconds ? next_that_fits() : nullptr;
    if (!first || !sessions_.settle(*first->session, now, Sessions::Claim::kPatient)) return;
    settlements_.note(now);
    const Session* settled = first->session;
    leave_queue(*first);
    enqueue(*first);
    // Others of the same session may wait further back, and nobody may wait for them.
    if (settled->active == 1) continue;
    std::vector<Request*> others = outside_.heap();
    std::erase_if(others, [settled](const Request* request) { return request->session != settled; });
    for (Request* other : others) {
      leave_queue(*other);
      enqueue(*other);
    }
  }
}

// Of those that wait outside, looked at only when there is more room, or somebody new.
Request* Scheduler::next_that_fits() {
  if (looked_outside_ == sessions_.gains()) return nullptr;
  Request* first = nullptr;
  for (Request* request : outside_.heap()) {
    if (sessions_.fits(*request->session) && (!first || goes_before(*request, *first))) first = request;
  }
  if (!first) looked_outside_ = sessions_.gains();
  return first;
}

}  // namespace tokenspeed
