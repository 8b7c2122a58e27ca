"""Generated sessions against the statistics of recorded ones."""

from __future__ import annotations

import numpy as np
import pytest

from tokenspeed.simulate.generate import generate
from tokenspeed.simulate.sessions import MAX_PROMPT, Session, apply_rules


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return generate(1_000, seed=0)


def quantiles(values: list[float], *percents: float) -> list[float]:
    return [float(value) for value in np.percentile(values, percents)]


def test_turns_prompts_outputs_and_pauses_are_those_of_recorded_agents(sessions: list[Session]) -> None:
    turns = [turn for session in sessions for turn in session.turns]
    later = [turn for session in sessions for turn in session.turns[1:]]
    assert quantiles([len(session.turns) for session in sessions], 50) == pytest.approx([46], rel=0.1)
    assert quantiles([turn.prompt for turn in turns], 25, 50, 75) == pytest.approx([66_500, 103_000, 137_000], rel=0.12)
    assert quantiles([turn.new for turn in later], 25, 50, 75) == pytest.approx([365, 690, 1_630], rel=0.08)
    assert quantiles([turn.output for turn in turns], 50, 75, 90) == pytest.approx([217, 435, 895], rel=0.08)
    assert quantiles([turn.think for turn in later], 50, 75, 90) == pytest.approx([10, 34, 175], rel=0.12)
    assert quantiles([session.tool_sys for session in sessions], 50) == pytest.approx([15_000], rel=0.03)


def test_a_history_is_nearly_always_kept_and_falls_now_and_then(sessions: list[Session]) -> None:
    pairs = [pair for session in sessions for pair in zip(session.turns, session.turns[1:], strict=False)]
    reusable = sum(after.kept for _, after in pairs) / sum(after.prompt for _, after in pairs)
    assert reusable == pytest.approx(0.97, abs=0.01)
    assert np.mean([after.kept < before.prompt // 64 * 64 for before, after in pairs]) == pytest.approx(0.07, abs=0.01)
    rewritten = np.mean([after.kept < before.prompt / 2 for before, after in pairs])
    assert rewritten == pytest.approx(0.018, abs=0.005)


def test_every_turn_keeps_whole_blocks_of_what_was_there(sessions: list[Session]) -> None:
    for session in sessions:
        assert session.turns[0].kept == 0 and session.turns[0].prompt >= session.tool_sys
        for before, after in zip(session.turns, session.turns[1:], strict=False):
            assert after.kept % 64 == 0 and 0 <= after.kept <= before.prompt and after.new > 0


def test_about_a_third_of_the_turns_is_too_long_for_a_replay(sessions: list[Session]) -> None:
    left = apply_rules(sessions)
    assert all(turn.prompt <= MAX_PROMPT for session in left for turn in session.turns)
    share = sum(len(session.turns) for session in left) / sum(len(session.turns) for session in sessions)
    assert share == pytest.approx(0.71, abs=0.06)


def test_a_seed_gives_the_same_sessions_and_another_seed_others() -> None:
    assert generate(20, seed=1) == generate(20, seed=1) != generate(20, seed=2)
