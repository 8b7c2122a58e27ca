# cython: boundscheck=False, wraparound=False, freethreading_compatible=False
"""The door of the control plane: converts, releases the GIL, calls, returns. No state crosses it."""

import numpy as np

from tokenspeed._core.types import Misuse, Policy, Refusal, Stats
from tokenspeed.batch import CacheEvents, Outputs, Plan, PlanBuffers
from tokenspeed.errors import InvariantBroken

from cpython.buffer cimport PyBuffer_Release
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libcpp.memory cimport unique_ptr

include "arguments.pxi"

cdef dict MISUSE = {
    <int32_t>CMisuse.kTimeRunsBackwards: "the time of a plan is before that of the plan before it",
    <int32_t>CMisuse.kTooManyInFlight: "two steps are in flight; commit the older one first",
    <int32_t>CMisuse.kNoSuchStep: "not the oldest step in flight",
    <int32_t>CMisuse.kWrongShape: "tokens and num_tokens need one row for each sample row of the step",
    <int32_t>CMisuse.kBadResult: "a sample row gives one token id, or NOT_FINITE",
    <int32_t>CMisuse.kNoSuchTicket: "a ticket that is not under way, or is named twice",
}


cdef int translate_exception() except -1:
    if current_exception_is_bad_alloc():
        raise MemoryError("the control plane is out of memory")
    raise InvariantBroken(current_exception_message().decode())


cdef class _Arrays:
    """The addresses in one PlanBuffers, whose arrays it keeps alive. Each is as large as the sizes say, or Misuse."""

    cdef object buffers
    cdef list views
    cdef PlanArrays arrays

    def __cinit__(self, buffers, limits):
        self.buffers = buffers
        self.views = []
        cdef tuple rows = (limits.max_rows,)
        self.arrays.row_slot = self.int32("row_slot", rows)
        self.arrays.row_new = self.int32("row_new", rows)
        self.arrays.row_computed = self.int32("row_computed", rows)
        self.arrays.token_ids = self.int32("token_ids", (limits.max_tokens,))
        self.arrays.table_delta = self.int32("table_delta", (limits.max_deltas, 3))
        self.arrays.sample_rows = self.int32("sample_rows", rows)
        self.arrays.bound = self.int32("bound", (limits.max_rows, 2))
        self.arrays.copies = self.int32("copies", (limits.max_copies, 4))
        self.arrays.released = self.int32("released", rows)
        self.arrays.bound_ids = <int64_t*>self.address("bound_ids", rows, 8)

    cdef int32_t* int32(self, str name, tuple shape) except? NULL:
        return <int32_t*>self.address(name, shape, 4)

    cdef void* address(self, str name, tuple shape, int itemsize) except? NULL:
        try:
            view = memoryview(getattr(self.buffers, name))
        except (BufferError, TypeError, ValueError) as error:
            raise Misuse(f"{name} of the buffers is no array: {error}") from None
        integers = view.format in ("i", "l", "q") and view.itemsize == itemsize
        if not integers or view.shape != shape or not view.c_contiguous or view.readonly:
            raise Misuse(f"{name} of the buffers must be a writable contiguous array of {8 * itemsize}-bit integers "
                         f"in the shape {list(shape)}")
        self.views.append(view)
        return PyMemoryView_GET_BUFFER(view).buf


cdef class PromptHashes:
    # Documented in scheduler.pyi.

    cdef vector[Hash] hashes
    cdef readonly int num_tokens

    def __cinit__(self, key, salt, tokens, block_size):
        cdef const int32_t[::1] view = ids(tokens, "tokens")
        cdef Py_ssize_t size = whole(block_size, "block_size", 1, MOST)
        cdef bytes salt_bytes = octets(salt, "salt")
        cdef unique_ptr[ChainHasher] hasher
        hasher.reset(new ChainHasher(key_of(key)))
        cdef Hash chain = hasher.get().root(as_bytes(salt_bytes, len(salt_bytes)))
        cdef Py_ssize_t block, count = view.shape[0] // size
        self.num_tokens = view.shape[0]
        with nogil:
            for block in range(count):
                chain = hasher.get().next(chain, TokenSpan(&view[block * size], size))
                self.hashes.push_back(chain)


