from tokenspeed._core.types import Refusal, Stats
from tokenspeed.batch import BatchLimits, Int32Array, Outputs, Plan, PlanBuffers

class Scheduler:
    """The control plane: which request computes how many tokens in the next step, in which KV blocks.

    Deterministic: the same calls give the same plans. One call at a time; `submit`, `plan` and `commit`
    release the GIL. A call that makes no sense raises `Misuse` and changes nothing. `InvariantBroken`
    means that the state is inconsistent: the process must end.
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
    ) -> None:
        """`num_blocks` KV blocks are shared out. `hash_key` is 16 random bytes, the same on every rank."""

    def submit(
        self,
        request_id: int,
        prompt: Int32Array,
        *,
        max_tokens: int | None,
        min_tokens: int = 0,
        stop_ids: Int32Array,
        salt: bytes = b"",
        priority: int = 0,
        reuse_prefix: bool = True,
    ) -> Refusal | None:
        """Queue a request, or say why not. `prompt` [P] and `stop_ids` are copied.

        The request ends at a stop id once `min_tokens` are generated, after `max_tokens` (None: no limit), or
        at `max_length`. Only requests with the same `salt` share cached blocks. Lower `priority` goes first.
        With `reuse_prefix` False every prompt token is computed.
        """

    def abort(self, request_id: int) -> bool:
        """End a request; it appears in no later `Outputs`. False: it is unknown or has ended."""

    def finish(self, request_id: int, num_tokens: int) -> bool:
        """End a request at its first `num_tokens` generated tokens: a stop was found outside.

        Later tokens are not counted, and it appears in no later `Outputs`. False: it is unknown or has ended.
        """

    def plan(self, now: float, buffers: PlanBuffers) -> Plan | None:
        """Plan the next step into `buffers` and count it as launched. None: nothing can be computed now.

        At most two steps are in flight. `now` is in seconds and never goes back. Slots in `released` are to be
        cleared before those in `bound` are set: a slot may be in both.
        """

    def commit(self, step: int, tokens: Int32Array, num_tokens: Int32Array) -> Outputs:
        """The oldest step in flight has landed with `tokens` [S, 1] and `num_tokens` [S], one for each sample row.

        A token of `NOT_FINITE` ends its request with an error, and takes the blocks that it wrote out of the
        prefix cache. Results of requests that have ended meanwhile are ignored.
        """

    def tokens_of(self, request_id: int) -> tuple[Int32Array, int]:
        """A copy of all tokens of a request, prompt and generated, and the length of the prompt."""

    def cached_tokens(self, request_id: int) -> int:
        """Prompt tokens that were prefix hits when the request was first admitted, 0 before.

        Known until the request ends, and after that for the requests of the latest `Outputs`.
        """

    def holds(self, request_id: int) -> bool:
        """Whether a request is unfinished, or has ended but a launched step may still touch its memory."""

    def stats(self) -> Stats:
        """The counters, in O(1)."""

    def check(self) -> str | None:
        """Recount everything. The first violation in words, or None. Costs a pass over all blocks."""

    def dump(self) -> dict[str, object]:
        """The whole state in plain data, for reading."""

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
