"""Every family gives the logits of `transformers`, and the comparison would notice if a part of it were wrong."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.families import FAMILIES, LATENT_FAMILIES, MOE_FAMILIES, write
from tests.models.paged import PagedModel
from tests.models.reference import LENGTH, error, expected, tokens
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights
from tokenspeed.errors import CheckpointError
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import Platform
from tokenspeed.layers.attention import QKNorm
from tokenspeed.layers.mla import LatentAttention, MLAAttention
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import Experts, MoE, Router
from tokenspeed.models.registry import build_model

NAMES = [*FAMILIES, "kimi-k2.5"]
BLOCK = 16
TOLERANCE = 1e-4


Written = Callable[[str], tuple[Path, transformers.PreTrainedModel]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint of each family, made once, and its model in `transformers`. Not to be changed."""

    @functools.cache
    def make(name: str) -> tuple[Path, transformers.PreTrainedModel]:
        folder = tmp_path_factory.mktemp(name)
        return folder, write(folder, name)

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PagedModel:
    source = resolve(str(folder))
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=dtype, max_positions=256, block_size=BLOCK)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return PagedModel(model, block_size=BLOCK, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_in_one_prompt_in_chunks_and_token_by_token(written: Written, name: str) -> None:
    folder, reference = written(name)
    model = load(folder)
    a, b = tokens(1), tokens(2)
    want_a, want_b = expected(reference, a), expected(reference, b)
    assert error(model.step([("whole", a)])[0], want_a) < TOLERANCE

    chunked: list[torch.Tensor] = []
    at = 0
    for size in (7, 2, 40, 26):
        # Another sequence decodes in the same pass: absorbed beside expanded, where attention is latent.
        decoded, chunk = model.step([("b", [b[len(chunked)]]), ("a", a[at : at + size])])
        assert error(decoded, want_b[len(chunked)][None]) < TOLERANCE
        chunked.append(chunk)
        at += size
    assert at == LENGTH
    assert error(torch.cat(chunked), want_a) < TOLERANCE

    alone = [model.step([("alone", [token])])[0] for token in a]
    assert error(torch.cat(alone), want_a) < TOLERANCE


def test_rotation_of_halves_where_the_file_says_so(tmp_path: Path) -> None:
    reference = write(tmp_path, "deepseek-v3", rope_interleave=False)
    ids = tokens(3)
    assert error(load(tmp_path).step([("a", ids)])[0], expected(reference, ids)) < TOLERANCE


def test_experts_in_every_second_layer_where_the_file_says_so(tmp_path: Path) -> None:
    reference = write(tmp_path, "qwen3-moe", decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[3])
    ids = tokens(3)
    model = load(tmp_path)
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [False, True, False, False]
    assert error(model.step([("a", ids)])[0], expected(reference, ids)) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(written: Written, name: str) -> None:
    folder, reference = written(name)
    ids = tokens(6, 200)
    want = expected(reference, ids).argmax(-1)
    ours = load(folder, torch.bfloat16).step([("a", ids)])[0]
    theirs = expected(copy.deepcopy(reference).to(torch.bfloat16), ids)
    ours_agree, theirs_agree = ((logits.argmax(-1) == want).float().mean().item() for logits in (ours, theirs))
    print(f"{name}: top-1 agreement with float32: {ours_agree:.0%}, transformers {theirs_agree:.0%}")
    assert ours_agree > theirs_agree - 0.06 and ours_agree > 0.6


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_no_comparison_is_vacuous(written: Written, name: str) -> None:
    model = load(written(name)[0])
    moes = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    chosen: list[torch.Tensor] = []
    for moe in moes:
        moe.gate.register_forward_hook(lambda _, __, routed: chosen.append(routed[0]))
    model.step([("a", tokens(1))])
    assert len(moes) >= 2 and (name == "mixtral" or len(moes) < len(model.model.layers))
    for moe, ids in zip(moes, chosen, strict=True):
        assert len(ids.unique()) >= 0.9 * moe.experts.gate_up.shape[0], "experts that nobody asks prove nothing"


def _each(kind: type) -> Callable[[Any], list[Any]]:
    return lambda model: [module for module in model.modules() if isinstance(module, kind)]


def _scale_scores(model: Any) -> None:
    for attention in _each(LatentAttention)(model):
        attention.scale *= 1.02


def _forget_yarn(model: Any) -> None:
    for attention in _each(LatentAttention)(model):
        attention.scale = attention.shape.qk_dim**-0.5


def _pair_halves(model: Any) -> None:
    for attention in _each(MLAAttention)(model):
        weight, shape = attention.q_up_proj.weight, attention.shape
        rows = weight.view(shape.num_heads, shape.qk_dim, -1)[:, shape.nope_dim :]
        rows.copy_(rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).clone())


def _skip_latent_norm(model: Any) -> None:
    _each(MLAAttention)(model)[0].kv_a_layernorm.weight.fill_(1)


def _forget_correction(model: Any) -> None:
    for router in _each(Router)(model):
        router.bias.zero_()


def _choose_otherwise(model: Any, **changed: Any) -> None:
    """Routers that take another choice for theirs."""
    for moe in _each(MoE)(model):
        traits = dataclasses.asdict(moe.experts._routing) | changed
        del traits["scale"], traits["bias"]
        moe.gate._choose = ops.moe_route(ops.Target(Platform.of(torch.device("cpu")), torch.float32), **traits)


def _forget_groups(model: Any) -> None:
    _choose_otherwise(model, num_groups=1, top_groups=1)


def _forget_scale(model: Any) -> None:
    for router in _each(Router)(model):
        router.scale = 1.0


