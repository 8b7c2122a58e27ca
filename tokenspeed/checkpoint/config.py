"""What a checkpoint says about its model, read without torch and checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as _short
from typing import Any

import msgspec

from tokenspeed.checkpoint.gguf_fields import describe
from tokenspeed.checkpoint.quantisation import Quantisation, read_quantisation
from tokenspeed.checkpoint.source import Source
from tokenspeed.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20

# Largest believable values: a corrupt number is refused before it sizes an allocation.
SIZES = {
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
}
OPTIONAL_SIZES = {
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
    "kv_lora_rank": 1 << 16,
    "q_lora_rank": 1 << 16,
}


# Sampling values that generation_config.json may recommend: least, most, and whether the least itself is allowed.
GENERATION_RANGES = {
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "top_k": (-1.0, 2.0**31, True),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 100.0, False),
}


NESTED = {"KimiK25ForConditionalGeneration": "text_config"}
"""Architectures whose language model is described by a field of its own."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a model in Hugging Face's words, whatever file it came from.

    `file` is named in errors; `hf` is config.json, or GGUF metadata put into its terms. `dtype` is what
    the weights are stored in: float32, float16, bfloat16, or quantised. `generation_defaults` holds the
    sampling values that the checkpoint recommends, under the names of `SamplingParams`.
    """

    file: str
    architecture: str
    hf: dict[str, Any]
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    generation_defaults: dict[str, float]


def read_model_config(source: Source) -> ModelConfig:
    """Read and check the configuration of `source`. Raises `CheckpointError` naming file and field."""
    return _read_gguf(source.path) if source.kind == "gguf" else _read_folder(source.path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises `CheckpointError` naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes is more than the {MAX_JSON_BYTES} that are read")
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def positive_int(fields: Mapping[str, Any], name: str, file: str, limit: int = 1 << 30) -> int:
    """The field as an int from 1 to `limit`. Raises `CheckpointError` naming file and field."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        got = "it is missing" if value is None else f"got {_short(value)}"
        raise CheckpointError(f"{file}: {name} must be an integer from 1 to {limit}, {got}")
    return value


def flag(fields: Mapping[str, Any], name: str, file: str) -> bool:
    """The field as a bool, False if it is missing. Raises `CheckpointError` naming file and field."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{file}: {name} must be true or false, got {_short(value)}")
    return bool(value)


def _read_folder(folder: Path) -> ModelConfig:
    architecture, hf, file = _config_json(folder)
    quantisation = read_quantisation(hf, file)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    dtype = hf.get("dtype", hf.get("torch_dtype")) or "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise CheckpointError(f"{file}: dtype {_short(dtype)} is not supported")
    stored = dtype if quantisation is None else "quantised"
    return _checked(file, architecture, hf, stored, generation, str(generation_path))


def read_folder_quantisation(folder: Path) -> Quantisation | None:
    """How the weights of a Hugging Face folder are quantised. Raises `CheckpointError` naming the field."""
    _, hf, file = _config_json(folder)
    return read_quantisation(hf, file)


def _config_json(folder: Path) -> tuple[str, dict[str, Any], str]:
    """The architecture, the fields of its language model, and the file's name."""
    path = folder / "config.json"
    hf = read_json(path)
    file = str(path)
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(f"{file}: architectures must name one architecture, got {_short(architectures)}")
    architecture = architectures[0]
    return architecture, _text_part(hf, NESTED[architecture], file) if architecture in NESTED else hf, file


def _text_part(hf: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    """The fields of the language model inside a model that also sees; what it leaves out, the whole one says."""
    inner = hf.get(name)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{file}: {name} must be an object, got {_short(inner)}")
    shared = ("dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id")
    return {key: hf[key] for key in shared if hf.get(key) is not None} | inner


def _checked(
    file: str, architecture: str, hf: dict[str, Any], dtype: str, generation: dict[str, Any], generation_file: str
) -> ModelConfig:
    sizes = {name: positive_int(hf, name, file, limit) for name, limit in SIZES.items()}
    for name, limit in OPTIONAL_SIZES.items():
        if hf.get(name) is not None:
            positive_int(hf, name, file, limit)
    vocab_size = sizes["vocab_size"]
    eos: dict[int, None] = {}
    for fields, where in ((generation, generation_file), (hf, file)):
        value = fields.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            eos[_token_id(token_id, "eos_token_id", vocab_size, where)] = None
    bos = generation.get("bos_token_id", hf.get("bos_token_id"))
    return ModelConfig(
        file=file,
        architecture=architecture,
        hf=hf,
        vocab_size=vocab_size,
        max_position_embeddings=sizes["max_position_embeddings"],
        dtype=dtype,
        eos_token_ids=tuple(eos),
        bos_token_id=None if bos is None else _token_id(bos, "bos_token_id", vocab_size, file),
        generation_defaults=_generation_defaults(generation, generation_file),
    )


def _token_id(value: object, name: str, vocab_size: int, file: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise CheckpointError(f"{file}: {name} must be in the vocabulary of {vocab_size}, got {_short(value)}")
    return value


def _generation_defaults(fields: Mapping[str, Any], file: str) -> dict[str, float]:
    defaults: dict[str, float] = {}
    for name, (low, high, closed) in GENERATION_RANGES.items():
        value = fields.get(name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (value == low and not closed):
            least = "from" if closed else "above"
            raise CheckpointError(f"{file}: {name} must be a number {least} {low:g} to {high:g}, got {_short(value)}")
        if name == "top_k" and value != int(value):
            raise CheckpointError(f"{file}: top_k must be an integer, got {_short(value)}")
        defaults[name] = value
    return defaults


def _read_gguf(path: Path) -> ModelConfig:
    file, found = str(path), describe(path)
    return _checked(file, found.architecture, found.hf, found.dtype, found.generation, file)
