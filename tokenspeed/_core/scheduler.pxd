# The C++ API of the control plane, declared once. The door is in scheduler.pyx.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.optional cimport optional
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "<span>" namespace "std" nogil:
    cdef cppclass TokenSpan "std::span<const tokenspeed::TokenId>":
        TokenSpan()
        TokenSpan(const int32_t* data, size_t size)
        const int32_t* data() const
        size_t size() const

    cdef cppclass ByteSpan "std::span<const std::byte>":
        ByteSpan()


cdef extern from "hash.h" namespace "tokenspeed" nogil:
    cdef cppclass HashKey:
        pass

    cdef cppclass Hash:
        pass

    cdef cppclass HashSpan "std::span<const tokenspeed::Hash>":
        HashSpan(const Hash* data, size_t size)

    cdef cppclass ChainHasher:
        ChainHasher(HashKey key)
        Hash root(ByteSpan salt) const
        Hash next(const Hash& previous, TokenSpan block) const

    Hash siphash128(HashKey key, ByteSpan message)


cdef extern from "door.h" namespace "tokenspeed" nogil:
    ByteSpan as_bytes(const char* data, size_t size)
    HashKey hash_key(const char* data)
    string digest(const Hash& hash)
    string current_exception_message()
    cbool current_exception_is_bad_alloc()


cdef extern from "types.h" namespace "tokenspeed" nogil:
    cdef struct Limits:
        int32_t num_blocks
        int32_t block_size
        int32_t max_rows
        int32_t max_tokens
        int32_t max_blocks
        int32_t max_deltas
        int32_t max_model_len
        int32_t max_queued
        int32_t num_host_blocks
        int32_t max_copies

    cdef enum class CRefusal "tokenspeed::Refusal"(int32_t):
        kNone

    cdef enum class CMisuse "tokenspeed::Misuse"(int32_t):
        kNone
        kTimeRunsBackwards
        kTooManyInFlight
        kNoSuchStep
        kWrongShape
        kBadResult
        kNoSuchTicket


cdef extern from "cache_log.h" namespace "tokenspeed" nogil:
    cdef struct CacheRecord:
        pass

    cdef cppclass CacheLog:
        const vector[CacheRecord]& records() const
        const vector[int32_t]& tokens() const
        void taken()


cdef extern from "sequence.h" namespace "tokenspeed" nogil:
    cdef cppclass Sequence:
        TokenSpan tokens() const
        int32_t prompt_length() const
        int32_t num_generated() const


cdef extern from "policy.h" namespace "tokenspeed" nogil:
    cdef struct PolicySettings:
        double tps_floor
        cbool floor_is_promise
        cbool footprints
        double max_queue_seconds

    cdef cppclass StepTimeModel:
        cbool trusted() const
        double seconds_of_prompt(int32_t tokens) const
        double predict(const Work& work) const

    cdef cppclass Work:
        Work()
        void add_decode(int64_t computed)
        void add_prompt(int32_t computed, int32_t count)


cdef int translate_exception() except -1


cdef extern from "scheduler.h" namespace "tokenspeed" nogil:
    cdef struct Submission:
        int64_t id
        double now
        TokenSpan prompt
        int32_t max_tokens
        int32_t min_tokens
        TokenSpan stop_ids
        ByteSpan salt
        int32_t priority
        cbool reuse_prefix
        int64_t session
        double tps_floor

    cdef struct PlanArrays:
        int32_t* row_slot
        int32_t* row_new
        int32_t* row_computed
        int32_t* token_ids
        int32_t* table_delta
        int32_t* sample_rows
        int32_t* bound
        int32_t* copies
        int32_t* released
        int64_t* bound_ids
        int64_t step
        int32_t num_rows
        int32_t num_decode
        int32_t num_tokens
        int32_t num_deltas
        int32_t num_samples
        int32_t num_bound
        int32_t num_copies
        int32_t num_released
        int32_t allowed_prompt_tokens

    cdef struct CommitOutput:
        int64_t id
        int32_t sample_index
        int32_t token
        int32_t num_tokens
        int32_t finish
        int32_t stop_id
        int32_t cached_tokens

    cdef struct Counters:
        int32_t running
        int32_t waiting
        int32_t draining
        int32_t blocks_free
        int32_t blocks_cached
        int32_t blocks_used
        int32_t host_blocks_used
        int32_t copies_in_flight
        int32_t sessions_resident
        int32_t sessions_waiting
        int64_t waiting_uncached_tokens
        int64_t preemptions
        int64_t prompt_tokens
        int64_t cached_prompt_tokens
        int64_t generated_tokens
        int64_t blocks_offloaded
        int64_t blocks_loaded

    cdef struct Familiarity:
        cbool session
        int32_t cached

    cdef struct RequestDump:
        int64_t id
        string state
        int32_t priority
        uint64_t arrival
        double rank
        int32_t slot
        int32_t known
        int32_t computed
        int32_t pending
        int64_t last_step
        vector[int32_t] blocks

    cdef cppclass CScheduler "tokenspeed::Scheduler":
        CScheduler(const Limits& limits, const PolicySettings& policy, cbool prefix_caching, HashKey key) except +translate_exception
        CRefusal submit(const Submission& submission) except +translate_exception
        double retry_after() const
        cbool abort(int64_t id) except +translate_exception
        cbool finish(int64_t id, int32_t num_tokens) except +translate_exception
        CMisuse plan(double now, PlanArrays& plan) except +translate_exception
        CMisuse commit(int64_t step, TokenSpan tokens, TokenSpan counts, double seconds) except +translate_exception
        CMisuse land_copies(TokenSpan landed, TokenSpan failed) except +translate_exception
        int32_t drop_cached() except +translate_exception
        const vector[CommitOutput]& outputs() const
        cbool open_cache_log() except +translate_exception
        CacheLog& cache_log()
        const Sequence* sequence_of(int64_t id) const
        optional[int32_t] cached_tokens(int64_t id) const
        Counters counters() const
        Familiarity familiarity(HashSpan prompt, int64_t session) except +translate_exception
        bint holds(int64_t id) const
        int32_t num_unfinished() const
        int32_t max_length() const
        const StepTimeModel& step_time() const
        optional[string] check() except +translate_exception
        vector[RequestDump] dump() except +translate_exception
        int in_flight() const
        int64_t last_planned() const
