"""The compiler finds the known forms of parallel models, and refuses what cannot be with both modules' names."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.parallel.parts import Part, attention, decoder, mlp, model, moe, norm, part
from tokenspeed.errors import ConfigError
from tokenspeed.parallel import compiler
from tokenspeed.parallel.compiler import _Goal, compile_model
from tokenspeed.parallel.layout import Layout
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import AnyTokens, Partial, Replicate, Routed, Shard, Varying
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.steps import (
    Add,
    AllGather,
    AllReduceNorm,
    Combine,
    Copy,
    Dispatch,
    GatherFeatures,
    Norm,
    ReduceScatter,
    Run,
    Select,
    Slice,
    Step,
)

TP = Mesh.of(8)
DATA_PARALLEL = Mesh.of(8, attn_dp=8, moe_ep=8, dense_tp=8)


def steps(root: Part, mesh: Mesh, tokens: int = 8) -> list[Step]:
    return [planned.step for planned in compile_model(root, mesh, "toy", tokens=tokens).steps]


def between(program: list[Step], first: str, second: str) -> list[Step]:
    """What happens after the module `first` up to the module `second`."""
    paths = [getattr(step, "module", None) for step in program]
    return program[paths.index(f"toy.{first}") + 1 : paths.index(f"toy.{second}") + 1]


def refused(root: Part, mesh: Mesh | None = None) -> str:
    with pytest.raises(ConfigError) as failure:
        compile_model(root, mesh or Mesh.single(), "toy")
    message = str(failure.value)
    assert "\n" not in message
    return message


def test_behind_attention_in_copies_nothing_is_sent() -> None:
    program = steps(decoder(mlp(), moe(fan_out=64)), Mesh.of(8, attn_copies=8, moe_ep=8))
    for layer in range(2):
        assert between(program, f"layers.{layer}.norm1", f"layers.{layer}.mlp") == [
            Run(f"toy.layers.{layer}.attention", "x"),
            Norm(f"toy.layers.{layer}.norm2"),
            Run(f"toy.layers.{layer}.mlp", "x"),
        ]
    assert between(program, "layers.0.mlp", "layers.1.norm1") == [AllReduceNorm("toy.layers.1.norm1", 0, 1)]
    # Heads that are cut inside of a copy are summed inside of it.
    pairs = steps(decoder(mlp()), Mesh.of(8, attn_copies=2))
    assert between(pairs, "layers.0.attention", "layers.0.norm2") == [AllReduceNorm("toy.layers.0.norm2", 1, 2)]


def test_on_one_rank_nothing_is_moved() -> None:
    assert steps(decoder(mlp()), Mesh.single()) == [
        Run("toy.embed", "x"),
        Norm("toy.layers.0.norm1"),
        Run("toy.layers.0.attention", "x"),
        Norm("toy.layers.0.norm2"),
        Run("toy.layers.0.mlp", "x"),
        Norm("toy.norm"),
        Select(),
        Run("toy.head", "x"),
    ]


def test_tensor_parallel_decode_reduces_and_norms_in_one() -> None:
    program = steps(decoder(mlp(), mlp()), TP)
    assert between(program, "layers.0.attention", "layers.0.mlp") == [
        AllReduceNorm("toy.layers.0.norm2", 0, 1),
        Run("toy.layers.0.mlp", "x"),
    ]
    assert between(program, "layers.0.mlp", "layers.1.norm1") == [AllReduceNorm("toy.layers.1.norm1", 0, 1)]
    assert program[-1] == GatherFeatures("x", 0, 1)


def test_a_long_prompt_is_normed_in_parts() -> None:
    program = steps(decoder(mlp(), mlp()), TP, tokens=32_768)
    assert between(program, "layers.0.attention", "layers.0.mlp") == [
        ReduceScatter("x", 0, 1),
        Norm("toy.layers.0.norm2"),
        AllGather("x", 0, 1),
        Run("toy.layers.0.mlp", "x"),
    ]
    # Also across the border of the layers; the stream stays in parts throughout.
    assert between(program, "layers.0.mlp", "layers.1.norm1") == [ReduceScatter("x", 0, 1), Norm("toy.layers.1.norm1")]
    assert not any(getattr(step, "tensor", "") == "residual" for step in program)


def test_attention_over_own_tokens_gathers_for_experts_and_scatters_back() -> None:
    program = steps(decoder(moe(fan_out=8), moe(fan_out=8)), Mesh.of(8, attn_dp=8, moe_tp=8))
    assert between(program, "layers.0.attention", "layers.1.attention") == [
        Norm("toy.layers.0.norm2"),
        AllGather("x", 0, 1),
        Run("toy.layers.0.mlp", "x"),
        ReduceScatter("x", 0, 1),
        Norm("toy.layers.1.norm1"),
        Run("toy.layers.1.attention", "x"),
    ]


def test_tokens_are_sent_to_experts_where_few_of_them_are_asked() -> None:
    sent = steps(decoder(moe(fan_out=1)), DATA_PARALLEL, tokens=4096)
    assert between(sent, "layers.0.norm2", "norm") == [
        Run("toy.layers.0.mlp.gate", "x"),
        Dispatch("x", 0, 1),
        Run("toy.layers.0.mlp.experts", "x"),
        Combine("x", 0, 1),
        Norm("toy.norm"),
    ]
    # Where every token asks nearly all ranks anyway, and sends the choice along, gathering is cheaper.
    gathered = steps(decoder(moe(fan_out=64)), DATA_PARALLEL, tokens=4096)
    assert between(gathered, "layers.0.norm2", "norm") == [
        AllGather("x", 0, 1),
        Run("toy.layers.0.mlp", "x"),
        ReduceScatter("x", 0, 1),
        Norm("toy.norm"),
    ]


def test_what_is_beside_is_moved_along_where_it_lies_alike() -> None:
    program = steps(decoder(moe(fan_out=64, shared=True)), DATA_PARALLEL)
    shared = "toy.layers.0.mlp.shared"
    assert between(program, "layers.0.norm2", "norm") == [
        AllGather("x", 0, 1),
        Copy(shared),
        Run("toy.layers.0.mlp", "x"),
        Run(shared, shared),
        Add(shared),
        ReduceScatter("x", 0, 1),
        Norm("toy.norm"),
    ]


def test_what_is_beside_stays_with_its_tokens_where_it_lies_otherwise() -> None:
    mesh = Mesh.of(8, attn_dp=8, moe_ep=8, dense_tp=1)
    program = steps(decoder(moe(fan_out=64, shared=True)), mesh)
    shared = "toy.layers.0.mlp.shared"
    assert between(program, "layers.0.norm2", "norm") == [
        Copy(shared),
        AllGather("x", 0, 1),
        Run("toy.layers.0.mlp", "x"),
        Run(shared, shared),
        ReduceScatter("x", 0, 1),
        Add(shared),
        Norm("toy.norm"),
    ]


def test_where_the_stream_lies_is_chosen_for_all_layers_together() -> None:
    mesh = Mesh.of(8, attn_tp=4, dense_tp=8)
    # Everybody has the sum, so each group takes its own tokens for nothing.
    whole = [AllReduceNorm("toy.layers.9.norm1", 0, 2), Slice("x", 0, 1), Run("toy.layers.9.attention", "x")]
    many = steps(decoder(*[mlp()] * 24), mesh)
    assert between(many, "layers.8.mlp", "layers.9.attention") == whole
    # For two layers it does not pay to bring the stream there in the first place.
    few = steps(decoder(mlp(), mlp()), mesh)
    assert Slice("x", 0, 1) in between(few, "layers.0.mlp", "layers.1.norm1")


@pytest.mark.parametrize("tokens", [1, 16_384])
def test_no_choice_of_layouts_is_cheaper(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh.of(4, attn_tp=2, moe_ep=2, dense_tp=4)
    root = decoder(moe(fan_out=8, shared=True), mlp())
    chosen = compile_model(root, mesh, "toy", tokens=tokens)
    atoms = len(mesh.atoms())
    every = [Layout.divided(depth, atoms) for depth in range(atoms + 1)]
    cheapest = math.inf
    for choice in itertools.product(every, repeat=5):
        # One layout a norm is all that this program may choose from.
        left = iter(choice)
        monkeypatch.setattr(compiler._Compiler, "_goals", lambda self, norm, left=left: [_Goal(next(left), "", norm)])
        made = compile_model(root, mesh, "toy", tokens=tokens)
        cheapest = min(cheapest, sum(planned.seconds for planned in made.steps))
    assert sum(planned.seconds for planned in chosen.steps) == pytest.approx(cheapest)


def test_the_same_declarations_give_the_same_program() -> None:
    mesh = Mesh.of(8, attn_tp=2, moe_ep=4, moe_tp=2, dense_tp=4)
    first, second = (
        compile_model(decoder(moe(shared=True), mlp()), mesh, "toy", tokens=64).steps for _ in range(2)
    )
    assert first == second


def test_a_prediction_adds_up_and_grows_with_the_step() -> None:
    def program(tokens: int) -> Program:
        return compile_model(decoder(mlp(), mlp()), TP, "toy", tokens=tokens)

    small, large = program(8).timing(1024), program(4096).timing(1024)
    assert small.total == small.modules + small.norms + small.transfers
    assert large.modules > small.modules and large.transfers > small.transfers
    # 6 blocks that each start and read 1 MB.
    assert small.modules == pytest.approx(6 * (12e-6 + 1e6 / program(8).hardware.memory_bandwidth))


def test_a_norm_on_a_partial_is_refused() -> None:
    message = refused(model(("attention", attention()), ("norm", part(Partial("attn"), Partial("attn")))))
    assert "toy.norm" in message and "toy.attention" in message and "not linear" in message


def test_a_sum_into_a_norm_inside_a_block_is_refused_with_what_would_do() -> None:
    inner = part(Replicate("attn"), Replicate("attn"))
    down = part(Replicate("attn"), Partial("attn"), linear=True)
    block = part(Replicate("attn"), Replicate("attn"), down=down, norm=inner)
    message = refused(model(("block", block)))
    assert "toy.block.down gives Partial(attn), but toy.block.norm takes Replicate(attn)" in message
    assert "end the block toy.block behind toy.block.down" in message


def test_a_linear_module_may_pass_a_partial_on() -> None:
    passing = part(Partial("attn"), Partial("attn"), linear=True)
    program = steps(model(("attention", attention()), ("scale", passing), ("norm", norm())), TP)
    assert between(program, "attention", "norm") == [Run("toy.scale", "x"), AllReduceNorm("toy.norm", 0, 1)]


def test_terms_of_a_sum_are_never_invented() -> None:
    takes = part(Partial("attn"), Partial("attn"), linear=True)
    message = refused(model(("norm", norm()), ("scale", takes)))
    assert "toy.norm" in message and "toy.scale" in message
    other = part(Partial("dense"), Partial("dense"), linear=True)
    message = refused(model(("attention", attention()), ("scale", other)))
    assert "toy.attention gives Partial(attn), but toy.scale takes Partial(dense)" in message


def test_a_module_without_a_boundary_is_refused() -> None:
    message = refused(model(("norm", norm()), ("mystery", Part(None))))
    assert "toy.mystery" in message and "toy.norm" in message


def test_parts_must_add_up_to_what_the_whole_declares() -> None:
    wrong_end = part(Replicate("attn"), Replicate("attn"), out=part(Replicate("attn"), Partial("attn")))
    assert "toy.block gives Replicate(attn), but its last part toy.block.out gives Partial(attn)" in refused(
        model(("block", wrong_end))
    )
    wrong_start = part(Replicate("attn"), Partial("attn"), out=part(Shard("attn", 0), Partial("attn")))
    assert "toy.block takes Replicate(attn), but its first part toy.block.out takes Shard(attn, 0)" in refused(
        model(("block", wrong_start))
    )
    shifting = part(AnyTokens(), Replicate("attn"))
    assert "toy.norm takes AnyTokens but gives Replicate(attn)" in refused(model(("norm", shifting)))
    wider = moe(shared=True)
    wider.others[0][1].row_bytes = 4
    assert "toy.moe and toy.moe.shared are added" in refused(model(("moe", wider)))


def test_a_model_must_begin_with_a_block_and_end_in_whole_tokens() -> None:
    empty = Part(model().boundary, False, (("norm", norm()),))
    assert "toy begins with toy.norm" in refused(empty)
    sharded = part(Replicate("attn"), Shard("attn", -1), embed=part(Replicate("attn"), Shard("attn", -1)))
    assert "a model takes and gives whole tokens" in refused(sharded)


def test_an_axis_that_the_mesh_lacks_is_named_with_both_modules() -> None:
    message = refused(model(("norm", norm()), ("router", part(Varying("stage"), Replicate("stage")))))
    assert "toy.norm → toy.router" in message and "'stage'" in message
    lost = Routed("stage", 2)
    block = part(
        Replicate("moe"), Partial("moe"), gate=part(Replicate("moe"), lost), experts=part(lost, Partial("moe"))
    )
    message = refused(model(("moe", block)))
    assert "toy.moe.gate → toy.moe.experts" in message and "'stage'" in message


def test_axes_that_do_not_factor_the_world_are_named_with_both_modules() -> None:
    mesh = Mesh(4, (("attention", (("attn_data", 1), ("attn", 4))), ("vocabulary", (("vocab", 3),))))
    message = refused(model(("norm", norm())), mesh)
    assert "toy → toy.embed" in message and "vocab 3 do not factor a world of 4" in message


def test_a_layout_that_nothing_leads_to_is_refused_with_both_modules() -> None:
    block = part(Shard("attn", -1), Partial("attn"))
    message = refused(model(("norm", norm()), ("block", block)), TP)
    assert "toy.norm" in message and "toy.block takes S" in message
