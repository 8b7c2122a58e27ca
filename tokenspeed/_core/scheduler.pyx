# cython: boundscheck=False, wraparound=False, freethreading_compatible=False
"""The door of the control plane: converts, releases the GIL, calls, returns. No state crosses it."""

import numpy as np

from tokenspeed._core.types import Misuse, Refusal, Stats
from tokenspeed.batch import Outputs, Plan
from tokenspeed.errors import InvariantBroken

from cython.operator cimport dereference
from libcpp.memory cimport unique_ptr

cdef int MAX_INT32 = 0x7FFFFFFF

cdef dict MISUSE = {
    <int32_t>CMisuse.kTimeRunsBackwards: "the time of a plan is before that of the plan before it",
    <int32_t>CMisuse.kTooManyInFlight: "two steps are in flight; commit the older one first",
    <int32_t>CMisuse.kNoSuchStep: "not the oldest step in flight",
    <int32_t>CMisuse.kWrongShape: "tokens and num_tokens need one row for each sample row of the step",
    <int32_t>CMisuse.kBadResult: "a sample row gives one token id, or NOT_FINITE",
}


cdef int translate_exception() except -1:
    if current_exception_is_bad_alloc():
        raise MemoryError("the control plane is out of memory")
    raise InvariantBroken(current_exception_message().decode())


cdef inline const int32_t[::1] ids(object array, str name):
    """A contiguous int32 vector, or Misuse."""
    try:
        return array
    except (ValueError, TypeError) as error:
        raise Misuse(f"{name} must be a contiguous int32 array of one dimension: {error}") from None


cdef inline TokenSpan span(const int32_t[::1] array) noexcept:
    return TokenSpan(&array[0], array.shape[0]) if array.shape[0] else TokenSpan()


