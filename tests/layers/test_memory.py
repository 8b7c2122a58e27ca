"""Parameters of a CPU lie one behind the other, in the system's large pages where it has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.toy import toy_llama
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.layers.memory import HUGE_PAGE, LINE, PIECE, ParameterMemory
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.registry import build_model

CPU = torch.device("cpu")
ASKED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_parameters_start_at_cache_lines_and_do_not_overlap() -> None:
    memory = ParameterMemory(CPU)
    shapes = [(3, 5), (1,), (700, 33), (), (0, 4), (64,)]
    taken = [memory.take(shape, torch.bfloat16, zeros=False) for shape in shapes]
    for number, values in enumerate(taken):
        values.fill_(number)
    for number, (shape, values) in enumerate(zip(shapes, taken, strict=True)):
        assert values.shape == shape and values.dtype is torch.bfloat16 and values.is_contiguous()
        assert (values == number).all()
        assert values.numel() == 0 or values.data_ptr() % LINE == 0


def test_zeros_are_zeros_also_in_a_piece_of_their_own() -> None:
    memory = ParameterMemory(CPU)
    memory.take((100,), torch.float32, zeros=False).fill_(7)
    whole = memory.take((PIECE + 8,), torch.uint8, zeros=True)
    assert whole.data_ptr() % HUGE_PAGE == 0 and not whole.any()


def test_a_parameter_keeps_its_memory_when_what_made_it_is_gone() -> None:
    values = ParameterMemory(CPU).take((1000,), torch.float32, zeros=False)
    values.fill_(3)
    other = ParameterMemory(CPU).take((1000,), torch.float32, zeros=True)
    assert (values == 3).all() and not other.any()


def test_no_memory_is_an_error_that_a_caller_can_name() -> None:
    with pytest.raises((RuntimeError, OSError)):
        ParameterMemory(CPU).take((1 << 60,), torch.float32, zeros=False)


@pytest.mark.skipif(not ASKED.exists() or "[never]" in ASKED.read_text(), reason="the system gives no huge pages")
def test_the_system_is_asked_for_huge_pages() -> None:
    values = ParameterMemory(CPU).take((16, HUGE_PAGE), torch.uint8, zeros=False)
    values.fill_(1)
    ranges = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for each in filter(None, ranges):
        first, last = (int(end, 16) for end in each.split(" ", 1)[0].split("-"))
        if first <= values.data_ptr() < last:
            assert " hg" in each[each.index("VmFlags") :]
            return
    raise AssertionError("the parameter lies nowhere")


def test_a_model_built_without_memory_takes_none(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    ctx = BuildContext.of(device=CPU, dtype=torch.float32, max_positions=64, block_size=16)
    model = build_model(read_model_config(resolve(str(tmp_path))), ctx.on(torch.device("meta")))
    assert all(parameter.is_meta for parameter in model.parameters())
