"""Several pools as one control plane: who goes where, that it is the same everywhere, and that nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.driver import LIMITS, finishes, int32
from tokenspeed._core import Misuse, Refusal, Scheduler
from tokenspeed._core.pools import STREAM_TOKENS, Pools, control_plane
from tokenspeed._core.record import Answer, RecordingPools
from tokenspeed._core.replay import replay
from tokenspeed._core.scheduler import PromptHashes
from tokenspeed.batch import NO_STEP, NOT_FINITE, Finish, JointBuffers, JointPlan, Outputs, PlanBuffers

KEY = b"k" * 16
SIZES: dict[str, Any] = {
    "num_blocks": (16, 16), "limits": LIMITS, "max_model_len": 64, "max_queued": 8, "prefix_caching": True,
    "hash_key": KEY,
}  # fmt: skip
SYSTEM = list(range(1, 17))
"""Four blocks that prompts begin with."""


class Driven:
    """Pools in the hands of a test, recounted after each step."""

    def __init__(self, made: Pools | None = None, **sizes: Any) -> None:
        self.core = made or Pools(**(SIZES | sizes))
        self.buffers = [JointBuffers([PlanBuffers(LIMITS) for _ in SIZES["num_blocks"]]) for _ in range(2)]
        self.now = 0.0

    def submit(self, request_id: int, prompt: Sequence[int], **terms: Any) -> Refusal | None:
        given: dict[str, Any] = {"now": self.now, "max_tokens": 4, "stop_ids": int32([])}
        return self.core.submit(request_id, int32(prompt), **(given | terms))

    def plan(self) -> JointPlan | None:
        self.now += 1.0
        self.buffers.reverse()
        plan = self.core.plan(self.now, self.buffers[0])
        assert self.core.check() is None
        return plan

    def commit(self, plan: JointPlan, tokens: Sequence[int] | int = 5, seconds: float = 0.0) -> Outputs:
        given = [tokens] * plan.num_samples if isinstance(tokens, int) else tokens
        outputs = self.core.commit(
            plan.step, int32(given).reshape(-1, 1), np.ones(len(given), dtype=np.int32), seconds
        )
        assert self.core.check() is None
        return outputs

    def run_out(self) -> list[tuple[int, Finish]]:
        ended = []
        while self.core.has_work:
            plan = self.plan()
            assert plan is not None
            ended += finishes(self.commit(plan))
        return ended


def test_one_pool_is_a_scheduler_and_nothing_else() -> None:
    assert type(control_plane(**(SIZES | {"num_blocks": (16,)}))) is Scheduler
    assert type(control_plane(**SIZES)) is Pools


def test_requests_go_where_least_is_to_be_computed() -> None:
    d = Driven()
    for request_id, length in ((1, 20), (2, 5), (3, 5), (4, 30)):
        assert d.submit(request_id, [100 * request_id + at for at in range(length)]) is None
    # 20 to the first, then to the emptier one as long as a request weighs more than what waits in the other.
    assert [d.core.pool_of(request_id) for request_id in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert STREAM_TOKENS > 64
    assert d.core.stats().waiting == 4 and [pool.waiting for pool in d.core.stats().pools] == [2, 2]


def test_what_many_begin_with_does_not_draw_them_all_into_one_pool_but_a_session_stays_where_it_is() -> None:
    d = Driven(num_blocks=(64, 64))
    turns = {agent: [*SYSTEM, *[20 * agent + at for at in range(9)]] for agent in range(1, 5)}
    where: dict[int, int] = {}
    for turn in range(3):
        for agent, prompt in turns.items():
            assert d.submit(agent, prompt, max_tokens=2) is None
            where.setdefault(agent, d.core.pool_of(agent))
            assert d.core.pool_of(agent) == where[agent], f"turn {turn}"
        d.run_out()
        turns = {agent: [*prompt, 5, 5, 200 + agent] for agent, prompt in turns.items()}
    assert sorted(where.values()) == [0, 0, 1, 1]
    assert d.core.stats().cached_prompt_tokens > 100


def test_a_named_session_is_found_in_its_pool_whatever_it_says() -> None:
    d = Driven()
    assert d.submit(1, list(range(30)), max_tokens=1) is None  # so that the next goes to the other pool
    assert d.submit(2, [7] * 9, session=77, max_tokens=1) is None
    assert d.core.pool_of(2) == 1
    d.run_out()
    d.submit(3, list(range(100, 120)))
    d.submit(4, list(range(200, 220)))
    assert d.submit(5, [9] * 30, session=77) is None
    assert d.core.pool_of(5) == 1


def test_one_name_for_everything_does_not_crowd_one_pool() -> None:
    d = Driven()
    assert d.submit(1, [7] * 9, session=77, max_tokens=1) is None
    d.run_out()
    for request_id in range(2, 10):
        assert d.submit(request_id, [request_id] * 3, session=77) is None
    assert min(pool.waiting for pool in d.core.stats().pools) >= 2


def test_a_refusal_that_time_may_mend_is_said_before_one_that_is_for_good() -> None:
    d = Driven(num_blocks=(4, 60), max_queued=2)
    while d.submit(1000 + d.core.num_unfinished, [3] * 30) is None:
        pass
    assert d.submit(1, [5] * 30) is Refusal.QUEUE_FULL and d.core.retry_after > 0


def test_a_prefix_hit_decides_between_pools_that_are_equally_busy() -> None:
    d = Driven(num_blocks=(32, 32))
    d.submit(1, [*SYSTEM, 30, 31], max_tokens=1)
    d.submit(2, [*range(40, 58)], max_tokens=1)
    d.run_out()
    assert d.submit(3, [*range(40, 56), 90, 91, 92]) is None and d.core.pool_of(3) == 1
    d.core.abort(3)
    assert d.submit(4, [*SYSTEM, 90, 91, 92], reuse_prefix=False) is None
    d.core.abort(4)
    assert d.submit(5, [*SYSTEM, 90, 91, 92]) is None and d.core.pool_of(5) == 0


def test_familiarity_is_what_an_admission_then_finds() -> None:
    core = Scheduler(**(SIZES | {"num_blocks": 16}))
    buffers = PlanBuffers(LIMITS)
    core.submit(1, int32(range(14)), now=0.0, max_tokens=1, stop_ids=int32([]), salt=b"a")
    plan = core.plan(1.0, buffers)
    assert plan is not None
    core.commit(plan.step, int32([[5]]), int32([1]))

    def of(salt: bytes, prompt: Sequence[int], session: int = 0) -> tuple[bool, int]:
        return core.familiarity(PromptHashes(KEY, salt, int32(prompt), LIMITS.block_size), session)

    assert of(b"a", [*range(14), 9, 9, 9]) == (False, 12)
    assert of(b"a", [*range(9), 9, 9, 9]) == (False, 8)
    assert of(b"b", range(14)) == of(b"a", [3]) == of(b"a", []) == (False, 0)
    assert of(b"a", range(14), session=5) == (False, 12)
    core.submit(2, int32(range(14)), now=1.0, max_tokens=1, stop_ids=int32([]), session=5)
    assert of(b"", [3], session=5) == (True, 0) and of(b"", [3], session=6) == (False, 0)


def test_a_pool_without_room_is_not_the_last_that_is_asked_and_a_refusal_says_when_to_come_back() -> None:
    d = Driven(max_queued=2)
    assert d.submit(1, [1] * 9) is None and d.submit(2, [2] * 9) is None
    assert d.submit(3, [3] * 9) is Refusal.QUEUE_FULL and d.core.retry_after >= 1.0
    assert not d.core.holds(3) and d.core.num_unfinished == 2
    assert d.submit(2, [2] * 9) is Refusal.DUPLICATE_ID
    assert d.submit(4, []) is Refusal.EMPTY
    assert d.submit(5, [1], tps_floor=10.0) is Refusal.NO_PROMISES
    d.core.abort(1)
    assert d.submit(3, [3] * 9) is None
    assert sorted(d.run_out()) == [(2, Finish.LENGTH), (3, Finish.LENGTH)]
    uneven = Driven(num_blocks=(4, 16))
    assert uneven.core.max_length == 16
    assert uneven.submit(1, [1] * 30) is None and uneven.core.pool_of(1) == 1, "the small one cannot hold it"


def test_a_step_has_the_plans_of_all_pools_beside_each_other() -> None:
    d = Driven()
    d.submit(1, [10, 11, 12])
    first = d.plan()
    assert first is not None and [part.step for part in first.parts] == [1, NO_STEP]
    assert [part.num_rows for part in first.parts] == [1, 0]
    d.commit(first, [21])
    d.submit(2, [30, 31])
    both = d.plan()
    assert both is not None and (both.num_rows, both.num_samples, both.num_tokens, both.num_decode) == (2, 2, 3, 1)
    assert both.row_slot.tolist() == [0, LIMITS.max_rows] and both.row_computed.tolist() == [3, 0]
    assert both.token_ids.tolist() == [21, 30, 31] and both.row_new.tolist() == [1, 2]
    assert both.bound.tolist() == [[LIMITS.max_rows, 0]] and both.bound_ids.tolist() == [2]
    assert both.sample_rows.tolist() == [0, 1]
    assert both.table_delta[:, :2].tolist() == [[LIMITS.max_rows, 0]], "the first one's token fits its block"
    outputs = d.commit(both, [22, 32])
    assert outputs.request_ids.tolist() == [1, 2] and outputs.sample_index.tolist() == [0, 1]
    assert outputs.tokens.ravel().tolist() == [22, 32]
    assert d.core.tokens_of(2)[0].tolist() == [30, 31, 32]


def test_misuse_changes_nothing_in_any_pool() -> None:
    d = Driven()
    d.submit(1, [10, 11, 12])
    d.submit(2, [30, 31])
    with pytest.raises(Misuse, match="joint buffers"):
        d.core.plan(1.0, PlanBuffers(LIMITS))
    plan = d.plan()
    assert plan is not None
    state = d.core.dump()
    for tokens in ([5], [5, -2], [5, 5, 5]):
        with pytest.raises(Misuse):
            d.commit(plan, tokens)
    with pytest.raises(Misuse, match="oldest"):
        d.core.commit(plan.step + 1, int32([[5], [5]]), int32([1, 1]))
    with pytest.raises(Misuse, match="ticket"):
        d.core.land_copies(int32([0]), int32([]))
    assert d.core.dump() == state
    second = d.plan()
    assert second is not None
    with pytest.raises(Misuse, match="in flight"):
        d.plan()
    assert d.commit(plan, [5, NOT_FINITE]).finish.tolist() == [Finish.NONE, Finish.ERROR]
    assert d.core.holds(2) and d.submit(2, [1]) is Refusal.DUPLICATE_ID, "a launched step may still touch it"
    d.commit(second)
    assert not d.core.holds(2) and d.core.holds(1)


def test_a_step_teaches_only_the_pool_that_computed_most_how_long_steps_take() -> None:
    d = Driven(num_blocks=(64, 64))
    for request_id, length in ((1, 8), (2, 5), (3, 4)):
        d.submit(request_id, [request_id] * length, max_tokens=40)
    assert [d.core.pool_of(request_id) for request_id in (1, 2, 3)] == [0, 1, 1]
    for _ in range(30):
        plan = d.plan()
        assert plan is not None
        d.commit(plan, seconds=0.01)
    one_stream, two_streams = (pool.predict_seconds([9], []) for pool in d.core._pools)
    assert one_stream is None and two_streams is not None


def random_calls(d: Driven, seed: int, count: int) -> list[bytes]:
    """Submissions of turns and others, aborts, steps up to two deep, drops; the digests of all answers."""
    draw = random.Random(seed)
    flights: list[JointPlan] = []
    answers: list[object] = []
    for number in range(count):
        match draw.choices(("submit", "step", "abort", "finish", "drop"), (3, 8, 1, 1, 0.2))[0]:
            case "submit":
                prompt = [*SYSTEM[: 4 * draw.randrange(5)], *[draw.randrange(30) for _ in range(draw.randrange(1, 20))]]
                terms = {"session": draw.choice((0, 0, 5, 6)), "max_tokens": draw.randrange(1, 12)}
                answers.append(d.submit(number, prompt, **terms))
            case "abort":
                answers.append(d.core.abort(draw.randrange(number + 1)))
            case "finish":
                answers.append(d.core.finish(draw.randrange(number + 1), 0))
            case "drop":
                answers.append(d.core.drop_cached())
            case _:
                plan = d.plan() if len(flights) < 2 else None
                if plan is not None:
                    flights.append(plan)
                    answers.append(Answer.of(plan).digest)
                elif flights:
                    landed = flights.pop(0)
                    tokens = [draw.choice((3, 4, 5, NOT_FINITE)) for _ in range(landed.num_samples)]
                    answers.append(d.commit(landed, tokens, draw.random() / 100).records)
    while flights:
        answers.append(d.commit(flights.pop(0)).records)
    answers.append(d.core.dump())
    return [Answer.of(answer).digest for answer in answers]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_calls_give_the_same_routes_and_plans_and_nothing_is_left(seed: int, tmp_path: Path) -> None:
    recorded = RecordingPools.open(tmp_path / "calls", **SIZES)
    one, other = Driven(recorded), Driven()
    assert random_calls(one, seed, 400) == random_calls(other, seed, 400)
    recorded.close()
    again = replay(tmp_path / "calls", check=True)
    assert again.difference is None and again.calls > 400
    for number in range(400):
        other.core.abort(number)
    while (plan := other.plan()) is not None:
        other.commit(plan)
    assert other.core.num_unfinished == 0 and not other.core.has_work
    other.core.drop_cached()
    stats = other.core.stats()
    assert (stats.blocks_used, stats.blocks_cached, stats.blocks_free) == (0, 0, 32)
    assert sum(pool.generated_tokens > 50 for pool in stats.pools) == 2


def test_copies_of_the_second_tier_land_in_the_pool_that_began_them() -> None:
    d = Driven(num_host_blocks=16, num_blocks=(8, 8))
    draw = random.Random(3)
    seen: set[int] = set()
    for number in range(120):
        d.submit(number, [draw.randrange(9) for _ in range(draw.randrange(8, 24))], max_tokens=2)
        plan = d.plan()
        if plan is not None:
            tickets = plan.copies[:, 0]
            seen |= {ticket % 2 for ticket in tickets.tolist()}
            d.commit(plan)
            d.core.land_copies(tickets[::2].copy(), tickets[1::2].copy())
        assert d.core.check() is None and d.core.stats().copies_in_flight == 0
    assert seen == {0, 1}