cdef int32_t whole(object value, str name, int32_t low) except? -1:
    """An int of at least `low`. What is past 32 bits is as good as the largest number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise Misuse(f"{name} must be an integer of at least {low}, got {value!r}")
    return min(value, MAX_INT32)


cdef class _Arrays:
    """The addresses in one PlanBuffers, which it keeps alive."""

    cdef object buffers
    cdef list views
    cdef PlanArrays arrays

    def __cinit__(self, buffers):
        self.buffers = buffers
        self.views = []
        self.arrays.row_slot = self.address(buffers.row_slot)
        self.arrays.row_new = self.address(buffers.row_new)
        self.arrays.row_computed = self.address(buffers.row_computed)
        self.arrays.token_ids = self.address(buffers.token_ids)
        self.arrays.table_delta = self.address(buffers.table_delta.reshape(-1))
        self.arrays.sample_rows = self.address(buffers.sample_rows)
        self.arrays.bound = self.address(buffers.bound.reshape(-1))
        self.arrays.released = self.address(buffers.released)
        cdef int64_t[::1] wide = buffers.bound_ids
        self.views.append(wide)
        self.arrays.bound_ids = &wide[0]

    cdef int32_t* address(self, object array) except NULL:
        cdef int32_t[::1] view = array
        self.views.append(view)
        return &view[0]


cdef class Scheduler:
    # Documented in scheduler.pyi.

    cdef unique_ptr[CScheduler] core
    cdef object limits
    cdef list known_buffers
    cdef bint busy

    def __cinit__(self, *, num_blocks, limits, max_model_len, max_queued, prefix_caching, hash_key):
        if limits.max_tokens < limits.max_rows:
            raise Misuse(f"max_tokens ({limits.max_tokens}) is less than max_rows ({limits.max_rows})")
        cdef Limits sizes
        sizes.num_blocks = whole(num_blocks, "num_blocks", 1)
        sizes.block_size = whole(limits.block_size, "block_size", 1)
        sizes.max_rows = whole(limits.max_rows, "max_rows", 1)
        sizes.max_tokens = whole(limits.max_tokens, "max_tokens", 1)
        sizes.max_blocks = whole(limits.max_blocks, "max_blocks", 1)
        sizes.max_deltas = whole(limits.max_deltas, "max_deltas", 1)
        sizes.max_model_len = whole(max_model_len, "max_model_len", 1)
        sizes.max_queued = whole(max_queued, "max_queued", 1)
        self.core.reset(new CScheduler(sizes, bool(prefix_caching), key_of(hash_key)))
        self.limits = limits
        self.known_buffers = []

    def submit(self, request_id, prompt, *, max_tokens, min_tokens=0, stop_ids, salt=b"", priority=0,
               reuse_prefix=True):
        cdef const int32_t[::1] prompt_view = ids(prompt, "prompt")
        cdef const int32_t[::1] stop_view = ids(stop_ids, "stop_ids")
        cdef Submission request
        request.id = request_id
        request.prompt = span(prompt_view)
        request.max_tokens = -1 if max_tokens is None else whole(max_tokens, "max_tokens", 1)
        request.min_tokens = whole(min_tokens, "min_tokens", 0)
        request.stop_ids = span(stop_view)
        cdef bytes salt_bytes = salt
        request.salt = as_bytes(salt_bytes, len(salt_bytes))
        request.priority = whole(priority, "priority", -MAX_INT32 - 1)
        request.reuse_prefix = reuse_prefix
        cdef CRefusal refusal
        self.enter()
        try:
            with nogil:
                refusal = self.core.get().submit(request)
        finally:
            self.busy = False
        return None if refusal == CRefusal.kNone else Refusal(<int32_t>refusal)

    def abort(self, int64_t request_id):
        self.enter()
        try:
            return self.core.get().abort(request_id)
        finally:
            self.busy = False

    def finish(self, int64_t request_id, num_tokens):
        self.enter()
        cdef const Sequence* sequence
        cdef int32_t count
        try:
            sequence = self.core.get().sequence_of(request_id)
            if sequence == NULL:
                return False
            count = whole(num_tokens, "num_tokens", 0)
            if count > sequence.num_generated():
                raise Misuse(f"finish at token {count}, but only {sequence.num_generated()} are generated")
            return self.core.get().finish(request_id, count)
        finally:
            self.busy = False

    def plan(self, double now, buffers):
        cdef PlanArrays arrays = self.arrays_of(buffers).arrays
        cdef CMisuse misuse
        self.enter()
        try:
            with nogil:
                misuse = self.core.get().plan(now, arrays)
        finally:
            self.busy = False
        if misuse != CMisuse.kNone:
            raise Misuse(MISUSE[<int32_t>misuse])
        if arrays.num_rows == 0:
            return None
        return Plan(arrays.step, buffers, arrays.num_rows, arrays.num_decode, arrays.num_tokens, arrays.num_deltas,
                    arrays.num_samples, arrays.num_bound, 0, arrays.num_released)

    def commit(self, int64_t step, tokens, num_tokens):
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.shape[1] != 1:
            raise Misuse(f"tokens must be an array of the shape [samples, 1], got {np.shape(tokens)}")
        cdef const int32_t[::1] token_view = ids(tokens.reshape(-1), "tokens")
        cdef const int32_t[::1] count_view = ids(num_tokens, "num_tokens")
        cdef TokenSpan token_span = span(token_view)
        cdef TokenSpan count_span = span(count_view)
        cdef CMisuse misuse
        self.enter()
        try:
            with nogil:
                misuse = self.core.get().commit(step, token_span, count_span)
            if misuse != CMisuse.kNone:
                raise Misuse(f"step {step}: {MISUSE[<int32_t>misuse]}")
            return self.outputs()
        finally:
            self.busy = False

    cdef object outputs(self):
        cdef const vector[CommitOutput]* entries = &self.core.get().outputs()
        cdef Py_ssize_t count = entries.size()
        cdef Py_ssize_t i
        request_ids = np.empty(count, dtype=np.int64)
        # One allocation for the five int32 arrays: the tokens are read as a column of height K = 1.
        columns = np.empty((5, count), dtype=np.int32)
        cdef int64_t[::1] id_view = request_ids
        cdef int32_t[:, ::1] view = columns
        for i in range(count):
            id_view[i] = dereference(entries)[i].id
            view[0, i] = dereference(entries)[i].sample_index
            view[1, i] = dereference(entries)[i].token
            view[2, i] = dereference(entries)[i].num_tokens
            view[3, i] = <int32_t>dereference(entries)[i].finish
            view[4, i] = dereference(entries)[i].stop_id
        return Outputs(request_ids, columns[0], columns[1].reshape(count, 1), columns[2], columns[3], columns[4])

    def tokens_of(self, int64_t request_id):
        cdef const Sequence* sequence = self.core.get().sequence_of(request_id)
        if sequence == NULL:
            raise Misuse(f"request {request_id} is unknown or has ended")
        cdef TokenSpan tokens = sequence.tokens()
        copy = np.empty(tokens.size(), dtype=np.int32)
        cdef int32_t[::1] view = copy
        cdef size_t i
        for i in range(tokens.size()):
            view[i] = tokens.data()[i]
        return copy, sequence.prompt_length()

    def cached_tokens(self, int64_t request_id):
        cdef optional[int32_t] cached = self.core.get().cached_tokens(request_id)
        if not cached.has_value():
            raise Misuse(f"request {request_id} is unknown, or ended before the last commit")
        return cached.value()

    def stats(self):
        cdef Counters now = self.core.get().counters()
        return Stats(now.running, now.waiting, now.draining, now.blocks_free, now.blocks_cached, now.blocks_used,
                     now.preemptions, now.prompt_tokens, now.cached_prompt_tokens, now.generated_tokens)

    def check(self):
        cdef optional[string] broken = self.core.get().check()
        return broken.value().decode() if broken.has_value() else None

    def dump(self):
        cdef vector[RequestDump] requests = self.core.get().dump()
        cdef Counters now = self.core.get().counters()
        return {
            "last_planned": self.core.get().last_planned(),
            "in_flight": self.core.get().in_flight(),
            "counters": now,
            "requests": [_plain(request) for request in requests],
        }

    def holds(self, request_id):
        return self.core.get().holds(request_id)

    @property
    def num_unfinished(self):
        return self.core.get().num_unfinished()

    @property
    def has_work(self):
        return self.core.get().num_unfinished() > 0

    @property
    def max_length(self):
        return self.core.get().max_length()

    cdef int enter(self) except -1:
        # Calls release the GIL, so two threads could meet inside.
        if self.busy:
            raise Misuse("another thread is inside the scheduler")
        self.busy = True
        return 0

    cdef _Arrays arrays_of(self, object buffers):
        cdef _Arrays known
        for known in self.known_buffers:
            if known.buffers is buffers:
                return known
        if buffers.limits != self.limits:
            raise Misuse("the buffers were made for other limits")
        known = _Arrays(buffers)
        self.known_buffers = [known, *self.known_buffers[:3]]
        return known


cdef HashKey key_of(bytes data) except *:
    if len(data) != 16:
        raise Misuse(f"a hash key has 16 bytes, got {len(data)}")
    return hash_key(data)


cdef dict _plain(RequestDump request):
    return {
        "id": request.id,
        "state": request.state.decode(),
        "priority": request.priority,
        "arrival": request.arrival,
        "slot": request.slot,
        "known": request.known,
        "computed": request.computed,
        "pending": request.pending,
        "last_step": request.last_step,
        "blocks": list(request.blocks),
    }


def siphash(bytes key, bytes data):
    return <bytes>digest(siphash128(key_of(key), as_bytes(data, len(data))))


def block_hashes(bytes key, bytes salt, tokens, block_size):
    cdef const int32_t[::1] view = ids(tokens, "tokens")
    cdef Py_ssize_t size = whole(block_size, "block_size", 1)
    cdef unique_ptr[ChainHasher] hasher
    hasher.reset(new ChainHasher(key_of(key)))
    cdef Hash chain = hasher.get().root(as_bytes(salt, len(salt)))
    cdef Py_ssize_t start
    hashes = []
    for start in range(0, view.shape[0] - size + 1, size):
        chain = hasher.get().next(chain, TokenSpan(&view[start], size))
        hashes.append(<bytes>digest(chain))
    return hashes
