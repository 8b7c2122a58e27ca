"""sample: all rows take every step, and a row's features choose among the results."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain
from tokenspeed.kernels.sampler_state import COUNT, EDITS, HISTORY, MASKED, PROMPT, RANDOM, STOP, SamplerState

GOLDEN_GAMMA, FIRST_FACTOR, SECOND_FACTOR = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""SplitMix64's constants (Stafford's variant 13) as signed numbers, which wrap around alike."""


def sample(logits: Tensor, slots: Tensor, state: SamplerState, /) -> Tensor:
    vocab = logits.shape[1]
    at = torch.where(slots < 0, len(state.features) - 1, slots).long()
    features = state.features[at]
    usable = logits.amax(1).isfinite() & (slots >= 0)
    x = torch.where((features & EDITS != 0)[:, None], _edited(logits, at, state), logits)
    allowed = (state.mask[at].repeat_interleave(32, dim=1)[:, :vocab] >> torch.arange(vocab, device=x.device) % 32) & 1
    x = x.masked_fill((features & MASKED != 0)[:, None] & (allowed == 0), float("-inf"))
    best = x.amax(1, keepdim=True)
    usable &= best[:, 0].isfinite()
    ids = torch.arange(vocab, device=logits.device)
    greedy = torch.where(x == best, ids, vocab).amin(1)
    drawn = _drawn(x - torch.where(best.isfinite(), best, 0), at, state)
    token = torch.where(features & RANDOM != 0, drawn, greedy)
    kept = torch.where(usable, token, 0)
    state.last_token[at] = kept
    counted = (features & HISTORY != 0) & usable
    state.seen.view(-1).index_add_(0, at * vocab + kept, counted.int())
    return torch.where(usable, token, -1).int()


def _edited(logits: Tensor, at: Tensor, state: SamplerState) -> Tensor:
    seen = state.seen[at]
    count = seen & COUNT
    x = logits + state.bias[at]
    repetition = state.repetition[at, None]
    repeated = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where((count > 0) | (seen & PROMPT != 0), repeated, x)
    x = x - state.frequency[at, None] * count - state.presence[at, None] * (count > 0)
    waits = (seen & STOP != 0) & (state.length[at] < state.min_length[at])[:, None]
    return x.masked_fill(waits, float("-inf"))


def _drawn(x: Tensor, at: Tensor, state: SamplerState) -> Tensor:
    """The token of each row of `x` [S,V], whose largest is 0."""
    p = (x / state.temperature[at, None]).exp()
    ordered = p.sort(dim=1, descending=True).values
    k = state.top_k[at].long()
    last = torch.where(k > 0, k, x.shape[1]).clamp(max=x.shape[1]) - 1
    cut = torch.maximum(state.min_p[at, None], ordered.gather(1, last[:, None]))
    # Without top_k the least of all is no cut, but min_p may be above the k-th.
    cut = torch.where((k > 0)[:, None], cut, state.min_p[at, None])
    held = ordered.double().masked_fill(ordered < cut, 0).cumsum(1)
    reached = (held < state.top_p[at, None] * held[:, -1:]).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
    narrow = (state.top_p[at] < 1)[:, None]
    cut = torch.where(narrow, torch.maximum(cut, ordered.gather(1, reached)), cut)
    mass = p.double().masked_fill(p < cut, 0).cumsum(1)
    target = uniform(state.seed[at], state.length[at])[:, None] * mass[:, -1:]
    # Rounding may bring the target up to the whole mass: the search still ends on the last token that has any.
    ends = (mass < mass[:, -1:]).sum(1)
    return torch.minimum((mass <= target).sum(1), ends)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """The uniform number in [0, 1) of each (seed, position), int64 → float64."""
    state = _mix(seed) + (position + 1) * GOLDEN_GAMMA
    return _shifted(_mix(state), 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * FIRST_FACTOR
    z = (z ^ _shifted(z, 27)) * SECOND_FACTOR
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


IMPLEMENTATION = Implementation("sample", "reference", plain(sample))