cdef class Scheduler:
    # Documented in scheduler.pyi.

    cdef unique_ptr[CScheduler] core
    cdef object limits
    cdef list known_buffers
    cdef bint busy

    def __cinit__(self, *, num_blocks, limits, max_model_len, max_queued, prefix_caching, hash_key,
                  num_host_blocks=0, policy=Policy()):
        cdef Limits sizes = sizes_of(limits, num_blocks, max_model_len, max_queued, num_host_blocks)
        cdef PolicySettings settings = settings_of(policy)
        cdef bint caching = flag(prefix_caching, "prefix_caching")
        self.core.reset(new CScheduler(sizes, settings, caching, key_of(hash_key)))
        self.limits = limits
        self.known_buffers = []

    # Calls that change the state

    def submit(self, request_id, prompt, *, now, max_tokens, min_tokens=0, stop_ids, salt=b"", priority=0,
               reuse_prefix=True, session=0, tps_floor=None):
        cdef const int32_t[::1] prompt_view = ids(prompt, "prompt")
        cdef const int32_t[::1] stop_view = ids(stop_ids, "stop_ids")
        cdef bytes salt_bytes = octets(salt, "salt")
        cdef Submission request
        request.id = id_of(request_id)
        request.now = seconds_of(now, "now")
        request.prompt = span(prompt_view)
        request.max_tokens = -1 if max_tokens is None else at_least(max_tokens, "max_tokens", 1)
        request.min_tokens = at_least(min_tokens, "min_tokens", 0)
        request.stop_ids = span(stop_view)
        request.salt = as_bytes(salt_bytes, len(salt_bytes))
        request.priority = whole(priority, "priority", -MAX_INT32 - 1, MAX_INT32)
        request.reuse_prefix = flag(reuse_prefix, "reuse_prefix")
        request.session = whole(session, "session", 0, MAX_INT64)
        request.tps_floor = -1 if tps_floor is None else number(tps_floor, "tps_floor")
        cdef CRefusal refusal
        cdef CScheduler* core = self.enter()
        try:
            with nogil:
                refusal = core.submit(request)
        finally:
            self.busy = False
        return None if refusal == CRefusal.kNone else Refusal(<int32_t>refusal)

    def abort(self, request_id):
        return self.idle().abort(id_of(request_id))

    def finish(self, request_id, num_tokens):
        cdef int64_t id = id_of(request_id)
        cdef int32_t count = at_least(num_tokens, "num_tokens", 0)
        cdef const Sequence* sequence = self.idle().sequence_of(id)
        if sequence == NULL:
            return False
        if count > sequence.num_generated():
            raise Misuse(f"finish at token {count}, but only {sequence.num_generated()} are generated")
        return self.idle().finish(id, count)

    def plan(self, now, buffers):
        cdef PlanArrays arrays = self.arrays_of(buffers).arrays
        cdef double time = seconds_of(now, "now")
        cdef CMisuse misuse
        cdef CScheduler* core = self.enter()
        try:
            with nogil:
                misuse = core.plan(time, arrays)
        finally:
            self.busy = False
        if misuse != CMisuse.kNone:
            raise Misuse(MISUSE[<int32_t>misuse])
        if arrays.num_rows + arrays.num_bound + arrays.num_copies == 0:
            return None
        return Plan(arrays.step, buffers, arrays.num_rows, arrays.num_decode, arrays.num_tokens, arrays.num_deltas,
                    arrays.num_samples, arrays.num_bound, arrays.num_copies, arrays.num_released,
                    arrays.allowed_prompt_tokens)

    def commit(self, step, tokens, num_tokens, seconds=0.0):
        cdef int64_t number_of_step = whole(step, "step", MIN_INT64, MAX_INT64)
        cdef double measured = seconds_of(seconds, "seconds")
        cdef Py_buffer token_view, count_view
        borrow(tokens, 2, "tokens", &token_view)
        try:
            borrow(num_tokens, 1, "num_tokens", &count_view)
            try:
                return self.commit_views(number_of_step, &token_view, &count_view, measured)
            finally:
                PyBuffer_Release(&count_view)
        finally:
            PyBuffer_Release(&token_view)

    cdef object commit_views(self, int64_t step, const Py_buffer* tokens, const Py_buffer* counts, double seconds):
        if tokens.shape[1] != 1:
            raise Misuse(f"tokens must have the shape [samples, 1], got [{tokens.shape[0]}, {tokens.shape[1]}]")
        cdef CMisuse misuse
        cdef const vector[CommitOutput]* entries
        cdef Py_ssize_t size
        cdef CScheduler* core = self.enter()
        try:
            with nogil:
                misuse = core.commit(step, borrowed(tokens), borrowed(counts), seconds)
            if misuse != CMisuse.kNone:
                raise Misuse(f"step {step}: {MISUSE[<int32_t>misuse]}")
            entries = &core.outputs()
            size = entries.size() * sizeof(CommitOutput)
            return Outputs(PyBytes_FromStringAndSize(<const char*>entries.data(), size))
        finally:
            self.busy = False

    def land_copies(self, landed, failed):
        cdef const int32_t[::1] landed_view = ids(landed, "landed")
        cdef const int32_t[::1] failed_view = ids(failed, "failed")
        cdef CMisuse misuse = self.idle().land_copies(span(landed_view), span(failed_view))
        if misuse != CMisuse.kNone:
            raise Misuse(MISUSE[<int32_t>misuse])

    def drop_cached(self):
        return self.idle().drop_cached()

    def open_cache_log(self):
        if not self.idle().open_cache_log():
            raise Misuse("the cache log begins before the first request")

    def take_cache_events(self):
        cdef CacheLog* log = &self.idle().cache_log()
        if log.records().empty():
            return []
        cdef bytes records = octets_of(log.records().data(), log.records().size() * sizeof(CacheRecord))
        cdef bytes tokens = octets_of(log.tokens().data(), log.tokens().size() * sizeof(int32_t))
        log.taken()
        return [CacheEvents(0, records, tokens)]

    # Calls that look in

    @property
    def retry_after(self):
        return self.idle().retry_after()

    def tokens_of(self, request_id):
        cdef int64_t id = id_of(request_id)
        cdef CScheduler* core = self.enter()  # making the array may run other Python code
        cdef const Sequence* sequence
        cdef TokenSpan tokens
        cdef int32_t[::1] view
        cdef size_t i
        try:
            sequence = core.sequence_of(id)
            if sequence == NULL:
                raise Misuse(f"request {id} is unknown or has ended")
            tokens = sequence.tokens()
            copy = np.empty(tokens.size(), dtype=np.int32)
            view = copy
            for i in range(tokens.size()):
                view[i] = tokens.data()[i]
            return copy, sequence.prompt_length()
        finally:
            self.busy = False

    def cached_tokens(self, request_id):
        cdef int64_t id = id_of(request_id)
        cdef optional[int32_t] cached = self.idle().cached_tokens(id)
        if not cached.has_value():
            raise Misuse(f"request {id} is unknown, or ended before the last commit")
        return cached.value()

    def familiarity(self, PromptHashes prompt not None, session=0):
        cdef Familiarity found = self.idle().familiarity(
            HashSpan(prompt.hashes.data(), prompt.hashes.size()), whole(session, "session", 0, MAX_INT64))
        return bool(found.session), found.cached

    def stats(self):
        cdef Counters now = self.idle().counters()
        return Stats(now.running, now.waiting, now.draining, now.blocks_free, now.blocks_cached, now.blocks_used,
                     now.host_blocks_used, now.copies_in_flight, now.sessions_resident, now.sessions_waiting,
                     now.waiting_uncached_tokens, now.preemptions, now.prompt_tokens, now.cached_prompt_tokens,
                     now.generated_tokens, now.blocks_offloaded, now.blocks_loaded)

    def check(self):
        cdef optional[string] broken = self.idle().check()
        return broken.value().decode() if broken.has_value() else None

    def dump(self):
        cdef CScheduler* core = self.idle()
        cdef vector[RequestDump] requests = core.dump()
        cdef Counters now = core.counters()
        cdef int64_t last_planned = core.last_planned()
        cdef int in_flight = core.in_flight()
        return {
            "last_planned": last_planned,
            "in_flight": in_flight,
            "counters": now,
            "requests": [_plain(request) for request in requests],
        }

    def holds(self, request_id):
        return bool(self.idle().holds(id_of(request_id)))

    @property
    def num_unfinished(self):
        return self.idle().num_unfinished()

    @property
    def has_work(self):
        return self.idle().num_unfinished() > 0

    def seconds_of_prompt(self, num_tokens):
        return self.idle().step_time().seconds_of_prompt(whole(num_tokens, "num_tokens", 1, MOST))

    def predict_seconds(self, decode, prompts):
        cdef Work work
        try:
            for computed in decode:
                work.add_decode(whole(computed, "decode", 0, MOST))
            for computed, count in prompts:
                work.add_prompt(whole(computed, "prompts", 0, MOST), whole(count, "prompts", 0, MOST))
        except Misuse:
            raise
        except (TypeError, ValueError) as error:
            raise Misuse(f"decode must hold integers and prompts pairs of them: {error}") from None
        cdef CScheduler* core = self.idle()
        return core.step_time().predict(work) if core.step_time().trusted() else None

    @property
    def max_length(self):
        return self.idle().max_length()

    # Who is inside. A call that keeps the GIL while it is in C++ only asks for the core; one that lets it go, or runs
    # Python code meanwhile, marks it as busy.

    cdef CScheduler* idle(self) except NULL:
        if self.busy:
            raise Misuse("another thread is inside the scheduler")
        return self.core.get()

    cdef CScheduler* enter(self) except NULL:
        cdef CScheduler* core = self.idle()
        self.busy = True
        return core

    cdef _Arrays arrays_of(self, object buffers):
        cdef _Arrays known
        for known in self.known_buffers:
            if known.buffers is buffers:
                return known
        if not isinstance(buffers, PlanBuffers):
            raise Misuse(f"buffers must be PlanBuffers, got {shown(buffers)}")
        if buffers.limits != self.limits:
            raise Misuse("the buffers were made for other limits")
        known = _Arrays(buffers, self.limits)
        self.known_buffers = [known, *self.known_buffers[:3]]
        return known


cdef bytes octets_of(const void* data, size_t size):
    return PyBytes_FromStringAndSize(<const char*>data, size)


cdef dict _plain(RequestDump request):
    return {
        "id": request.id,
        "state": request.state.decode(),
        "priority": request.priority,
        "arrival": request.arrival,
        "rank": request.rank,
        "slot": request.slot,
        "known": request.known,
        "computed": request.computed,
        "pending": request.pending,
        "last_step": request.last_step,
        "blocks": list(request.blocks),
    }


def siphash(key, data):
    cdef bytes message = octets(data, "data")
    return <bytes>digest(siphash128(key_of(key), as_bytes(message, len(message))))


def block_hashes(key, salt, tokens, block_size):
    cdef PromptHashes prompt = PromptHashes(key, salt, tokens, block_size)
    cdef size_t block
    return [<bytes>digest(prompt.hashes[block]) for block in range(prompt.hashes.size())]
