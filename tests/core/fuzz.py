"""Random calls against the compiled scheduler, its oracle and the shadow device, all compared after each call.

`python -m tests.core.fuzz --ops N --seeds K` runs K seeds of N calls each and prints what was reached.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tests.core.oracle import Oracle, Output
from tests.core.oracle import Step as OracleStep
from tests.core.shadow import Shadow
from tokenspeed._core import Misuse, Scheduler
from tokenspeed.batch import BatchLimits, Finish, Int32Array, Outputs, Plan, PlanBuffers

VOCAB = 7


@dataclass(frozen=True)
class World:
    """The sizes of one run, small, so that shortage is the rule."""

    num_blocks: int
    limits: BatchLimits
    max_model_len: int
    max_queued: int
    prefix_caching: bool
    overlap: int
    not_finite: float
    ends: float  # chance that a call is an abort, and that it is a finish
    hungry: bool  # requests are short and go on to their greatest length, so that they starve each other

    @staticmethod
    def draw(rng: np.random.Generator) -> World:
        block_size = int(rng.integers(1, 5))
        rows = int(rng.integers(1, 9))
        return World(
            num_blocks=int(rng.integers(2, 10)) if rng.random() < 0.3 else int(rng.integers(8, 32)),
            limits=BatchLimits(
                max_rows=rows,
                max_tokens=rows + int(rng.integers(0, 20)),
                max_blocks=int(rng.integers(2, 7)) if rng.random() < 0.3 else int(rng.integers(6, 24)),
                block_size=block_size,
            ),
            max_model_len=int(rng.integers(4, 100)),
            max_queued=int(rng.integers(1, 12)),
            prefix_caching=bool(rng.random() < 0.85),
            overlap=int(rng.integers(0, 2)),
            not_finite=float(rng.choice([0.0, 0.01, 0.05])),
            ends=float(rng.choice([0.002, 0.03])),
            hungry=bool(rng.random() < 0.5),
        )


class Fuzz:
    """One run: `step()` makes one random call and compares everything afterwards."""

    def __init__(self, seed: int, world: World | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.world = world or World.draw(self.rng)
        w = self.world
        self.core = Scheduler(
            num_blocks=w.num_blocks,
            limits=w.limits,
            max_model_len=w.max_model_len,
            max_queued=w.max_queued,
            prefix_caching=w.prefix_caching,
            hash_key=self.rng.bytes(16),
        )
        self.oracle = Oracle(
            num_blocks=w.num_blocks,
            limits=w.limits,
            max_model_len=w.max_model_len,
            max_queued=w.max_queued,
            prefix_caching=w.prefix_caching,
        )
        self.shadow = Shadow(w.num_blocks, w.limits.block_size, w.limits.max_rows, VOCAB, self.rng)
        self.shadow.not_finite = w.not_finite
        self.buffers = [PlanBuffers(w.limits) for _ in range(2)]
        longest = min(w.max_model_len, w.num_blocks * w.limits.block_size) + 2
        self.templates = [self.rng.integers(0, VOCAB, longest).tolist() for _ in range(3)]
        self.generated: dict[int, list[int]] = {}  # what commits reported, by request
        self.ids = 0
        self.planned = 0
        self.seen: Counter[str] = Counter()

    # --- calls ---

    def step(self) -> None:
        calls = (self.submit, self.advance, self.run_some, self.abort, self.finish, self.misuse)
        ends = self.world.ends
        call = calls[int(self.rng.choice(len(calls), p=(0.12, 0.8 - 2 * ends, 0.06, ends, ends, 0.02)))]
        if not self.oracle.requests:
            call = self.submit
        elif self.rng.random() < 0.1 and any(r.state == "retracting" for r in self.oracle.requests.values()):
            call = self.abort if self.rng.random() < 0.5 else self.finish
        call()
        self.compare()

    def drain(self) -> None:
        """Run until nothing is left, and check that nothing is."""
        for _ in range(100_000):
            if not self.core.has_work:
                break
            self.advance()
            self.compare()
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.draining, stats.blocks_used) == (0, 0, 0, 0), stats
        assert not self.oracle.requests
        assert not self.shadow.launched

    def submit(self) -> None:
        rng = self.rng
        template = self.templates[int(rng.integers(len(self.templates)))]
        hungry = self.world.hungry
        shared = int(len(template) * (0.3 if hungry else 0.8) * rng.random() ** 2)
        prompt = template[:shared] + rng.integers(0, VOCAB, int(rng.integers(0, 6))).tolist()
        if rng.random() < 0.03:
            prompt = [*prompt, -1]
        salt = b"" if rng.random() < 0.8 else b"tenant"
        request_id = self.ids
        if self.generated and rng.random() < 0.05:
            request_id = int(rng.choice(list(self.oracle.requests) or [self.ids]))
        stop_ids = rng.integers(0, VOCAB, int(not hungry and rng.random() < 0.4)).tolist()
        max_tokens = None if hungry or rng.random() < 0.1 else int(rng.integers(1, 40))
        min_tokens, priority = int(rng.choice([0, 0, 3])), int(rng.choice([0, 0, 0, -1, 1]))
        reuse_prefix = bool(rng.random() < 0.9)
        refusal = self.core.submit(
            request_id,
            np.array(prompt, np.int32),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_ids=np.array(stop_ids, np.int32),
            salt=salt,
            priority=priority,
            reuse_prefix=reuse_prefix,
        )
        expected = self.oracle.submit(
            request_id,
            prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_ids=stop_ids,
            salt=salt,
            priority=priority,
            reuse_prefix=reuse_prefix,
        )
        assert refusal == expected, (refusal, expected)
        self.seen["submitted" if refusal is None else refusal.name] += 1
        if refusal is None:
            self.ids += 1
            self.shadow.submit(request_id, prompt, salt)
            self.generated[request_id] = []

    def some_request(self) -> int:
        live = list(self.oracle.requests)
        if self.rng.random() < 0.4:
            live = [request.id for request in self.oracle.leaving()] or live
        return int(self.rng.choice(live)) if live and self.rng.random() < 0.95 else self.ids + 100

    def abort(self) -> None:
        request_id = self.some_request()
        request = self.oracle.requests.get(request_id)
        self.seen[f"abort {request.state if request else 'unknown'}"] += 1
        assert self.core.abort(request_id) == self.oracle.abort(request_id)

    def finish(self) -> None:
        request_id = self.some_request()
        request = self.oracle.requests.get(request_id)
        self.seen[f"finish {request.state if request else 'unknown'}"] += 1
        num_tokens = 0
        if request and request.state != "draining":
            num_tokens = int(self.rng.integers(0, len(request.tokens) - request.prompt_length + 1))
        assert self.core.finish(request_id, num_tokens) == self.oracle.finish(request_id, num_tokens)

    def advance(self) -> None:
        """Plan if a step may be launched, commit if one is in flight; at random where both are possible."""
        in_flight = len(self.shadow.launched)
        if in_flight == 0 or (in_flight <= self.world.overlap and self.rng.random() < 0.7):
            planned = self.plan()
            assert planned or in_flight or not self.core.has_work, "work is left and nothing moves"
            if planned:
                return
        if in_flight:
            self.commit()

    def run_some(self) -> None:
        self.shadow.run_some()

    def plan(self) -> bool:
        self.planned += 1
        plan = self.core.plan(float(self.planned), self.buffers[self.planned % 2])
        expected = self.oracle.plan()
        assert (plan is None) == (expected is None), (plan, expected)
        if plan is None or expected is None:
            self.seen["nothing to plan"] += 1
            return False
        released = [self.shadow.owner[slot] for slot in plan.released.tolist()]
        assert sorted(released) == sorted(expected.released)
        self.shadow.launch(plan)
        self.compare_plan(plan, expected)
        # The buffers are the device's once it has copied them; nothing may depend on them afterwards.
        plan.buffers.flat[:] = -77
        return True

    def compare_plan(self, plan: Plan, expected: OracleStep) -> None:
        assert plan.step == expected.number
        assert plan.bound_ids.tolist() == expected.bound
        owner = self.shadow.owner
        assert [owner[slot] for slot in plan.row_slot.tolist()] == [row.request.id for row in expected.rows]
        assert plan.row_new.tolist() == [row.new for row in expected.rows]
        assert plan.row_computed.tolist() == [row.computed for row in expected.rows]
        assert plan.token_ids.tolist() == [token for row in expected.rows for token in row.token_ids]
        assert plan.sample_rows.tolist() == [i for i, row in enumerate(expected.rows) if row.samples]
        assert plan.num_decode == expected.num_decode and plan.num_copies == 0
        positions = [(owner[slot], position) for slot, position, _ in plan.table_delta.tolist()]
        assert positions == expected.new_blocks
        self.seen["rows"] += plan.num_rows
        self.seen["hit blocks"] += sum(
            row.computed // self.oracle.size for row in expected.rows[plan.num_rows - plan.num_bound :]
        )

    def commit(self) -> None:
        step = self.shadow.launched[0].number
        tokens = self.shadow.land()
        array: Int32Array = np.array(tokens, np.int32).reshape(-1, 1)
        outputs = self.core.commit(step, array, np.ones(len(tokens), np.int32))
        expected = self.oracle.commit(tokens)
        assert read_outputs(outputs) == expected, (read_outputs(outputs), expected)
        for output in expected:
            if output.num_tokens:
                self.generated[output.request_id].append(output.token)
            self.seen[f"ended by {output.finish.name}"] += output.finish is not Finish.NONE
            cached = self.core.cached_tokens(output.request_id)
            assert cached <= len(self.shadow.truth[output.request_id].chains)
            if output.finish is Finish.ERROR:
                self.shadow.failed(output.request_id, self.oracle.launched)

    def misuse(self) -> None:
        """Calls that make no sense change nothing; `compare` runs after this."""
        launched = self.shadow.launched
        bad_step = launched[0].number + 1 if launched else self.oracle.launched
        none: Int32Array = np.zeros(0, np.int32)
        expect_misuse(lambda: self.core.commit(bad_step, none.reshape(0, 1), none))
        if launched:
            two: Int32Array = np.zeros(self.world.limits.max_rows + 1, np.int32)
            expect_misuse(lambda: self.core.commit(launched[0].number, two.reshape(-1, 1), two))
        if self.planned:
            expect_misuse(lambda: self.core.plan(-1.0, self.buffers[0]))
        expect_misuse(lambda: self.core.tokens_of(self.ids + 100))
        self.seen["misuse"] += 1

    # --- comparison ---

    def compare(self) -> None:
        broken = self.core.check()
        assert broken is None, broken
        stats, oracle = self.core.stats(), self.oracle
        assert (stats.running, stats.waiting, stats.draining) == (
            len(oracle.running),
            len(oracle.waiting()),
            len(oracle.leaving()),
        )
        assert (stats.blocks_free, stats.blocks_cached) == (oracle.free, len(oracle.cached))
        assert stats.blocks_used == oracle.num_blocks - oracle.free - len(oracle.cached)
        assert stats.preemptions == oracle.preemptions
        assert stats.generated_tokens == oracle.generated
        assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (oracle.prompt_tokens, oracle.cached_prompt_tokens)
        assert self.core.num_unfinished == len(oracle.requests)
        if oracle.requests and self.rng.random() < 0.1:
            self.compare_request(int(self.rng.choice(list(oracle.requests))))

    def compare_request(self, request_id: int) -> None:
        request = self.oracle.requests[request_id]
        if request.state == "draining":
            return
        tokens, prompt_length = self.core.tokens_of(request_id)
        assert tokens.tolist() == request.tokens and prompt_length == request.prompt_length
        assert tokens[prompt_length:].tolist() == self.generated[request_id]
        assert self.core.cached_tokens(request_id) == (request.cached or 0)


def read_outputs(outputs: Outputs) -> list[Output]:
    columns = zip(
        outputs.request_ids.tolist(),
        outputs.sample_index.tolist(),
        outputs.tokens[:, 0].tolist(),
        outputs.num_tokens.tolist(),
        outputs.finish.tolist(),
        outputs.stop_ids.tolist(),
        strict=True,
    )
    return [Output(i, sample, token, count, Finish(finish), stop) for i, sample, token, count, finish, stop in columns]


def expect_misuse(call: object) -> None:
    assert callable(call)
    try:
        call()
    except Misuse:
        return
    raise AssertionError("a call that makes no sense was accepted")


def run(seed: int, ops: int) -> Fuzz:
    """One seed: `ops` random calls, then everything drained. An AssertionError names the seed and the call."""
    fuzz = Fuzz(seed)
    for op in range(ops):
        try:
            fuzz.step()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, call {op}, {fuzz.world}: {error}") from error
    fuzz.drain()
    fuzz.seen["preemptions"] = fuzz.core.stats().preemptions
    fuzz.seen["positions read"] = fuzz.shadow.reads
    return fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=2000, help="calls a seed")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    start = time.monotonic()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        seen += run(seed, options.ops).seen
    seconds = time.monotonic() - start
    for name, count in sorted(seen.items()):
        print(f"{name:24} {count:12,}")
    print(f"{options.seeds} seeds of {options.ops:,} calls in {seconds:.0f} s, 0 violations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
