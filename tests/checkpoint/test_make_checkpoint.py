"""Random checkpoints: `transformers` reads them, they are as large as the real ones, and every expert has work."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import openai
import pytest
import torch
import transformers

from tests.e2e.server import serving
from tests.models.paged import PagedModel
from tests.models.reference import error, expected, tokens
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.checkpoint.weights import iterate_weights, load_weights
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import MoE
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_checkpoint.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = script()
TINY = [name for name in make.PRESETS if name.startswith("tiny-")]


def loaded(source: Source) -> CausalLM:
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=256, block_size=16)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return model


@pytest.mark.parametrize("preset", TINY)
def test_transformers_reads_a_tiny_checkpoint_and_agrees(tmp_path: Path, preset: str) -> None:
    assert make.main([preset, str(tmp_path), "--dtype", "float32", "--shard-bytes", "400000"]) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    # A correction bias that transformers names differently or a tensor that it would draw anew shows here.
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = tokens(1)
    got = PagedModel(loaded(resolve(str(tmp_path))), block_size=16, dtype=torch.float32).step([("a", ids)])[0]
    assert error(got, expected(reference.eval(), ids)) < 1e-4


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("v2l", 15_706_484_224),
        ("v3", 671_026_419_200),
        ("k2", 1_026_408_232_448),
        ("llama-8b", 8_030_261_248),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_a_preset_has_as_many_parameters_as_the_model_it_is_named_after(
    tmp_path: Path, preset: str, parameters: int
) -> None:
    assert make.main([preset, str(tmp_path), "--config-only"]) == 0
    tensors = make.needed_tensors(tmp_path)
    assert sum(math.prod(shape) for shape in tensors.values()) == parameters
    shards = list(make.in_shards(tensors, 2, 2 << 30))
    assert [name for shard in shards for name in shard] == list(tensors)
    # K2's embedding is larger than a shard, and has one to itself.
    sizes = [sum(2 * math.prod(shape) for shape in shard.values()) for shard in shards]
    assert all(size <= 2 << 30 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))


def test_a_seed_gives_the_same_weights_and_another_others(tmp_path: Path) -> None:
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        arguments = ["tiny-v3", str(tmp_path / name), "--seed", seed, "--shard-bytes", "400000", "--layers", "2"]
        assert make.main(arguments) == 0
    a, b, c = (dict(iterate_weights(resolve(str(tmp_path / name)))) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(a[name], c[name]) and not torch.equal(a[name], a[name.replace("3", "4")])
    assert a[name].std() == pytest.approx(0.02, rel=0.1) and "model.layers.2.input_layernorm.weight" not in a
    assert a["model.embed_tokens.weight"].std() == pytest.approx(0.5, rel=0.1)


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(SystemExit):
        make.main(["tiny-v3", str(tmp_path / "there")])
    assert "there is not empty" in capsys.readouterr().err
    assert make.main(["tiny-v3", str(tmp_path / "there" / "file")]) == 1
    assert make.main(["tiny-v3", str(tmp_path / "device"), "--device", "nowhere"]) == 1
    assert all(line.startswith("make_checkpoint: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-v2l", "tiny-qwen3-moe"])
def test_dummy_weights_spread_tokens_over_the_experts(tmp_path: Path, preset: str) -> None:
    make.main([preset, str(tmp_path), "--config-only"])
    model = loaded(resolve(str(tmp_path), "dummy"))
    counts: list[torch.Tensor] = []
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in moes:
        total = moe.gate.weight.shape[0]
        moe.gate.register_forward_hook(
            lambda _, __, routed, total=total: counts.append(routed[0].flatten().long().bincount()[:total])
        )
    logits = PagedModel(model, block_size=16, dtype=torch.float32).step([("a", tokens(1, 240))])[0]
    assert len(counts) == len(moes) == 2 and all(count.min() > 0 for count in counts)
    assert all(count.max() < 3.5 * count.float().mean() for count in counts)
    assert len(logits.argmax(-1).unique()) > 60


def test_the_format_dummy_needs_no_weights_and_the_others_do(tmp_path: Path) -> None:
    make.main(["tiny-v3", str(tmp_path), "--config-only"])
    with pytest.raises(CheckpointError, match=r"has config.json but no \*.safetensors file"):
        resolve(str(tmp_path))

    async def run(seed: int) -> list[int]:
        config = EngineConfig(model=str(tmp_path), load_format="dummy", block_size=16, max_model_len=128, num_threads=1)
        async with AsyncEngine(config, in_process=True) as engine:
            params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=seed)
            return [token async for out in engine.generate([5, 9, 300], params) for token in out.token_ids]

    first, again, other = (asyncio.run(run(seed)) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) >= 20


def test_a_toy_of_deepseek_v3_is_served_over_http(tmp_path: Path) -> None:
    folder = tmp_path / "toy-v3"
    make.main(["tiny-v3", str(folder)])
    flags = ["--model", str(folder), "--block-size", "16", "--max-model-len", "512", "--num-threads", "1"]
    question = [{"role": "user", "content": "Reverse a list in Python. " * 5}]
    with serving(tmp_path / "log", *flags) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answers = [
            client.chat.completions.create(model="toy-v3", messages=question, max_tokens=30, temperature=0)
            for _ in range(2)
        ]
    first, warm = answers
    assert first.choices[0].message.content == warm.choices[0].message.content
    assert first.usage.completion_tokens >= 1 and first.usage.prompt_tokens > 3 * 16
    assert warm.usage.prompt_tokens_details.cached_tokens == (first.usage.prompt_tokens - 1) // 16 * 16
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLM"]
