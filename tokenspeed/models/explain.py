"""How a model would lie over ranks, from its configuration alone: no weights, no GPU, no other process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import make_model
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.cost import BOTH, KINDS, Hardware
from tokenspeed.parallel.explain import described, explain, predictions, size
from tokenspeed.parallel.launched import served_mesh
from tokenspeed.parallel.mesh import ARGUMENTS, FLAGS, Mesh
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.verify import verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CONTEXT, PROMPT_TOKENS = 8192, 8192
"""What is predicted for when nobody says otherwise: tokens that each row has, tokens of a step of prompts."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a layout: decode steps of `batches` rows in all with `context` tokens each, and a step of
    `prompt_tokens` tokens in all, a prompt for each group that attends together; weights and activations of `dtype`."""

    batches: Sequence[int]
    context: int
    prompt_tokens: int
    dtype: str
    hardware: Hardware


def explained(config: ModelConfig, mesh: Mesh, question: Question) -> Iterator[str]:
    """What a rank holds, the program of a decode step and of a prompt, each verified, and predicted step times.

    Raises `ConfigError` for a mesh that does not suit the model.
    """
    model = _placed(config, mesh, DTYPES[question.dtype])

    def program(tokens: int, rows: int, *, captured: bool) -> Program:
        made = compile_model(
            model, mesh, config.architecture, tokens=tokens, rows=rows, hardware=question.hardware, captured=captured
        )
        verify(made)
        return made

    yield f"{config.architecture} over {mesh}"
    yield f"a rank holds {_held(model, DTYPES[question.dtype])}"
    groups = mesh.size("attn_data")
    if groups > 1:
        yield f"{groups} groups of ranks, {mesh.world // groups} each, have requests and a KV pool of their own"
    yield described(question.hardware, mesh)
    yield ""
    decodes = [program(batch, batch, captured=True) for batch in question.batches]
    yield from explain(decodes[-1])
    yield ""
    yield from explain(program(question.prompt_tokens, groups, captured=False))
    yield ""
    yield from predictions(decodes, question.context)


def explained_engine(config: EngineConfig) -> Iterator[str]:
    """The same for an engine as it would be started: over its ranks, with at most so many rows and tokens in a step of
    each group. Raises `ConfigError` for what would not be."""
    mesh = served_mesh(config.parallel, config.tps_floor)
    groups = mesh.size("attn_data")
    batches = sorted({1, groups * config.max_num_seqs})
    tokens = groups * config.max_num_batched_tokens if config.max_num_batched_tokens else PROMPT_TOKENS
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    question = Question(batches, CONTEXT, tokens, dtype, KINDS[BOTH])
    return explained(read_model_config(resolve(config.model, config.load_format)), mesh, question)


def compared(config: ModelConfig, world: int, question: Question) -> Iterator[str]:
    """Layouts of `world` ranks as a table, the fastest at the last of the batch sizes first."""
    found: list[tuple[float, str]] = []
    refused: list[str] = []
    for sizes in _usual(world):
        flags = " ".join(f"{FLAGS[axis]} {ranks}" for axis, ranks in sizes.items())
        try:
            mesh = Mesh.of(world, **{ARGUMENTS[axis]: ranks for axis, ranks in sizes.items()})
            model = _placed(config, mesh, DTYPES[question.dtype])
        except ConfigError as error:
            refused.append(f"  {flags}: {error}")
            continue
        times = []
        for batch in question.batches:
            program = compile_model(
                model, mesh, config.architecture, tokens=batch, hardware=question.hardware, captured=True
            )
            times.append(program.timing(question.context).total)
        cells = "".join(f"{seconds * 1e3:>10.2f}" for seconds in times)
        found.append((times[-1], f"  {flags:<60}{cells}{size(_weight_bytes(model)):>12}"))
    yield f"{config.architecture} over {world} ranks, decode with {question.context:,} tokens of context, predicted"
    yield f"  {'step in ms at a batch of':<60}{''.join(f'{batch:>10}' for batch in question.batches)}     weights"
    yield from (line for _, line in sorted(found))
    if refused:
        yield "not possible:"
        yield from refused


def _usual(world: int) -> Iterator[dict[str, int]]:
    """What sizes which axis: attention cut, over own tokens or in copies where it is not cut over all; experts cut or
    dealt; dense layers as attention or over all, which they are beside copies anyway."""
    divisors = [ranks for ranks in range(1, world + 1) if world % ranks == 0]
    for attn, moe_ep in itertools.product(divisors, sorted({1, world})):
        cut = {"attn": attn, "moe_ep": moe_ep}
        yield cut
        if attn != world:
            yield cut | {"dense": world}
            yield cut | {"attn_copies": world // attn}


def _placed(config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> CausalLM:
    # Rotary tables are computed, so they are kept short; no prediction depends on them.
    ctx = BuildContext.of(device=torch.device("meta"), dtype=dtype, max_positions=16, block_size=64, mesh=mesh)
    return make_model(config, ctx)


def _weight_bytes(model: CausalLM) -> int:
    """Of one rank."""
    return sum(weight.parameter.numel() * weight.parameter.element_size() for weight in model.weights())


def _held(model: CausalLM, dtype: torch.dtype) -> str:
    kv = sum(spec.elements() for spec in model.kv_spec) * dtype.itemsize
    return f"{size(_weight_bytes(model))} of weights, {size(kv)} of KV cache for each token of its rows"
