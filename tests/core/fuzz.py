"""Random calls against the compiled scheduler, its oracle and the shadow device, all compared after each call.

`python -m tests.core.fuzz --ops N --seeds K` runs K seeds of N calls each and prints what was reached. Where the
environment variable TOKENSPEED_FUZZ_TRACE names a folder, the calls of a run that fails are left there, for
`python -m tokenspeed._core.replay`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np

from tests.core.oracle import Oracle
from tests.core.oracle_cache import Copy
from tests.core.oracle_log import LogReaders
from tests.core.oracle_requests import Output, Request, Step
from tests.core.shadow import TO_HOST, Shadow
from tests.core.world import World
from tokenspeed._core import Misuse, Scheduler
from tokenspeed._core.record import RecordingScheduler
from tokenspeed.batch import Finish, Int32Array, Outputs, Plan, PlanBuffers
from tokenspeed.errors import InvariantBroken

VOCAB = 7
TRACE_FOLDER = "TOKENSPEED_FUZZ_TRACE"


class Fuzz:
    """One run: `step()` makes one random call and compares everything afterwards."""

    def __init__(self, seed: int, world: World | None = None, trace: Path | None = None) -> None:
        """`trace`: a new file for the recording of the calls."""
        self.rng = np.random.default_rng(seed)
        self.world = world or World.draw(self.rng)
        w = self.world
        sizes: dict[str, Any] = {
            "num_blocks": w.num_blocks,
            "limits": w.limits,
            "max_model_len": w.max_model_len,
            "max_queued": w.max_queued,
            "prefix_caching": w.prefix_caching,
            "num_host_blocks": w.num_host_blocks,
            "policy": w.policy,
        }
        key = self.rng.bytes(16)
        self.core = RecordingScheduler.open(trace, hash_key=key, **sizes) if trace else Scheduler(hash_key=key, **sizes)
        self.oracle = Oracle(
            predict=self.core.predict_seconds, seconds_of_prompt=self.core.seconds_of_prompt, **sizes
        )
        self.readers = LogReaders(self.core, self.oracle.cache.log, key, w.limits.block_size) if seed % 4 else None
        self.shadow = Shadow(w.num_blocks, w.num_host_blocks, w.limits.block_size, VOCAB, self.rng)
        self.shadow.not_finite = w.not_finite
        self.buffers = [PlanBuffers(w.limits) for _ in range(2)]
        longest = min(w.max_model_len, w.num_blocks * w.limits.block_size) + 2
        self.templates = [self.rng.integers(0, VOCAB, longest).tolist() for _ in range(3)]
        self.ended: deque[list[int]] = deque(maxlen=16)  # tokens of requests that have ended, for a next turn
        self.generated: dict[int, list[int]] = {}  # what commits reported, by request
        self.copies: dict[int, Copy] = {}  # ticket → what the oracle knows of it
        self.calls = 0
        self.ids = 0
        self.planned = 0
        self.now = 0.0
        self.seen: Counter[str] = Counter()

    # --- calls ---

    def step(self) -> None:
        calls = (self.submit, self.advance, self.run_some, self.abort, self.finish, self.misuse, self.land_copies,
                 self.drop_cached)  # fmt: skip
        ends = self.world.ends
        call = calls[int(self.rng.choice(len(calls), p=(0.12, 0.645 - 2 * ends, 0.06, ends, ends, 0.02, 0.15, 0.005)))]
        if not self.oracle.requests:
            call = self.submit
        elif self.rng.random() < 0.3 and self.in_rare_states():
            call = self.abort if self.rng.random() < 0.5 else self.finish
        self.calls += 1
        call()
        self.compare()

    def drain(self) -> None:
        """Run until nothing is left, and check that nothing is."""
        for _ in range(100_000):
            if not (self.core.has_work or self.copies or self.shadow.launched):
                break
            self.advance()
            if self.rng.random() < 0.5:
                self.land_copies()
            self.compare()
        stats = self.core.stats()
        left = (stats.running, stats.waiting, stats.draining, stats.blocks_used, stats.copies_in_flight)
        assert left == (0, 0, 0, 0, 0), stats
        assert not self.oracle.requests
        assert not self.shadow.launched

    def in_rare_states(self) -> list[int]:
        """Requests that an end from outside should meet more often than by chance."""
        chances = {"retracting": 1.0, "fetching": 0.15, "draining": 0.1}
        return [r.id for r in self.oracle.requests.values() if self.rng.random() < chances.get(r.state, 0.0)]

    def prompt(self) -> list[int]:
        rng = self.rng
        hungry = self.world.hungry
        if self.ended and rng.random() < self.world.returns:  # the next turn of what has ended, or is still going on
            live = [request.tokens for request in self.oracle.requests.values()]
            before = [*self.ended, *live][-1 - int(rng.integers(16)) % (len(self.ended) + len(live))]
            most = self.oracle.max_length // 2 if rng.random() < 0.8 else self.oracle.max_length - 3
            shared = before[: max(0, min(len(before), most) - int(rng.choice([0, 0, 3])))]
        else:
            template = self.templates[int(rng.integers(len(self.templates)))]
            shared = template[: int(len(template) * (0.3 if hungry else 0.8) * rng.random() ** 2)]
        prompt = shared + rng.integers(0, VOCAB, int(rng.integers(0, 6))).tolist()
        return [*prompt, -1] if rng.random() < 0.03 else prompt

    def submit(self) -> None:
        rng = self.rng
        names, hungry = self.world.names, self.world.hungry
        prompt = self.prompt()
        request_id = self.ids
        if self.generated and rng.random() < 0.05:
            request_id = int(rng.choice(list(self.oracle.requests) or [self.ids]))
        stop_ids = rng.integers(0, VOCAB, int(not hungry and rng.random() < 0.4)).tolist()
        wishes: dict[str, Any] = {
            "now": max(0.0, self.now + float(rng.choice([0.0, 0.0, -0.1, 0.005]))),
            "max_tokens": None if hungry or rng.random() < 0.1 else int(rng.integers(1, 40)),
            "min_tokens": int(rng.choice([0, 0, 3])),
            "salt": b"" if rng.random() < 0.8 else b"tenant",
            "priority": int(rng.choice([0, 0, 0, -1, 1])),
            "reuse_prefix": bool(rng.random() < self.world.reuses),
            "session": int(rng.integers(1, 5)) if rng.random() < names else 0,
            "tps_floor": float(rng.choice([0.0, 20.0, 90.0])) if rng.random() < names else None,
        }
        refusal = self.core.submit(
            request_id, np.array(prompt, np.int32), stop_ids=np.array(stop_ids, np.int32), **wishes
        )
        expected = self.oracle.submit(request_id, prompt, stop_ids=stop_ids, **wishes)
        assert refusal == expected, (refusal, expected)
        self.seen["submitted" if refusal is None else refusal.name] += 1
        if refusal is None:
            self.ids += 1
            self.shadow.submit(request_id, prompt, wishes["salt"])
            self.generated[request_id] = []
        elif refusal.can_retry:
            assert self.core.retry_after == self.oracle.retry_after, (self.core.retry_after, self.oracle.retry_after)
            assert math.isfinite(self.core.retry_after)

    def some_request(self) -> int:
        live = list(self.oracle.requests)
        if self.rng.random() < 0.4:
            live = self.in_rare_states() or live
        return int(self.rng.choice(live)) if live and self.rng.random() < 0.95 else self.ids + 100

    def end(self, how: str) -> tuple[int, Request | None]:
        request_id = self.some_request()
        request = self.oracle.requests.get(request_id)
        self.seen[f"{how} {request.state if request else 'unknown'}"] += 1
        if request and request.state != "draining":
            self.ended.append(list(request.tokens))
        return request_id, request

    def abort(self) -> None:
        request_id, _ = self.end("abort")
        assert self.core.abort(request_id) == self.oracle.abort(request_id)

    def finish(self) -> None:
        request_id, request = self.end("finish")
        num_tokens = 0
        if request and request.state != "draining":
            num_tokens = int(self.rng.integers(0, len(request.tokens) - request.prompt_length + 1))
        assert self.core.finish(request_id, num_tokens) == self.oracle.finish(request_id, num_tokens)

    def advance(self) -> None:
        """Plan if a step may be launched, commit if one is in flight; at random where both are possible."""
        in_flight = len(self.shadow.launched)
        if in_flight == 0 or (in_flight <= self.world.overlap and self.rng.random() < 0.7):
            planned = self.plan()
            assert planned or in_flight or self.copies or not self.core.has_work, "work is left and nothing moves"
            if planned:
                return
        if in_flight:
            self.commit()

    def run_some(self) -> None:
        self.shadow.run_some()

    def land_copies(self) -> None:
        """Some of the copies that are under way end, in any order."""
        rng = self.rng
        if not self.copies:
            return
        tickets = rng.permutation(list(self.copies))[: int(rng.integers(1, len(self.copies) + 1))].tolist()
        failed = [ticket for ticket in tickets if rng.random() < 0.05]
        landed = [ticket for ticket in tickets if ticket not in failed]
        self.core.land_copies(np.array(landed, np.int32), np.array(failed, np.int32))
        for ticket in [*landed, *failed]:
            copy = self.copies[ticket]
            self.seen["copies failed" if ticket in failed else "copies landed"] += 1
            self.seen["landed for nobody"] += not copy.to_host and copy.waiter is None
            self.shadow.land_copy(ticket, failed=ticket in failed)
        self.oracle.land_copies([self.copies[t] for t in landed], [self.copies[t] for t in failed])
        self.copies = {ticket: copy for ticket, copy in self.copies.items() if ticket not in tickets}

    def drop_cached(self) -> None:
        dropped = self.core.drop_cached()
        assert dropped == self.oracle.cache.drop_cached()
        assert self.core.stats().blocks_cached == 0
        self.seen["cached blocks dropped"] += dropped

    def plan(self) -> bool:
        self.planned += 1
        self.now += 100.0 if self.rng.random() < 0.01 else float(self.rng.choice([0.0, 0.001, 0.01, 0.05]))
        plan = self.core.plan(self.now, self.buffers[self.planned % 2])
        expected = self.oracle.plan(self.now, plan.allowed_prompt_tokens if plan else None)
        assert (plan is None) == (expected is None), (plan, expected)
        if plan is None or expected is None:
            self.seen["nothing to plan"] += 1
            return False
        released = [self.shadow.owner.get(slot, -1) for slot in plan.released.tolist()]
        assert sorted(released) == sorted(-1 if request_id is None else request_id for request_id in expected.released)
        self.shadow.launch(plan)
        self.compare_plan(plan, expected)
        # The buffers are the device's once it has copied them; nothing may depend on them afterwards.
        plan.buffers.flat[:] = -77
        return True

    def compare_plan(self, plan: Plan, expected: Step) -> None:
        assert plan.step == expected.number
        owner = self.shadow.owner
        rows = [owner[slot] for slot in plan.row_slot.tolist()]
        assert rows == [row.request.id for row in expected.rows], (rows, expected)
        assert plan.bound_ids.tolist() == expected.bound
        assert plan.row_new.tolist() == [row.new for row in expected.rows]
        assert plan.row_computed.tolist() == [row.computed for row in expected.rows]
        assert plan.token_ids.tolist() == [token for row in expected.rows for token in row.token_ids]
        assert plan.sample_rows.tolist() == [i for i, row in enumerate(expected.rows) if row.samples]
        assert plan.num_decode == expected.num_decode
        positions = [(owner[slot], position) for slot, position, _ in plan.table_delta.tolist()]
        assert positions == expected.new_blocks
        self.compare_copies(plan, expected)
        self.seen["rows"] += plan.num_rows
        self.seen["paced"] += plan.allowed_prompt_tokens < self.world.limits.max_tokens - plan.num_decode
        self.seen["bound without a row"] += len(set(expected.bound).difference(rows))
        self.seen["copies without a row"] += plan.num_copies > 0 and plan.num_rows == 0
        hits = {row.request.id: row.computed for row in expected.rows}
        self.seen["hit blocks"] += sum(hits.get(bound, 0) // self.oracle.size for bound in expected.bound)

    def compare_copies(self, plan: Plan, expected: Step) -> None:
        assert plan.num_copies == len(expected.copies), (plan.copies, expected.copies)
        for (ticket, direction, _, _), copy in zip(plan.copies.tolist(), expected.copies, strict=True):
            salt, tokens = copy.key
            assert (direction == TO_HOST) == copy.to_host
            chains = self.shadow.chains.of(salt, tokens)[-self.oracle.size :]
            assert self.shadow.content(ticket) == chains, "a copy of another content than its chain says"
            self.copies[ticket] = copy
            self.seen["offloaded" if copy.to_host else "fetched"] += 1

    def commit(self) -> None:
        step = self.shadow.launched[0].number
        tokens = self.shadow.land()
        array: Int32Array = np.array(tokens, np.int32).reshape(-1, 1)
        seconds = 0.0 if self.rng.random() < 0.1 else float(self.rng.integers(1, 50)) * 1e-3
        before = {row.request.id: row.request for row in self.oracle.in_flight[0].rows}
        outputs = self.core.commit(step, array, np.ones(len(tokens), np.int32), seconds)
        expected = self.oracle.commit(tokens)
        assert read_outputs(outputs) == expected, (read_outputs(outputs), expected)
        for output in expected:
            if output.num_tokens:
                self.generated[output.request_id].append(output.token)
            if output.finish is not Finish.NONE:
                self.seen[f"ended by {output.finish.name}"] += 1
                self.ended.append(list(before[output.request_id].tokens))
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
        ticket: Int32Array = np.array([next(iter(self.copies), 0)], np.int32)
        expect_misuse(lambda: self.core.land_copies(ticket, ticket))
        expect_misuse(lambda: self.core.land_copies(none, np.array([-1], np.int32)))
        self.seen["misuse"] += 1

    # --- comparison ---

    def compare(self) -> None:
        broken = self.core.check()
        assert broken is None, broken
        stats, oracle, cache = self.core.stats(), self.oracle, self.oracle.cache
        pairs = {
            "running": (stats.running, len(oracle.running)),
            "waiting": (stats.waiting, len(oracle.waiting())),
            "draining": (stats.draining, len(oracle.leaving())),
            "blocks free": (stats.blocks_free, cache.free),
            "blocks cached": (stats.blocks_cached, len(cache.cached)),
            "blocks used": (stats.blocks_used, cache.num_blocks - cache.free - len(cache.cached)),
            "host blocks used": (stats.host_blocks_used, cache.num_places - cache.free_places),
            "copies in flight": (stats.copies_in_flight, len(cache.copies)),
            "sessions resident": (stats.sessions_resident, len(oracle.sessions.resident())),
            "uncached tokens waiting": (stats.waiting_uncached_tokens, sum(r.uncached for r in oracle.waiting())),
            "sessions waiting": (stats.sessions_waiting, len(oracle.outside())),
            "preemptions": (stats.preemptions, oracle.preemptions),
            "prompt tokens": (stats.prompt_tokens, oracle.prompt_tokens),
            "cached prompt tokens": (stats.cached_prompt_tokens, oracle.cached_prompt_tokens),
            "generated tokens": (stats.generated_tokens, oracle.generated),
            "blocks offloaded": (stats.blocks_offloaded, oracle.offloaded),
            "blocks loaded": (stats.blocks_loaded, oracle.loaded),
            "unfinished": (self.core.num_unfinished, len(oracle.requests)),
        }
        different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        assert not different, f"compiled and oracle differ: {different}"
        if self.readers and self.calls % 3 == 0:  # so that some records wait to be read
            self.seen += self.readers.compare()
        self.seen["sessions waited"] += stats.sessions_waiting > 0
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


def run(seed: int, ops: int, world: World | None = None) -> Fuzz:
    """One seed: `ops` random calls, then everything drained.

    An AssertionError names the seed and the call, and the file with the recording if there is to be one.
    """
    folder = os.environ.get(TRACE_FOLDER)
    trace = Path(folder) / f"seed-{seed}-{os.getpid()}.trace" if folder else None
    fuzz = Fuzz(seed, world, trace)
    try:
        for _ in range(ops):
            fuzz.step()
        fuzz.drain()
    except (AssertionError, InvariantBroken) as error:
        kept = f"recorded in {trace}" if trace else f"name a folder in {TRACE_FOLDER} to record it"
        raise AssertionError(f"seed {seed}, call {fuzz.calls}, {fuzz.world}: {error!r}; {kept}") from error
    if trace:
        trace.unlink()
    fuzz.seen["preemptions"] = fuzz.core.stats().preemptions
    fuzz.seen["positions read"] = fuzz.shadow.reads
    fuzz.seen["prefix blocks lost"] = fuzz.oracle.lost
    fuzz.seen["prefix blocks withdrawn"] = fuzz.oracle.withdrawn
    fuzz.seen["prefixes with a gap"] = fuzz.oracle.gaps
    fuzz.seen["sessions displaced"] = fuzz.oracle.sessions.num_displaced
    fuzz.seen["sessions passed"] = fuzz.oracle.passed
    fuzz.seen["overdue"] = fuzz.oracle.overdue
    fuzz.seen["lessons"] = fuzz.oracle.lessons
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