def _forget_shared(model: Any) -> None:
    for experts in _each(Experts)(model):
        experts.down[-1].zero_()


def _swap_shared(model: Any) -> None:
    for experts in _each(Experts)(model):
        experts.gate_up[-2:] = experts.gate_up[-2:].flip(0)


def _swap_gate(model: Any) -> None:
    for experts in _each(Experts)(model):
        experts.gate_up.copy_(experts.gate_up.roll(experts.gate_up.shape[1] // 2, 1))


def _forget_normalising(model: Any) -> None:
    _choose_otherwise(model, normalise=False)


def _forget_bias(model: Any) -> None:
    model.layers[1].self_attn.qkv_proj.bias.zero_()


def _swap_head_norms(model: Any) -> None:
    norm = _each(QKNorm)(model)[0]
    norm.q_weight, norm.k_weight = norm.k_weight, norm.q_weight


FAULTS: list[tuple[str, Callable[[Any], None]]] = [
    ("qwen2", _forget_bias),
    ("qwen3", _swap_head_norms),
    ("mixtral", _forget_normalising),
    ("mixtral", _swap_gate),
    ("qwen3-moe", _forget_normalising),
    ("qwen3-moe", _swap_head_norms),
    ("deepseek-v2-lite", _swap_shared),
    *((name, fault) for name in LATENT_FAMILIES for fault in (_scale_scores, _forget_yarn, _pair_halves)),
    *((name, _skip_latent_norm) for name in LATENT_FAMILIES),
    *((name, _forget_shared) for name in LATENT_FAMILIES),
    *((name, fault) for name in ("deepseek-v2", "deepseek-v3") for fault in (_forget_groups, _forget_scale)),
    *((name, fault) for name in ("deepseek-v3", "kimi-k2") for fault in (_forget_correction, _forget_normalising)),
]


@pytest.mark.parametrize(("name", "plant"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_comparison_notices_a_planted_fault(written: Written, name: str, plant: Callable[[Any], None]) -> None:
    folder, reference = written(name)
    ids = tokens(1)
    model = load(folder)
    want = expected(reference, ids)
    assert error(model.step([("sound", ids)])[0], want) < TOLERANCE
    with torch.no_grad():
        plant(model.model)
    assert error(model.step([("faulty", ids)])[0], want) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64 is not supported"),
        ("mixtral", {"sliding_window": 64}, "sliding_window 64 is not supported"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be an integer from 1"),
        ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) is more than num_local_experts \(8\)"),
        ("qwen3-moe", {"mlp_only_layers": "0"}, "mlp_only_layers must be a list"),
        ("qwen3-moe", {"moe_intermediate_size": None}, "moe_intermediate_size"),
        ("deepseek-v2", {"n_group": 3}, r"n_routed_experts \(16\) must be a multiple of n_group \(3\)"),
        ("deepseek-v3", {"topk_group": 5}, r"topk_group \(5\) is more than n_group \(4\)"),
        ("deepseek-v3", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) is more than .* \(8\)"),
        ("deepseek-v3", {"topk_method": "random"}, "topk_method 'random' with scoring_func 'sigmoid'"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "topk_method 'noaux_tc' with scoring_func 'softmax'"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob with scoring_func softmax"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer from 0"),
        ("deepseek-v3", {"n_routed_experts": 1 << 29}, "n_routed_experts must be an integer from 1 to 16384"),
        ("deepseek-v3", {"n_shared_experts": 1 << 29}, "n_shared_experts must be an integer from 0 to 4096"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("deepseek-v3", {"qk_rope_head_dim": 15}, r"qk_rope_head_dim \(15\) must be even"),
        ("deepseek-v3", {"routed_scaling_factor": "big"}, "routed_scaling_factor must be a number"),
        ("deepseek-v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ("kimi-k2.5", {"text_config": 5}, "text_config must be an object"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(
    written: Written, tmp_path: Path, name: str, change: dict[str, object], named: str
) -> None:
    fields = json.loads((written(name)[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=named) as failure:
        load(tmp_path)
    assert "\n" not in str(failure.value) and "config.json" in str(failure.value)


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2.5"])
def test_layers_that_only_predict_further_tokens_are_left_out(tmp_path: Path, name: str) -> None:
    reference = write(tmp_path, name)
    path = tmp_path / "model.safetensors"
    prefix = "language_model." if name == "kimi-k2.5" else ""
    drafting = {f"{prefix}model.layers.3.{part}.weight": torch.ones(2) for part in ("eh_proj", "mlp.experts.0.up_proj")}
    save_file(load_file(path) | drafting, path)
    with pytest.raises(CheckpointError, match=rf"2 extra \({prefix}model.layers.3"):
        load(tmp_path)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    fields.get("text_config", fields)["num_nextn_predict_layers"] = 1
    config.write_text(json.dumps(fields))
    ids = tokens(3)
    assert error(load(tmp_path).step([("a", ids)])[0], expected(reference, ids)) < TOLERANCE


def test_tensors_that_do_not_fit_the_experts_are_named(tmp_path: Path) -> None:
    write(tmp_path, "deepseek-v2-lite")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_shared_experts": 3, "n_routed_experts": 9}))
    shared = r"model\.layers\.1\.mlp\.shared_experts\.gate_proj\.weight is \[80, 64\], must be \[120, 64\]"
    with pytest.raises(CheckpointError, match=rf"missing \(.*experts\.8\.gate_proj.*misshapen \(.*{shared}") as failure:
        load(tmp_path)
    assert "\n" not in str(failure.value)
