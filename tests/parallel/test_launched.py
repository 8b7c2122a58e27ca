"""What a launcher's environment says, and which layouts an engine serves."""

from __future__ import annotations

import pytest

from tokenspeed.config import Parallel
from tokenspeed.errors import ConfigError
from tokenspeed.parallel.launched import Place, over_launched, served_mesh

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_what_a_launcher_says_is_a_place() -> None:
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Place.launched(TORCHRUN | local) == Place(3, 4, 1, 2, "node0", 29500)
    assert Place.launched(TORCHRUN) == Place(3, 4, 3, 4, "node0", 29500)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    place = Place.launched(TORCHRUN | agent)
    assert place is not None and place.standing == "tokenspeed/2"


@pytest.mark.parametrize("without", TORCHRUN)
def test_an_environment_that_says_less_says_nothing(without: str) -> None:
    assert Place.launched({name: value for name, value in TORCHRUN.items() if name != without}) is None
    assert Place.launched(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) is None


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("MASTER_PORT", "")])
def test_what_makes_no_sense_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Place.launched(TORCHRUN | {name: value})


def test_the_launcher_decides_how_many_ranks_there_are() -> None:
    assert over_launched(Parallel(moe_ep=2), TORCHRUN) == Parallel(world=4, moe_ep=2)
    assert over_launched(Parallel(world=4), TORCHRUN).world == 4
    assert over_launched(Parallel(world=2), {}).world == 2
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2.*WORLD_SIZE=4"):
        over_launched(Parallel(world=2), TORCHRUN)


def test_layouts_that_the_engine_cannot_serve_are_refused_by_their_flags() -> None:
    assert served_mesh(Parallel(world=4, moe_ep=4, dense_tp=2), 50.0).world == 4
    assert served_mesh(Parallel(world=4, attn_copies=2)).size("attn") == 2
    assert served_mesh(Parallel(world=4, attn_tp=1, attn_copies=4)).size("attn_data") == 1
    for asked in (Parallel(world=4, attn_tp=2), Parallel(world=4, attn_dp=2, attn_copies=2, vocab_tp=1)):
        assert served_mesh(asked).size("attn_data") == 2
        with pytest.raises(ConfigError, match="--tps-floor 50 with --attn-dp-size 2"):
            served_mesh(asked, 50.0)
    with pytest.raises(ConfigError, match=r"--vocab-tp-size 4 with --attn-dp-size 2.* over the 2 of a group"):
        served_mesh(Parallel(world=4, attn_dp=2, vocab_tp=4))
    with pytest.raises(ConfigError, match="--moe-ep-size 3 does not divide"):
        served_mesh(Parallel(world=4, moe_ep=3))
