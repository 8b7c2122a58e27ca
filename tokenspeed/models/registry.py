"""Architecture names, as config.json spells them, to the classes that implement them."""

from __future__ import annotations

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.llama import LlamaForCausalLM
from tokenspeed.parallel.compiler import compile_model

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
}


def build_model(config: ModelConfig, ctx: BuildContext) -> CausalLM:
    """Build the model with uninitialised weights and compile its boundaries over the context's mesh.

    Raises `CheckpointError` for an architecture that is not supported or a field that is out of range,
    `ConfigError` for placements that cannot be.
    """
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{config.file}: architecture {config.architecture[:100]!r} is not supported (supported: {supported})"
        )
    model = architecture(config, ctx)
    compile_model(model, ctx.mesh, config.architecture)
    return model
