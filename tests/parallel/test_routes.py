"""Between two layouts only legal transfers are found, and of all ways the cheapest."""

from __future__ import annotations

import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.cost import LINKS, Hardware
from tokenspeed.parallel.layout import Layout, layout_of
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import AnyTokens, Partial, Placement, Replicate, Shard, Varying
from tokenspeed.parallel.routes import Routes
from tokenspeed.parallel.steps import AllGather, AllReduce, AllToAll, GatherFeatures, ReduceScatter, Slice, Transfer, X

MESH = Mesh.of(8, attn_tp=4, moe_ep=4, moe_tp=2)
HARDWARE = Hardware()


def route(start: str, end: str, *, tokens: int = 64, row_bytes: int = 8192, saved: float = 0.0) -> list[object]:
    found = Routes(MESH, HARDWARE).find(Layout(start), Layout(end), X, tokens, row_bytes, saved=saved)
    assert found is not None
    return [planned.step for planned in found.steps]


@pytest.mark.parametrize(
    ("placement", "letters"),
    [
        (Replicate("attn"), "VRR"),
        (Partial("attn"), "VPP"),
        (Shard("attn", -1), "VSS"),
        (Partial("moe"), "PPP"),
        (Partial("moe_tp"), "VVP"),
        (Varying("moe_tp"), "VVV"),
        (Shard("moe_tp", 0), "VVV"),
        (Replicate("vocab"), "VRR"),
    ],
)
def test_a_placement_says_where_a_tensor_lies_atom_by_atom(placement: Placement, letters: str) -> None:
    assert layout_of(placement, MESH, "m") == Layout(letters)


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (Replicate("stage"), "no axis 'stage'"),
        (Replicate("moe_ep"), "m (Replicate(moe_ep)): tokens are divided over the outermost axes"),
        (Shard("attn", 3), "cut in dimension 0 or -1"),
        (AnyTokens(), "names no axis"),
    ],
)
def test_a_placement_that_lies_nowhere_is_refused(placement: Placement, said: str) -> None:
    with pytest.raises(ConfigError) as failure:
        layout_of(placement, MESH, "m")
    assert said in str(failure.value)


def test_few_tokens_are_reduced_by_everybody_and_many_by_parts() -> None:
    assert route("PPP", "RRR", tokens=1) == [AllReduce(X, 0, 3)]
    assert route("PPP", "VRR") == [AllReduce(X, 0, 3), Slice(X, 0, 1)]
    assert route("PPP", "VVV") == [ReduceScatter(X, 0, 3)]
    assert route("VPP", "VVV", tokens=4096) == [ReduceScatter(X, 1, 3)]


def test_tokens_that_are_there_already_are_sliced_and_those_that_are_not_gathered() -> None:
    assert route("VRR", "VVR") == [Slice(X, 1, 2)]
    assert route("VVV", "RRR") == [AllGather(X, 0, 3)]
    assert route("VVV", "VRR") == [AllGather(X, 1, 3)]
    assert route("VVR", "VVR") == []


def test_logits_are_exchanged_for_rows_where_many_groups_want_their_own() -> None:
    assert route("VSS", "VRR") == [GatherFeatures(X, 1, 3)]
    assert route("SSS", "VVV", tokens=512, row_bytes=600_000) == [AllToAll(X, 0, 3)]


@pytest.mark.parametrize("seconds_saved", [0.0, 1e-3])
def test_what_an_all_reduce_saves_behind_it_counts(seconds_saved: float) -> None:
    steps = route("PPP", "VRR", saved=seconds_saved)
    assert isinstance(steps[-1], AllReduce) == bool(seconds_saved)


def test_nothing_makes_terms_of_a_sum_or_slices_of_features() -> None:
    routes = Routes(MESH, HARDWARE)
    for end in ("PPP", "SSS"):
        assert routes.find(Layout("RRR"), Layout(end), X, 1, 8192) is None


@pytest.mark.parametrize(
    ("kind", "letters", "first", "stop", "legal"),
    [
        (AllGather, "VVR", 0, 2, True),
        (AllGather, "VVR", 0, 1, False),  # tokens inside would no longer be neighbours
        (Slice, "VRR", 2, 3, False),
        (ReduceScatter, "VPP", 1, 3, True),
        (ReduceScatter, "VPP", 2, 3, False),
        (AllReduce, "VPP", 2, 3, True),
        (AllReduce, "VPP", 0, 3, False),
        (GatherFeatures, "VSS", 2, 3, True),
        (GatherFeatures, "VSS", 1, 2, False),
        (AllToAll, "SSS", 0, 1, False),
    ],
)
def test_only_neighbours_are_put_together(
    kind: type[Transfer], letters: str, first: int, stop: int, legal: bool
) -> None:
    assert kind.legal(Layout(letters), first, stop) is legal


def test_predictions_are_near_what_was_measured_on_two_gpus() -> None:
    mesh = Mesh.of(2)
    sizes = *(4096 << doubled for doubled in range(5)), 8 << 20  # bytes of a message
    micros = {
        "sums by NCCL": ("nccl", 0.1, (7.1, 8.0, 8.1, 8.3, 8.4, 57.0)),
        # Of these the norm that is in the same kernel takes 0.1 µs at most, of 64 KiB.
        "one kernel, Triton's": ("symmetric", 0.1, (2.51, 2.57, 2.63, 2.74, 2.86, 33.0)),
        "one kernel, Hopper's": ("symmetric", 0.15, (2.21, 2.28, 2.47, 2.68, 2.86)),
    }
    for what, (links, tolerance, points) in micros.items():
        hardware = Hardware(near=LINKS[links])
        for num_bytes, measured in zip(sizes, points, strict=False):
            predicted = hardware.seconds(AllReduce(X, 0, 1), Layout("P"), mesh, 1, num_bytes)
            assert predicted == pytest.approx(measured * 1e-6, rel=tolerance), (what, num_bytes)


def test_between_machines_a_rank_sends_its_share_of_what_its_machine_has() -> None:
    mesh = Mesh.of(16)
    reduce, tokens, row_bytes = AllReduce(X, 0, 1), 1024, 8192
    one, two = (Hardware(ranks_per_machine=ranks) for ranks in (16, 8))
    volume = tokens * row_bytes
    assert one.sent(reduce, Layout("P"), mesh, tokens, row_bytes) == 2 * volume * 15 // 16
    assert two.sent(reduce, Layout("P"), mesh, tokens, row_bytes) == 2 * volume * 7 // 8 + volume // 8
    assert two.seconds(reduce, Layout("P"), mesh, tokens, row_bytes) > one.seconds(
        reduce, Layout("P"), mesh, tokens, row_bytes
    )
