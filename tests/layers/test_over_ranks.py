"""Over any ranks in any layout: the same checkpoint, each of its elements as often as it should be, the same logits."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.layers.over_ranks import Ranks, models_of, times_held
from tests.models.families import LLAMA, write
from tests.toy import toy_llama
from tokenspeed.errors import ConfigError
from tokenspeed.parallel.mesh import Mesh

MESHES = {
    "tensor parallel": Mesh.of(4),
    "own tokens, own experts": Mesh.of(4, attn_dp=4, moe_ep=4),
    "own tokens, experts and dense layers over all": Mesh.of(4, attn_dp=4, moe_ep=4, dense_tp=4),
    "each part its own way": Mesh.of(4, attn_tp=2, moe_ep=4, dense_tp=4, vocab_tp=4),
    "experts dealt and cut": Mesh.of(4, attn_tp=4, moe_ep=2, moe_tp=2, dense_tp=2),
    "attention copied": Mesh.of(4, attn_copies=4),
    "attention cut and copied, experts dealt": Mesh.of(4, attn_copies=2, moe_ep=4),
    "attention copied in pairs, dense layers as they like": Mesh.of(4, attn_copies=2, attn_dp=2, dense_tp=1, moe_ep=2),
    "experts twice": Mesh.of(4, attn_tp=2, moe_ep=2, moe_tp=1, dense_tp=1, vocab_tp=1),
}
FAMILIES = ["deepseek-v3", "kimi-k2", "llama", "qwen2-tied-yarn", "qwen3-moe"]
SEQUENCES, PROMPT = 4, 5
"""As many sequences as ranks, so that every layout divides a decode step."""

Written = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size are not worth a second one, and wait for it where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint of each family, made once."""

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family == "llama":
            toy_llama(folder, **LLAMA)
        else:
            write(folder, family)
        return folder

    return make


def given(mesh: Mesh) -> torch.Tensor:
    """Tokens of all sequences, dealt to the groups that attend together."""
    tokens = torch.randint(3, 250, (SEQUENCES, PROMPT + 2), generator=torch.Generator().manual_seed(7))
    return tokens.view(mesh.size("attn_data"), -1, PROMPT + 2)


def logits(folder: Path, mesh: Mesh, planned_tokens: int) -> torch.Tensor:
    """A prompt and two decode steps of all sequences."""
    tokens = given(mesh)
    ranks = Ranks(folder, mesh, tokens.shape[1])
    chunks = tokens.split((PROMPT, 1, 1), dim=-1)
    out = [ranks.step(chunk, planned_tokens=planned_tokens) for chunk in chunks]
    return torch.cat(out, dim=2).flatten(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_layout_gives_the_logits_of_one_rank(written: Written, family: str) -> None:
    folder = written(family)
    want = logits(folder, Mesh.single(), 1)
    for name, mesh in MESHES.items():
        # Programs for few tokens and for many: sums are taken as a whole or in parts.
        for planned_tokens in (4, 65_536):
            got = logits(folder, mesh, planned_tokens)
            assert (got - want).abs().max() < 1e-4 * want.abs().max(), f"{name}, {planned_tokens} tokens"


def expected_times(name: str, mesh: Mesh, kv_heads: int) -> int:
    """How many ranks should hold an element of the checkpoint tensor, written down by hand."""
    size = mesh.size
    apart = size("moe_ep") > 1 or mesh.rank_sets("moe_tp") != mesh.rank_sets("dense")
    if re.search(r"norm\.weight$|(q_a|kv_a)_proj|mlp\.gate\.|block_sparse_moe\.gate\.", name):
        return mesh.world
    if re.search(r"[kv]_proj\.", name) and "kv_" not in name:
        return size("attn_data") * size("attn_copies") * max(1, size("attn") // kv_heads)
    if "self_attn" in name:
        return size("attn_data") * size("attn_copies")
    if re.search(r"\.experts\.", name) or ("shared_experts" in name and not apart):
        return size("moe_data")
    if ".mlp." in name:
        return size("dense_data")
    return size("vocab_data")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ranks_together_hold_the_whole_checkpoint(written: Written, family: str) -> None:
    for mesh in MESHES.values():
        models = models_of(written(family), mesh, "meta")
        kv_heads = 1 if family == "qwen2-tied-yarn" else 2
        for name, times in times_held(models).items():
            assert (times == expected_times(name, mesh, kv_heads)).all(), f"{name} over {mesh}"


@pytest.mark.parametrize(
    ("family", "changes", "mesh", "said"),
    [
        ("mixtral", {}, Mesh.of(8), "--attn-tp-size 8: num_attention_heads (4) cannot be dealt"),
        (
            "qwen3",
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            Mesh.of(2),
            "--attn-tp-size 2: num_key_value_heads (3) is neither a multiple nor a divisor of it",
        ),
        ("mixtral", {"num_local_experts": 6}, Mesh.of(4, moe_ep=4), "6 cannot be cut into 4 equal parts (--moe-ep"),
        ("mixtral", {"intermediate_size": 90}, Mesh.of(4), "90 cannot be cut into 4 equal parts (--moe-tp-size)"),
        ("qwen3", {"intermediate_size": 90}, Mesh.of(4), "90 cannot be cut into 4 equal parts (--dense-tp-size)"),
    ],
)
def test_sizes_that_a_mesh_cannot_divide_are_named_with_the_flag(
    tmp_path: Path, family: str, changes: dict[str, int], mesh: Mesh, said: str
) -> None:
    write(tmp_path, family, **changes)
    with pytest.raises(ConfigError) as failure:
        models_of(tmp_path, mesh, "meta")
    assert said in str(failure.value)
