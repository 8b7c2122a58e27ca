"""Architecture names, as config.json spells them, to the classes that implement them."""

from __future__ import annotations

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.deepseek import (
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    KimiK25ForConditionalGeneration,
)
from tokenspeed.models.llama import LlamaForCausalLM
from tokenspeed.models.mixtral import MixtralForCausalLM
from tokenspeed.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from tokenspeed.parallel.compiler import compile_model

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    "KimiK25ForConditionalGeneration": KimiK25ForConditionalGeneration,
}


def build_model(config: ModelConfig, ctx: BuildContext) -> CausalLM:
    """As `make_model`, and compile its boundaries over the context's mesh: `ConfigError` for placements that cannot
    be."""
    model = make_model(config, ctx)
    compile_model(model, ctx.mesh, config.architecture)
    return model


def make_model(config: ModelConfig, ctx: BuildContext) -> CausalLM:
    """The model with uninitialised weights, the share of it that the context's rank has.

    Raises `CheckpointError` for an architecture that is not supported or a field that is out of range, `ConfigError`
    for sizes that the mesh cannot divide.
    """
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{config.file}: architecture {config.architecture[:100]!r} is not supported (supported: {supported})"
        )
    return architecture(config, ctx)
