"""Collectives are checked and timed between processes, and what was found makes predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel import jobs
from tests.parallel.pool import started
from tokenspeed.errors import ConfigError
from tokenspeed.parallel import measure
from tokenspeed.parallel.cost import LINKS, STREAM_BANDWIDTH, hardware
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import AllGather

KIB = 1024


def test_every_collective_is_measured_at_every_size_that_it_can_have() -> None:
    sizes = (4 * KIB, 8 * KIB, 16 * KIB)
    with started(2) as pool:
        found = pool.over(Mesh.of(2), jobs.timed, sizes, 256 * KIB)[0]
    by_name: dict[str, list[int]] = {}
    for each in found:
        by_name.setdefault(each.what, []).append(each.size // KIB)
    assert found[-1].what == measure.STREAM and found[-1].size == 256 * KIB and by_name.pop(measure.STREAM) == [256]
    # In float32 a row takes 8 KiB; two ranks cut no single row.
    whole = ("all-gather", "all-gather of features", "all-reduce", measure.FUSED, measure.ALONE)
    cut = ("reduce-scatter", "all-to-all")
    assert by_name == {what: [8, 16] for what in whole} | {what: [16] for what in cut} | {"share": [4]}
    assert all(each.seconds > 0 for each in found)


def test_constants_for_predictions_are_the_line_through_the_smallest_and_the_largest(tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    points = {
        AllGather.verb: ((4_000, 10e-6), (1_000_000, 20e-6), (10_004_000, 110e-6)),
        measure.FUSED: ((4_000, 6e-6), (8_004_000, 46e-6), (50_000_000, 1.0)),
        measure.ALONE: ((4_000, 15e-6),),
    }
    found = [measure.Timing(what, int(sent), sent, seconds) for what in points for sent, seconds in points[what]]
    measure.write_links(file, measure.fitted(found))
    machine = hardware(str(file), 4)
    assert machine.near.bandwidth == pytest.approx(1e11) and machine.near.seconds == pytest.approx(9.96e-6)
    # Messages that are too large for it are no part of what shared memory does.
    assert machine.shared is not None and machine.shared.bandwidth == pytest.approx(2e11)
    assert machine.ranks_per_machine == 4 and machine.stream_bandwidth == STREAM_BANDWIDTH
    found.append(measure.Timing(measure.STREAM, 4_000_000_000, 0.0, 1e-3))
    measure.write_links(file, measure.fitted(found))
    assert hardware(str(file), 4).stream_bandwidth == pytest.approx(4e12)
    assert hardware(str(file), 4, 2e12).stream_bandwidth == 2e12


def test_shared_memory_that_is_no_faster_does_not_count() -> None:
    names = (AllGather.verb, measure.FUSED, measure.ALONE)
    found = [measure.Timing(what, size, float(size), 1e-5 + size / 1e11) for what in names for size in (4_000, 8_000)]
    assert measure.fitted(found).shared is None


def test_names_stand_for_what_carries_collectives() -> None:
    assert hardware("nccl", 8).shared is None and hardware("both", 8).shared == LINKS["symmetric"]
    assert hardware("symmetric", 2).near == LINKS["symmetric"] and hardware("symmetric", 2).ranks_per_machine == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{}", "near"),
        ("{", "truncated"),
        ('{"near": {"seconds": 1e-6, "bandwidth": 0}, "shared": null}', "near.bandwidth"),
        ('{"near": {"seconds": -1, "bandwidth": 1e9}, "shared": null}', "near.seconds"),
        ('{"near": {"seconds": 0, "bandwidth": 1e9}, "shared": null, "stream_bandwidth": -1}', "stream_bandwidth"),
    ],
)
def test_links_that_cannot_be_read_are_named(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "links.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        hardware(str(file), 8)


def test_a_table_has_a_column_a_size() -> None:
    header, *rows = measure.table(
        [measure.Timing("share", 4 * KIB, 8.0, 12.3e-6), measure.Timing(measure.STREAM, 4 << 30, 0.0, 1e-3)]
    )
    assert header.split()[-len(measure.SIZES) :] == [str(size // KIB) for size in measure.SIZES]
    assert rows == [f"{'share':<26}{12.3:>9}" + " " * 9 * (len(measure.SIZES) - 1)]
