"""What a start on a GPU decides before it touches one, and how a device is chosen."""

from __future__ import annotations

import pytest
import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.errors import ConfigError
from tokenspeed.executor.load import chosen_device
from tokenspeed.executor.load_gpu import MARGIN, Needs
from tokenspeed.executor.slot_tables import SlotTables
from tokenspeed.executor.staging import RECORD, DevicePlan, Staging

LIMITS = BatchLimits(max_rows=8, max_tokens=64, max_blocks=20, block_size=16)
CPU = torch.device("cpu")


def test_the_numbers_say_what_fits_and_which_flag_to_change() -> None:
    tables = SlotTables.num_bytes(LIMITS, 1000)
    needs = Needs(per_block=1 << 20, kv_cache_bytes=None, limits=LIMITS, vocab_size=1000)
    needs.check(MARGIN + tables + (1 << 20))
    with pytest.raises(ConfigError, match=r"at least 1\.0 MiB .*--max-num-seqs") as caught:
        needs.check(MARGIN + tables + (1 << 20) - 1)
    assert "\n" not in str(caught.value)
    asked = Needs(per_block=1 << 20, kv_cache_bytes=5 << 20, limits=LIMITS, vocab_size=1000)
    with pytest.raises(ConfigError, match=r"at least 5\.0 MiB .*--kv-cache-memory"):
        asked.check(MARGIN + tables + (2 << 20))


def test_the_tables_take_the_bytes_that_were_counted() -> None:
    tables = SlotTables(LIMITS, 1000, CPU)
    taken = sum(table.nbytes for table in (*tables.state, tables.block_table, tables.arrived_masks))
    counted = SlotTables.num_bytes(LIMITS, 1000)
    assert taken <= counted < taken + 16 * (LIMITS.max_rows + 1)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [8, 9])
def test_every_array_of_a_step_arrives_where_the_device_looks_for_it(max_rows: int, max_tokens: int) -> None:
    """Odd sizes too: the records hold numbers of eight bytes."""
    limits = BatchLimits(max_rows=max_rows, max_tokens=max_tokens, max_blocks=3, block_size=16)
    staging = Staging(limits, 1000, CPU)
    plan = DevicePlan(staging, CPU)
    names = ("row_slot", "row_new", "row_computed", "token_ids", "table_delta", "sample_slot", "sample_token")
    for at, name in enumerate(names):
        getattr(staging, name)[:] = at + 1
    for row in range(max_rows):
        staging.records[row] = tuple(range(row, row + len(RECORD)))
        staging.records[row]["seed"] = -(2**62) + row
    plan.receive(staging)
    for at, name in enumerate(names):
        assert getattr(plan, name).unique().tolist() == [at + 1]
        assert getattr(plan, name).shape == getattr(staging, name).shape
    for name, column in plan.records.items():
        assert column.tolist() == staging.records[name].tolist()
    assert plan.records["seed"].tolist() == [-(2**62) + row for row in range(max_rows)]


def test_the_device_is_the_one_that_is_asked_for_or_the_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("") == chosen_device("cpu") == CPU
    with pytest.raises(ConfigError, match="TOKENSPEED_DEVICE=cuda, but torch finds no GPU"):
        chosen_device("cuda")
    with pytest.raises(ConfigError, match="TOKENSPEED_DEVICE must be cpu or cuda, got 'tpu'"):
        chosen_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("") == chosen_device("cuda") == torch.device("cuda", 0)
    assert chosen_device("cpu") == CPU
