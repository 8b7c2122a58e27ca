from collections.abc import Sequence

from tokenspeed._core.types import Policy, Refusal, Stats
from tokenspeed.batch import BatchLimits, CacheEvents, Int32Array, Outputs, Plan, PlanBuffers

class PromptHashes:
    """The hashes of the full blocks of a prompt [P], as `block_hashes` gives them, made once for several schedulers."""

    num_tokens: int

    def __init__(self, key: bytes, salt: bytes, tokens: Int32Array, block_size: int) -> None: ...

class Scheduler:
    """The control plane: which request computes how many tokens in the next step, in which KV blocks.

    Deterministic: the same calls give the same plans. One call at a time: `submit`, `plan` and `commit` release the
    GIL, and whatever another thread calls meanwhile is `Misuse`, also if it only looks in. A call that makes no sense,
    an argument of another type or out of its range among it, raises `Misuse` and changes nothing. `InvariantBroken`
    means that the state is inconsistent: the process must end.

    Times are in seconds from 0 to 2**33, ids are integers of 64 bits.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        limits: BatchLimits,
        max_model_len: int,
        max_queued: int,
        prefix_caching: bool,
        hash_key: bytes,
        num_host_blocks: int = 0,
        policy: Policy = ...,
    ) -> None:
        """`num_blocks` KV blocks are shared out. `hash_key` is 16 random bytes, the same on every rank.

        `num_host_blocks` are the places of the second tier, in host memory; 0: there is none. Every size, those in
        `limits` too, is at most 2**24; a second tier needs a `max_copies` of at least 1.
        """

    def submit(
        self,
        request_id: int,
        prompt: Int32Array,
        *,
        now: float,
        max_tokens: int | None,
        min_tokens: int = 0,
        stop_ids: Int32Array,
        salt: bytes = b"",
        priority: int = 0,
        reuse_prefix: bool = True,
        session: int = 0,
        tps_floor: float | None = None,
    ) -> Refusal | None:
        """Queue a request, or say why not. `prompt` [P] and `stop_ids` are copied.

        An id may be used again once the control plane no longer `holds` it. `now` may lie before that of the last plan,
        which then counts.

        The request ends at a stop id once `min_tokens` are generated, after `max_tokens` (None: no limit), or
        at `max_length`. Only requests with the same `salt` share cached blocks. Lower `priority` goes first.
        With `reuse_prefix` False every prompt token is computed. Requests that name the same `session` > 0 are turns of
        one; those that name none (0) are recognised by the prompt that they continue. `tps_floor` > 0 is a promise:
        the request is refused if the floor cannot be kept; 0 is none; None is the policy's. `MemoryError`: there is
        none left for the request, and nothing has changed.
        """

    def open_cache_log(self) -> None:
        """From now on note which blocks can be found, for `take_cache_events`. No plan depends on it.

        Whoever opens it takes the events after every step: they are kept until then. Raises `Misuse` once a request
        was queued.
        """

    def take_cache_events(self) -> list[CacheEvents]:
        """Which blocks have come to be found since the last call, and which no more: of pool 0, or nothing."""

    @property
    def retry_after(self) -> float:
        """After a refusal that `can_retry`: seconds until it is worth while to ask again, by the recent pace."""

    def abort(self, request_id: int) -> bool:
        """End a request; it appears in no later `Outputs`. False: it is unknown or has ended."""

    def finish(self, request_id: int, num_tokens: int) -> bool:
        """End a request at its first `num_tokens` generated tokens: a stop was found outside.

        Later tokens are not counted, and it appears in no later `Outputs`. False: it is unknown or has ended.
        """

    def plan(self, now: float, buffers: PlanBuffers) -> Plan | None:
        """Plan the next step into `buffers` and count it as launched. None: nothing can be done now.

        A step may have copies and no rows. After None with copies in flight, their landing is what to wait for.

        At most two steps are in flight. `now` is in seconds and never goes back. Slots in `released` are to be
        cleared before those in `bound` are set: a slot may be in both.
        """

    def commit(self, step: int, tokens: Int32Array, num_tokens: Int32Array, seconds: float = 0.0) -> Outputs:
        """The oldest step in flight has landed with `tokens` [S, 1] and `num_tokens` [S], one for each sample row.

        `seconds` is how long the device took for it, 0: not measured, less than 1 µs counts as 1 µs. The policy learns
        from it.

        A token of `NOT_FINITE` ends its request with an error, and takes the blocks that it wrote out of the
        prefix cache. Results of requests that have ended meanwhile are ignored.
        """

    def land_copies(self, landed: Int32Array, failed: Int32Array) -> None:
        """Copies of the second tier have ended: the tickets of those that landed, and of those that failed.

        Raises `Misuse` if one is not under way or named twice; nothing has changed then.
        """

    def drop_cached(self) -> int:
        """Free every cached block that nobody holds, on both tiers; how many there were.

        What running requests hold stays, and stays to be found. Sessions keep their places.
        """

    def tokens_of(self, request_id: int) -> tuple[Int32Array, int]:
        """A copy of all tokens of a request, prompt and generated, and the length of the prompt."""

    def cached_tokens(self, request_id: int) -> int:
        """Prompt tokens that were prefix hits when the request was first admitted, 0 before.

        Known until the request ends, and after that for the requests of the latest `Outputs`.
        """

    def holds(self, request_id: int) -> bool:
        """Whether a request is unfinished, or has ended but a launched step may still touch its memory."""

    def familiarity(self, prompt: PromptHashes, session: int = 0) -> tuple[bool, int]:
        """Of a request that has not been submitted: whether the session that it names is known, and how many tokens
        of its prompt would be prefix hits now. `session` as for `submit`; the hashes are under this scheduler's key."""

    def stats(self) -> Stats:
        """The counters, in O(1)."""

    def check(self) -> str | None:
        """Recount everything. The first violation in words, or None. Costs a pass over all blocks."""

    def dump(self) -> dict[str, object]:
        """The whole state in plain data, for reading."""

    def seconds_of_prompt(self, num_tokens: int) -> float:
        """What the learned step times say of an uncached prompt computed alone, 0 while too few steps were measured."""

    def predict_seconds(self, decode: Sequence[int], prompts: Sequence[tuple[int, int]]) -> float | None:
        """How long a step with these rows would take; None while too few steps were measured.

        `decode` has the cached positions of each decoding row, `prompts` (cached positions, new tokens) of each chunk.
        """

    @property
    def num_unfinished(self) -> int:
        """Requests that hold anything: waiting, running or draining."""

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""

    @property
    def max_length(self) -> int:
        """The most tokens that a request can have, prompt included: the context, or what the cache can hold."""

def siphash(key: bytes, data: bytes) -> bytes:
    """SipHash-2-4-128 of `data` under a key of 16 bytes: the function that block hashes are made of."""

def block_hashes(key: bytes, salt: bytes, tokens: Int32Array, block_size: int) -> list[bytes]:
    """The hashes that the prefix cache gives to the full blocks of `tokens`, as 16 bytes each.

    The chain starts at the SipHash of `salt` under the key with its second half inverted; each next hash is
    that of the one before and of the block's tokens as little-endian int32, under the key itself.
    """
