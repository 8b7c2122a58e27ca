"""The walk over a model's boundaries finds its edges, and refuses what cannot be with both modules' names."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.placement import Boundary, Mesh, Partial, Placement, Replicate, Shard, Varying


@dataclass
class Part:
    """A module without computation."""

    boundary: Boundary | None
    linear: bool = False
    parts: tuple[tuple[str, Part], ...] = field(default=())

    def stages(self) -> tuple[tuple[str, Part], ...]:
        return self.parts


def part(takes: Placement, gives: Placement, *, linear: bool = False, **parts: Part) -> Part:
    return Part(Boundary(takes, gives), linear, tuple(parts.items()))


def norm(axis: str) -> Part:
    return part(Replicate(axis), Replicate(axis))


def attention() -> Part:
    return part(
        Replicate("attn"),
        Partial("attn"),
        qkv=part(Replicate("attn"), Shard("attn", -1), linear=True),
        core=part(Shard("attn", -1), Shard("attn", -1)),
        out=part(Shard("attn", -1), Partial("attn"), linear=True),
    )


def model(*middle: tuple[str, Part]) -> Part:
    parts = (
        ("embed", part(Replicate("vocab"), Partial("vocab"))),
        *middle,
        ("head", part(Replicate("vocab"), Shard("vocab", -1), linear=True)),
    )
    return Part(Boundary(Replicate("vocab"), Shard("vocab", -1)), False, parts)


def refused(root: Part, mesh: Mesh | None = None) -> str:
    with pytest.raises(ConfigError) as failure:
        compile_model(root, mesh or Mesh.single(), "toy")
    message = str(failure.value)
    assert "\n" not in message
    return message


def test_the_edges_are_those_of_the_data_flow() -> None:
    program = compile_model(model(("norm", norm("attn")), ("attention", attention())), Mesh.single(), "toy")
    assert [(edge.source, edge.target) for edge in program.edges] == [
        ("toy.embed", "toy.norm"),
        ("toy.norm", "toy.attention"),
        ("toy.attention.qkv", "toy.attention.core"),
        ("toy.attention.core", "toy.attention.out"),
        ("toy.attention", "toy.head"),
    ]
    assert program.edges[-1].gives == Partial("attn") and program.edges[-1].takes == Replicate("vocab")


def test_on_one_rank_a_sum_into_a_norm_is_the_identity_and_printed_as_such() -> None:
    lines = compile_model(model(("norm", norm("attn"))), Mesh.single(), "toy").explain().splitlines()
    assert lines[0] == "toy.embed → toy.norm: Partial(vocab) → Replicate(attn)  [identity]"
    assert len(lines) == 2


def test_a_norm_on_a_partial_is_refused() -> None:
    message = refused(model(("attention", attention()), ("norm", part(Partial("attn"), Partial("attn")))))
    assert "toy.norm" in message and "toy.attention" in message and "not linear" in message


def test_a_linear_module_may_pass_a_partial_on() -> None:
    passing = part(Partial("attn"), Partial("attn"), linear=True)
    assert len(compile_model(model(("attention", attention()), ("scale", passing)), Mesh.single(), "toy").edges) == 5


def test_terms_of_a_sum_are_never_invented() -> None:
    takes = part(Partial("attn"), Partial("attn"), linear=True)
    message = refused(model(("norm", norm("attn")), ("scale", takes)))
    assert "toy.norm" in message and "toy.scale" in message
    message = refused(
        model(("attention", attention()), ("scale", part(Partial("dense"), Partial("dense"), linear=True)))
    )
    assert "toy.attention gives Partial(attn)" in message and "toy.scale takes Partial(dense)" in message


def test_a_module_without_a_boundary_is_refused() -> None:
    message = refused(model(("norm", norm("attn")), ("mystery", Part(None))))
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


def test_an_axis_that_the_mesh_lacks_is_named_with_both_modules() -> None:
    message = refused(model(("norm", norm("attn")), ("router", part(Varying("moe"), Replicate("moe")))))
    assert "toy.norm → toy.router" in message and "'moe'" in message


def test_axes_that_do_not_factor_the_world_are_named_with_both_modules() -> None:
    mesh = Mesh(4, (("attention", (("attn_data", 1), ("attn", 4))), ("vocabulary", (("vocab", 3),))))
    message = refused(model(("norm", norm("attn"))), mesh)
    assert "toy.embed" in message and "toy.norm" in message and "vocab 3 do not factor a world of 4" in message


def test_more_than_one_rank_is_refused() -> None:
    mesh = Mesh(2, (("attention", (("attn", 2),)), ("vocabulary", (("vocab", 2),))))
    assert "one rank only" in refused(model(("norm", norm("attn"))), mesh)
