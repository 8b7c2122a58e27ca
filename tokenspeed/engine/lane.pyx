"""From the engine's frame to the client's socket in one call, while nothing but plain text comes. See `lane.pyi`.

A token's way through `Stream`, parser, answer and transport is some ten Python calls, which is what a streamed token
costs. Nearly every token only adds its text to an event whose other bytes are known, and that is what a lane does. It
refuses whatever is not so plain, without a trace, and the long way takes it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from cpython.unicode cimport PyUnicode_DecodeUTF8Stateful
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from msgspec.json import encode

from tokenspeed.text.parsers.source import well_escaped
from tokenspeed.text.parsers.tool_parser import quoted

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int socket, const void *buffer, size_t length, int flags)
    const int MSG_DONTWAIT
    const int MSG_NOSIGNAL

cdef enum:
    MAX_TOKENS = 8
    MAX_BOUNDS = 32
    ROOM = 1024
    HEAD = 18  # a chunk's size in hexadecimal and a line end
    MAX_PART = 64

cdef enum Known:
    UNKNOWN = 0
    TEXT = 1
    PART = 2  # of characters
    NEVER = 3

cdef struct Characters:
    uint64_t low, high
    bint wide

cdef struct Piece:
    PyObject *json[2]  # owned: bytes, as they are and inside of a string; of a part the token's own bytes
    Characters all, bare
    int known


cdef Characters characters_of(str text):
    cdef Characters found = Characters(0, 0, False)
    cdef Py_UCS4 letter
    cdef unsigned int character
    for letter in text:
        character = letter
        if character < 64:
            found.low |= (<uint64_t>1) << character
        elif character < 128:
            found.high |= (<uint64_t>1) << (character - 64)
        else:
            found.wide = True
    return found


cdef inline bint meet(Characters *left, Characters *right) noexcept:
    return (left.low & right.low) != 0 or (left.high & right.high) != 0 or (left.wide and right.wide)


cdef class Pieces:
    cdef Piece *pieces
    cdef object table, hidden
    cdef readonly Py_ssize_t size

    def __cinit__(self, table, hidden, Py_ssize_t size):
        self.pieces = <Piece *>calloc(max(size, 1), sizeof(Piece))
        if self.pieces is NULL:
            raise MemoryError()
        self.table, self.hidden, self.size = table, hidden, size

    def __dealloc__(self):
        cdef Py_ssize_t index
        if self.pieces is not NULL:
            for index in range(self.size):
                Py_XDECREF(self.pieces[index].json[0])
                Py_XDECREF(self.pieces[index].json[1])
            free(self.pieces)

    cdef Piece *at(self, object token_id) except? NULL:
        """The piece of a token, NULL for one that never goes by a lane."""
        cdef Py_ssize_t index = token_id
        if index < 0 or index >= self.size:
            return NULL
        cdef Piece *piece = &self.pieces[index]
        if piece.known == UNKNOWN:
            self.learn(token_id, piece)
        return piece if piece.known != NEVER else NULL

    cdef int learn(self, object token_id, Piece *piece) except -1:
        cdef bytes data = b"" if token_id in self.hidden else self.table[token_id]
        if not data:
            piece.known = NEVER
            return 0
        try:
            text = data.decode()
        except UnicodeDecodeError:
            json = inside = data
            known = PART
        else:
            piece.all = characters_of(text)
            piece.bare = characters_of(well_escaped(text))
            json = encode(text)[1:-1]
            again = quoted(text)
            inside = json if again == text else encode(again)[1:-1]
            known = TEXT
        Py_INCREF(json)
        Py_INCREF(inside)
        piece.json[0], piece.json[1] = <PyObject *>json, <PyObject *>inside
        piece.known = known
        return 0


cdef class Frame:
    cdef bytes head, numbered, ids, tail

    def __cinit__(self, bytes head, bytes tail, bytes numbered=None, bytes ids=None):
        self.head, self.numbered, self.ids, self.tail = head, numbered, ids, tail


cdef class Way:
    cdef Frame frame
    cdef Characters but
    cdef bint escapes
    cdef int kind

    def __cinit__(self, Frame frame, str but, bint escapes, bint quoted=False):
        self.frame, self.but, self.escapes, self.kind = frame, characters_of(but), escapes, quoted


cdef class Outlet:
    cdef readonly double last_sent
    cdef object is_closing, buffered, write
    cdef int descriptor
    cdef bint chunked
    cdef Py_ssize_t limit

    def __cinit__(self, transport, bint chunked, Py_ssize_t limit):
        socket = transport.get_extra_info("socket")
        plain = socket is not None and transport.get_extra_info("sslcontext") is None
        self.descriptor = socket.fileno() if plain else -1
        self.is_closing = transport.is_closing
        self.buffered = transport.get_write_buffer_size
        self.write = transport.write
        self.chunked, self.limit = chunked, limit

    cdef int send(self, char *data, Py_ssize_t size, Py_ssize_t waiting) except -1:
        """Write `size` bytes, behind those that wait. 0 where the connection is broken: the transport will find out."""
        cdef ssize_t sent = 0
        if waiting == 0 and self.descriptor >= 0:
            # The interpreter's lock stays: this never blocks, and getting the lock back from a thread that reads a
            # large body takes a hundred times as long.
            sent = c_send(self.descriptor, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                if errno != EAGAIN:
                    return 0
                sent = 0
        if sent < size:
            self.write(PyBytes_FromStringAndSize(data + sent, size - sent))
        return 1


cdef class Gaps:
    cdef double bounds[MAX_BOUNDS]
    cdef long counts[MAX_BOUNDS + 1]
    cdef double total
    cdef int size

    def __cinit__(self, bounds):
        cdef int index
        self.size = len(bounds)
        if self.size > MAX_BOUNDS:
            raise ValueError(f"at most {MAX_BOUNDS} bounds, got {self.size}")
        for index in range(self.size):
            self.bounds[index] = bounds[index]

    cdef void add(self, double gap, int times) noexcept:
        cdef int index = 0
        gap /= times
        while index < self.size and self.bounds[index] < gap:
            index += 1
        self.counts[index] += times
        self.total += gap * times

    def take(self):
        """See `lane.pyi`."""
        cdef int index
        counts = [self.counts[index] for index in range(self.size + 1)]
        total = self.total
        for index in range(self.size + 1):
            self.counts[index] = 0
        self.total = 0.0
        return counts, total


cdef class Lane:
    cdef Pieces pieces
    cdef list token_ids
    cdef Characters stops
    cdef Outlet outlet
    cdef Gaps gaps
    cdef Way way
    cdef readonly bint is_open
    cdef readonly double last
    cdef readonly long num_events
    cdef long number, num_tokens
    cdef char rest[4]
    cdef Py_ssize_t num_rest

    def __cinit__(self, Pieces pieces, list token_ids, str stops):
        self.pieces, self.token_ids, self.stops = pieces, token_ids, characters_of(stops)

    def open(self, Way way, Outlet outlet, Gaps gaps, bytes rest, double last, long number):
        """See `lane.pyi`."""
        self.num_rest = PyBytes_GET_SIZE(rest)
        if self.num_rest > 4:
            raise ValueError("no character has more than four bytes")
        memcpy(self.rest, PyBytes_AS_STRING(rest), self.num_rest)
        self.way, self.outlet, self.gaps = way, outlet, gaps
        self.last, self.number = last, number
        self.num_events = self.num_tokens = 0
        self.is_open = True

    def close(self):
        """See `lane.pyi`."""
        self.is_open = False
        return self.num_tokens

    cdef bint carry(self, object item, double now) except -1:
        """Send what a choice gained; False, and nothing done, for all that is not plain text."""
        cdef PyObject *parts[MAX_TOKENS]
        cdef Piece *piece
        cdef Way way = self.way
        cdef Py_ssize_t index, count
        ids = item.token_ids
        count = len(ids)
        if item.finish != 0 or count == 0 or count > MAX_TOKENS or item.logprobs is not None:
            return False
        for index in range(count):
            piece = self.pieces.at(ids[index])
            if piece is NULL:
                return False
            if piece.known == PART or self.num_rest:
                return count == 1 and self.carry_part(piece, ids, now)
            if meet(&piece.all, &self.stops) or meet(&piece.bare if way.escapes else &piece.all, &way.but):
                return False
            parts[index] = piece.json[way.kind]
        if not self.write(parts, count, ids, now):
            return False
        self.count(ids, count, now)
        return True

    cdef bint carry_part(self, Piece *piece, object ids, double now) except -1:
        """The same for a token that is a part of characters: sends those that it completes, keeps the rest of it."""
        cdef PyObject *part
        cdef Characters found
        cdef char data[MAX_PART]
        cdef bytes more = <bytes>piece.json[0], json
        cdef Py_ssize_t size = self.num_rest + PyBytes_GET_SIZE(more), used = 0
        if piece.known != PART or self.way.frame.ids is not None or size > MAX_PART:
            return False
        memcpy(data, self.rest, self.num_rest)
        put(data + self.num_rest, more)
        try:
            text = PyUnicode_DecodeUTF8Stateful(data, size, NULL, &used)
        except UnicodeDecodeError:
            return False
        if text:
            found = characters_of(text)
            if meet(&found, &self.stops):
                return False
            if self.way.escapes:
                found = characters_of(well_escaped(text))
            if meet(&found, &self.way.but):
                return False
            json = encode(quoted(text) if self.way.kind else text)[1:-1]
            part = <PyObject *>json
            if not self.write(&part, 1, ids, now):
                return False
        self.num_rest = size - used
        memcpy(self.rest, data + used, self.num_rest)
        self.count(ids, 1, now)
        return True

    cdef int count(self, object ids, Py_ssize_t count, double now) except -1:
        """These tokens went by."""
        self.token_ids.extend(ids)
        self.num_tokens += count
        self.gaps.add(now - self.last, count)
        self.last = now
        return 0

    cdef bint write(self, PyObject **parts, Py_ssize_t count, object ids, double now) except -1:
        """Send the event that adds these parts of a JSON string. False where the transport must see to it."""
        cdef Outlet outlet = self.outlet
        if outlet.is_closing():
            return False
        cdef Py_ssize_t waiting = outlet.buffered()
        if waiting > outlet.limit or not self.send(parts, count, ids, waiting):
            return False
        self.num_events += 1
        outlet.last_sent = now
        return True

    cdef bint send(self, PyObject **parts, Py_ssize_t count, object ids, Py_ssize_t waiting) except -1:
        cdef char room[ROOM]
        cdef char *start = room
        cdef Frame frame = self.way.frame
        cdef bytes number = None, listed = None, large = None
        cdef Py_ssize_t index, size = PyBytes_GET_SIZE(frame.head) + PyBytes_GET_SIZE(frame.tail) + 2
        for index in range(count):
            size += PyBytes_GET_SIZE(<bytes>parts[index])
        if frame.numbered is not None:
            number = b"%d" % (self.number + self.num_events)
            size += PyBytes_GET_SIZE(number) + PyBytes_GET_SIZE(frame.numbered)
        if frame.ids is not None:
            listed = encode(ids)
            size += PyBytes_GET_SIZE(listed) + PyBytes_GET_SIZE(frame.ids)
        if size + HEAD + 2 > ROOM:
            large = PyBytes_FromStringAndSize(NULL, size + HEAD + 2)
            start = PyBytes_AS_STRING(large)
        cdef char *end = put(start + HEAD, frame.head)
        if number is not None:
            end = put(put(end, number), frame.numbered)
        end[0] = b'"'
        end += 1
        for index in range(count):
            end = put(end, <bytes>parts[index])
        end[0] = b'"'
        end += 1
        if listed is not None:
            end = put(put(end, frame.ids), listed)
        end = put(end, frame.tail)
        start += HEAD
        if self.outlet.chunked:
            start = chunk(start, size)
            end[0], end[1] = b"\r", b"\n"
            end += 2
        return self.outlet.send(start, end - start, waiting)


cdef inline char *put(char *at, bytes part) noexcept:
    cdef Py_ssize_t size = PyBytes_GET_SIZE(part)
    memcpy(at, PyBytes_AS_STRING(part), size)
    return at + size


cdef inline char *chunk(char *at, Py_ssize_t size) noexcept:
    """Write the line that begins a chunk so that it ends at `at`; gives where it begins."""
    at -= 2
    at[0], at[1] = b"\r", b"\n"
    while size:
        at -= 1
        at[0] = b"0123456789abcdef"[size & 15]
        size >>= 4
    return at


def carry(list gained, dict lanes, double now, failed):
    """See `lane.pyi`."""
    cdef list rest = []
    cdef PyObject *found
    cdef Lane lane
    for item in gained:
        found = PyDict_GetItem(lanes, item.id)
        if found is not NULL:
            lane = <Lane>found
            if lane.is_open:
                try:
                    if lane.carry(item, now):
                        continue
                except Exception:
                    failed(item)
                    continue
        rest.append(item)
    return rest
