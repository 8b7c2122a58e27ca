"""The closed loop over the compiled control plane: nothing is lost, generated twice or cached by magic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.simulate.door import Sizes
from tokenspeed.simulate.engine import Engine
from tokenspeed.simulate.generate import generate
from tokenspeed.simulate.replay import Load, arrivals, replay
from tokenspeed.simulate.report import TokenTimes, Window, sample
from tokenspeed.simulate.sessions import Conversation, FreshIds, Session, Turn, apply_rules
from tokenspeed.simulate.step_models import H100_V2L

ROOMY = Sizes(model=H100_V2L, kv_tokens=1_130_000)


def one_session(*turns: Turn, tool_sys: int = 0, shared_system: bool = False) -> Iterator[Conversation]:
    """The same session again and again, from its first turn."""
    fresh = FreshIds()
    session = Session("hand-made", tool_sys, turns)
    for serial in itertools.count(1):
        yield Conversation(session, 0, fresh, serial=serial, shared_system=shared_system)


def small_sessions(count: int, seed: int) -> list[Session]:
    """Generated sessions at a sixteenth of their length."""
    shorter = []
    for session in apply_rules(generate(count, seed)):
        turns = [Turn(turn.kept // 1024 * 64, 8 + turn.new // 16, 1 + turn.output // 16, turn.think / 4)
                 for turn in session.turns]  # fmt: skip
        shorter.append(Session(session.id, session.tool_sys // 16, tuple(turns)))
    return shorter


def check_tokens(engine: Engine) -> None:
    """Every turn that ended got exactly its tokens, in order; every other got fewer."""
    times = TokenTimes(engine)
    assert len(times.times) == engine.stats.generated_tokens
    for turn in engine.turns:
        stream = times.of(turn)
        if turn.ended >= 0:
            assert len(stream) == turn.output and stream[-1] == turn.ended
        else:
            assert len(stream) < turn.output
        assert (np.diff(stream) > 0).all() and (stream > turn.submitted).all()


def test_a_session_without_neighbours_hits_everything_that_it_kept() -> None:
    turns = (
        Turn(0, 1_000, 200, 0.0),
        Turn(1_152, 50, 10, 1.0),  # keeps 152 of the generated tokens
        Turn(1_200, 100, 10, 1.0),  # 18 whole blocks of what it keeps
        Turn(640, 700, 10, 1.0),  # compacted
    )
    engine = Engine(ROOMY, one_session(*turns), [0.0])
    engine.run(60.0)
    first = engine.turns[:4]
    assert [turn.ideal for turn in first] == [0, 1_152, 1_152, 640]
    assert [turn.cached for turn in first] == [turn.ideal for turn in first]
    assert [turn.is_first for turn in first] == [True, False, False, False] and engine.turns[4].is_first
    assert engine.turns[4].cached == 0, "a session that comes again shares nothing"


def test_a_shared_system_prompt_is_found_by_the_second_session() -> None:
    engine = Engine(ROOMY, one_session(Turn(0, 1_000, 5, 1.0), tool_sys=300, shared_system=True), [0.0])
    engine.run(10.0)
    assert [turn.cached for turn in engine.turns[:3]] == [0, 256, 256]
    assert [turn.ideal for turn in engine.turns[:3]] == [256, 256, 256]


def test_the_next_turn_is_sent_after_its_pause_and_the_next_session_after_its_own() -> None:
    engine = Engine(ROOMY, one_session(Turn(0, 100, 5, 2.0), Turn(64, 100, 5, 7.0)), [3.0])
    engine.run(40.0)
    first, second, third = engine.turns[:3]
    assert first.submitted == 3.0
    assert second.submitted == first.ended + 7.0
    assert third.is_first and third.submitted == second.ended + 2.0


def test_a_step_takes_as_long_as_the_model_says() -> None:
    engine = Engine(ROOMY, one_session(Turn(0, 100, 3, 50.0)), [0.0])
    engine.run(10.0)
    model = H100_V2L
    full = (model.shared_weight_bytes + model.routed_weight_bytes * model.distinct_experts(100) / 64) / model.bandwidth
    pairs = 100 * 101 / 2 * model.attention_flop / model.flop_rate
    assert engine.steps.ends[0] == pytest.approx(model.prefill_overhead + full + pairs)
    one = (model.shared_weight_bytes + model.routed_weight_bytes * 6 / 64) / model.bandwidth
    decode = model.decode_overhead + one + 101 * model.kv_bytes_per_token / model.bandwidth
    assert engine.steps.ends[1] - engine.steps.ends[0] == pytest.approx(decode)
    assert engine.turns[0].ended == engine.steps.ends[2]


@pytest.mark.parametrize("kv_tokens", [600_000, 20_000])
def test_every_token_is_generated_exactly_once(kv_tokens: int) -> None:
    sizes = replace(ROOMY, kv_tokens=kv_tokens, chunk_tokens=512)
    engine = Engine(sizes, arrivals(Load(small_sessions(40, seed=5), seed=1), 0, 1), [0.0] * 12)
    for until in range(5, 45, 5):
        engine.run(float(until))
        assert engine.check() is None
    check_tokens(engine)
    assert sum(turn.ended >= 0 for turn in engine.turns) > 30
    assert all(turn.cached <= turn.ideal for turn in engine.turns)
    tight = kv_tokens < 100_000
    assert any(0 <= turn.cached < turn.ideal for turn in engine.turns) == tight, "only a small cache loses blocks"


def test_a_host_tier_brings_back_what_the_device_evicted() -> None:
    load = Load(small_sessions(40, seed=5), seed=1)
    reused = []
    for host_gb in (0.0, 20.0):
        sizes = replace(ROOMY, kv_tokens=20_000, chunk_tokens=512, host_gb=host_gb)
        engine = Engine(sizes, arrivals(load, 0, 1), [0.0] * 12)
        for until in (10.0, 20.0, 40.0):
            engine.run(until)
            assert engine.check() is None
        check_tokens(engine)
        assert all(turn.cached <= turn.ideal for turn in engine.turns)
        assert (engine.stats.blocks_loaded > 0) == (host_gb > 0)
        ended = [turn for turn in engine.turns if turn.ended >= 0]
        reused.append(sum(turn.cached for turn in ended) / sum(turn.ideal for turn in ended))
    assert reused[0] < 0.9 and reused[1] > 0.99


def test_a_slow_host_tier_makes_turns_wait_for_their_blocks() -> None:
    load = Load(small_sessions(40, seed=5), seed=1)
    rows = []
    for gbps in (100.0, 0.5):
        sizes = replace(ROOMY, kv_tokens=20_000, chunk_tokens=512, host_gb=20.0, host_gbps=gbps)
        engine = Engine(sizes, arrivals(load, 0, 1), [0.0] * 12)
        engine.run(40.0)
        check_tokens(engine)
        rows.append(sample(engine, Window(0.0, 40.0), floor=70.0, preemptions=0))
    assert sum(rows[0].ttft) / len(rows[0].ttft) < sum(rows[1].ttft) / len(rows[1].ttft)


def test_a_preempted_turn_still_gets_exactly_its_tokens() -> None:
    sizes = replace(ROOMY, kv_tokens=2_560)
    engine = Engine(sizes, one_session(Turn(0, 500, 700, 0.0)), [0.0] * 8)
    engine.run(60.0)
    assert engine.stats.preemptions > 0
    check_tokens(engine)
    assert sum(turn.ended >= 0 for turn in engine.turns) > 8


def test_a_refused_turn_is_sent_again_and_waits_from_its_first_submission() -> None:
    sizes = replace(ROOMY, max_rows=1, max_queued=1)
    engine = Engine(sizes, one_session(Turn(0, 1_000, 300, 1.0)), [0.0, 0.0, 0.0])
    engine.run(60.0)
    check_tokens(engine)
    refused = [turn for turn in engine.turns if turn.refusals]
    assert refused and len(engine.refusals) == sum(turn.refusals for turn in engine.turns)
    figures = sample(engine, Window(0.0, 60.0), floor=70.0, preemptions=0)
    assert figures.refusals == len([time for time in engine.refusals if 0 < time <= 60])
    served = next(turn for turn in refused if turn.ended >= 0)
    wait = TokenTimes(engine).first(served) - served.submitted
    assert wait > 1.0 and any(wait == pytest.approx(other) for other in figures.ttft)


def test_waits_that_go_on_at_the_windows_end_are_counted() -> None:
    sizes = replace(ROOMY, max_rows=1)
    engine = Engine(sizes, one_session(Turn(0, 1_000, 3_000, 1.0)), [0.0, 0.5])
    engine.run(5.0)
    figures = sample(engine, Window(1.0, 5.0), floor=70.0, preemptions=0)
    assert figures.first_turn_wait == [4.5] and figures.unserved_sessions == 1 and figures.turn_seconds == []
    assert figures.output_tokens == sum(1.0 < end <= 5.0 for end in engine.steps.ends)


def test_the_figures_of_one_stream_are_those_of_its_steps() -> None:
    engine = Engine(ROOMY, one_session(Turn(0, 1_000, 501, 60.0)), [0.0])
    engine.run(30.0)
    figures = sample(engine, Window(0.0, 30.0), floor=70.0, preemptions=0)
    ends = engine.steps.ends
    assert len(ends) == 501 and figures.output_tokens == 501 and figures.computed_prompt_tokens == 1_000
    assert figures.stream_rates.tolist() == pytest.approx([500 / (ends[-1] - ends[0])])
    assert figures.ttft == [ends[0]] and figures.turn_seconds == [ends[-1]]
    assert figures.seconds_at_floor == figures.seconds_of_decode == pytest.approx(ends[-1] - ends[0])


def test_a_turn_that_can_never_fit_is_named() -> None:
    engine = Engine(replace(ROOMY, kv_tokens=640), one_session(Turn(0, 600, 100, 0.0)), [0.0])
    with pytest.raises(ConfigError, match=r"600 \+ 100 tokens is longer than the 640"):
        engine.run(1.0)


def test_sessions_are_dealt_to_engines_and_stay_there() -> None:
    load = Load([Session(str(i), 0, (Turn(0, 100 + i, 1, 0.0),)) for i in range(10)], seed=4)

    def prompts(instance: int, instances: int, count: int) -> list[int]:
        dealt = itertools.islice(arrivals(load, instance, instances), count)
        return [len(request.prompt) for one in dealt if (request := one.next_request()) is not None]

    together = prompts(0, 1, 20)
    assert sorted(together[:10]) == sorted(together[10:]) == list(range(100, 110))
    assert prompts(1, 2, 10) == together[0::2] and prompts(0, 2, 10) == together[1::2]


def test_a_seed_gives_the_same_figures_whatever_the_machine_takes() -> None:
    load = Load(small_sessions(40, seed=5), seed=7, warm_up=5.0, window=20.0, ramp=2.0)
    runs = [replay(load, replace(ROOMY, kv_tokens=40_000), sessions=10, instances=2) for _ in range(2)]
    same = [replace(figures, cpu_s=0.0, speed_up=0.0) for figures in runs]
    assert same[0] == same[1] and same[0].turns > 10
    other = replay(replace(load, seed=8), replace(ROOMY, kv_tokens=40_000), sessions=10, instances=2)
    assert other.output_tok_s != same[0].output_tok_s
