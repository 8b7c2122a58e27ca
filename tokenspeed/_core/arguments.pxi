# What may be an argument of the door: whatever comes from Python becomes a C++ value here, or Misuse naming the argument.

from tokenspeed._core.types import Misuse, Policy
from tokenspeed.batch import BatchLimits

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from libc.float cimport DBL_MAX

cdef int64_t MAX_INT32 = 0x7FFFFFFF
cdef int64_t MAX_INT64 = 0x7FFFFFFFFFFFFFFF
cdef int64_t MIN_INT64 = -MAX_INT64 - 1
# Of anything that is counted in a size: sums of them fit 32 bits. The dearest is a block, with 56 bytes.
cdef int64_t MOST = 1 << 24
# Seconds, 272 years: from here on a double no longer tells microseconds apart.
cdef double LATEST = 1LL << 33


cdef str shown(object value):
    """A value for a message: always short, whatever was given."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if value is None or type(value) in (bool, int, float) else f"a {type(value).__name__}"


cdef object integer(object value):
    """The int that a value is, numpy's too: ids come from arrays. Anything else, a bool for one: None."""
    if type(value) is int:
        return value
    try:
        return None if isinstance(value, bool) else PyNumber_Index(value)
    except TypeError:
        return None


cdef int64_t whole(object value, str name, int64_t low, int64_t high) except? -1:
    """An integer from `low` to `high`, or Misuse."""
    number = integer(value)
    if number is None or not low <= number <= high:
        raise Misuse(f"{name} must be an integer from {low} to {high}, got {shown(value)}")
    return number


cdef int32_t at_least(object value, str name, int64_t low) except? -1:
    """An integer of at least `low`, or Misuse. What is past 32 bits is as good as the largest number."""
    number = integer(value)
    return whole(value if number is None else min(number, MAX_INT32), name, low, MAX_INT32)


cdef int64_t id_of(object request_id) except? -1:
    return whole(request_id, "request_id", MIN_INT64, MAX_INT64)


cdef double number(object value, str name) except? -1:
    """A finite number of at least 0, or Misuse."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= DBL_MAX:
        raise Misuse(f"{name} must be a finite number of at least 0, got {shown(value)}")
    return value


cdef double seconds_of(object value, str name) except? -1:
    """A time or a duration that can be one, or Misuse."""
    cdef double seconds = number(value, name)
    if seconds > LATEST:
        raise Misuse(f"{name} must be at most {LATEST:.0f} seconds, got {shown(value)}")
    return seconds


cdef bint flag(object value, str name) except -1:
    if not isinstance(value, bool):
        raise Misuse(f"{name} must be True or False, got {shown(value)}")
    return value


cdef bytes octets(object value, str name):
    if type(value) is not bytes:
        raise Misuse(f"{name} must be bytes, got {shown(value)}")
    return value


cdef HashKey key_of(object data) except *:
    cdef bytes key = octets(data, "a hash key")
    if len(key) != 16:
        raise Misuse(f"a hash key has 16 bytes, got {len(key)}")
    return hash_key(key)


cdef inline const int32_t[::1] ids(object array, str name):
    """A contiguous int32 vector, or Misuse."""
    if array is None:  # a memoryview would take it for an empty one
        raise Misuse(f"{name} must be a contiguous int32 array of one dimension, got None")
    try:
        return array
    except (BufferError, TypeError, ValueError) as error:
        raise Misuse(f"{name} must be a contiguous int32 array of one dimension: {error}") from None


cdef int borrow(object array, int ndim, str name, Py_buffer* view) except -1:
    """The memory of a contiguous int32 array of `ndim` dimensions, to be released by the caller; or Misuse.

    A typed memoryview checks the same, but is a Python object: 0.5 µs each where this takes 0.1.
    """
    try:
        PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except (BufferError, TypeError, ValueError) as error:
        raise Misuse(f"{name} must be a contiguous int32 array: {error}") from None
    if view.ndim == ndim and view.format != NULL and view.format[0] == b"i" and view.format[1] == 0:
        return 0
    PyBuffer_Release(view)
    given = memoryview(array)
    raise Misuse(f"{name} must be an int32 array of {ndim} dimensions, got {given.format} {list(given.shape)}")


cdef inline TokenSpan borrowed(const Py_buffer* view) noexcept nogil:
    return TokenSpan(<const int32_t*>view.buf, view.shape[0])


cdef inline TokenSpan span(const int32_t[::1] array) noexcept:
    return TokenSpan(&array[0], array.shape[0]) if array.shape[0] else TokenSpan()


cdef Limits sizes_of(object limits, object num_blocks, object max_model_len, object max_queued,
                     object num_host_blocks) except *:
    """The sizes of everything that is shared out, or Misuse naming the one that cannot be."""
    if not isinstance(limits, BatchLimits):
        raise Misuse(f"limits must be BatchLimits, got {shown(limits)}")
    cdef Limits sizes
    sizes.num_blocks = whole(num_blocks, "num_blocks", 1, MOST)
    sizes.block_size = whole(limits.block_size, "block_size", 1, MOST)
    sizes.max_rows = whole(limits.max_rows, "max_rows", 1, MOST)
    sizes.max_tokens = whole(limits.max_tokens, "max_tokens", 1, MOST)
    sizes.max_blocks = whole(limits.max_blocks, "max_blocks", 1, MOST)
    sizes.max_deltas = whole(limits.max_deltas, "max_deltas", 1, MAX_INT32)
    sizes.max_model_len = whole(max_model_len, "max_model_len", 1, MOST)
    sizes.max_queued = whole(max_queued, "max_queued", 1, MOST)
    sizes.num_host_blocks = whole(num_host_blocks, "num_host_blocks", 0, MOST)
    sizes.max_copies = whole(limits.max_copies, "max_copies", 0, MOST)
    if sizes.max_tokens < sizes.max_rows:
        raise Misuse(f"max_tokens ({sizes.max_tokens}) is less than max_rows ({sizes.max_rows})")
    if sizes.num_host_blocks > 0 and sizes.max_copies == 0:
        raise Misuse("max_copies is 0: no block could ever go to the host or come back")
    return sizes


cdef PolicySettings settings_of(object policy) except *:
    if not isinstance(policy, Policy):
        raise Misuse(f"policy must be a Policy, got {shown(policy)}")
    cdef PolicySettings settings
    settings.tps_floor = number(policy.tps_floor, "tps_floor")
    settings.floor_is_promise = flag(policy.floor_is_promise, "floor_is_promise")
    settings.footprints = flag(policy.footprints, "footprints")
    settings.max_queue_seconds = number(policy.max_queue_seconds, "max_queue_seconds")
    return settings
