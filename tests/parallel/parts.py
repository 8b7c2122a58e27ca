"""Modules without computation: what the compiler reads of a model, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.placement import AnyTokens, Boundary, Partial, Placement, Replicate, Routed, Shard

HIDDEN_BYTES = 4096 * 2
VOCAB_BYTES = 32_768 * 4

Named = tuple[tuple[str, "Part"], ...]


@dataclass
class Part:
    """A module without computation."""

    boundary: Boundary | None
    linear: bool = False
    parts: Named = ()
    others: Named = ()
    row_bytes: int = HIDDEN_BYTES
    sampled_only: bool = False

    def stages(self) -> Named:
        return self.parts

    def beside(self) -> Named:
        return self.others

    def work(self, tokens: int) -> Work:
        return Work(weight_bytes=1e6, flop=1e6 * tokens)


def part(takes: Placement, gives: Placement, *, linear: bool = False, **parts: Part) -> Part:
    return Part(Boundary(takes, gives), linear, tuple(parts.items()))


def norm() -> Part:
    return part(AnyTokens(), AnyTokens())


def attention() -> Part:
    return part(
        Replicate("attn"),
        Partial("attn"),
        qkv=part(Replicate("attn"), Shard("attn", -1), linear=True),
        core=part(Shard("attn", -1), Shard("attn", -1)),
        out=part(Shard("attn", -1), Partial("attn"), linear=True),
    )


def mlp(axis: str = "dense") -> Part:
    return part(Replicate(axis), Partial(axis))


def moe(*, fan_out: int = 2, shared: bool = False) -> Part:
    routed = Routed("moe_ep", fan_out)
    made = part(
        Replicate("moe"), Partial("moe"), gate=part(Replicate("moe"), routed), experts=part(routed, Partial("moe"))
    )
    if shared:
        made.others = (("shared", mlp()),)
    return made


def layer(feed_forward: Part) -> Part:
    assert feed_forward.boundary is not None
    gives = feed_forward.boundary.gives
    return part(AnyTokens(), gives, norm1=norm(), attention=attention(), norm2=norm(), mlp=feed_forward)


def model(*middle: tuple[str, Part]) -> Part:
    """An embedding, `middle`, and a head: a group of ranks that attends together hands in and gets its own rows."""
    head = part(Replicate("vocab"), Shard("vocab", -1), linear=True)
    head.row_bytes, head.sampled_only = VOCAB_BYTES, True
    parts = (("embed", part(Replicate("vocab"), Partial("vocab"))), *middle, ("head", head))
    return Part(Boundary(Replicate("attn"), Replicate("attn")), False, parts)


def decoder(*feed_forwards: Part) -> Part:
    """A model with a layer for each of these, and a last norm."""
    layers = tuple((f"layers.{i}", layer(feed_forward)) for i, feed_forward in enumerate(feed_forwards))
    return model(*layers, ("norm", norm()))
