"""From a checkpoint to its text side: the tokenizer and the chat template. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.checkpoint.source import Source
from tokenspeed.errors import CheckpointError
from tokenspeed.text.files import read_bytes, read_json, read_text, token_text
from tokenspeed.text.gguf_vocab import gguf_tokenizer
from tokenspeed.text.hf import NAMED_TOKENS, LibraryTokenizer
from tokenspeed.text.sentencepiece_model import SentencePieceTokenizer
from tokenspeed.text.template import DEFAULT, ChatTemplate
from tokenspeed.text.tiktoken_ranks import TiktokenTokenizer, looks_like_ranks
from tokenspeed.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextSide:
    """What turns text into tokens and back. `template` is None if the checkpoint has none: no chat then."""

    tokenizer: Tokenizer
    template: ChatTemplate | None


@dataclass(frozen=True, slots=True)
class _Described:
    """A tokenizer with what its checkpoint says about chat: templates by name, and the token variables."""

    tokenizer: Tokenizer
    templates: dict[str, str]
    special_tokens: dict[str, str]
    name: str


def load_text(source: Source, *, tokenizer: str | None = None, chat_template: str | None = None) -> TextSide:
    """The tokenizer and template of a checkpoint.

    `tokenizer` (--tokenizer) is a folder or file to take both from instead; a tokenizer without a template
    leaves the checkpoint's. `chat_template` (--chat-template) is a jinja file that overrules all. Raises
    `CheckpointError`, one line that names the file.
    """
    described = _described(source.path, source.kind == "gguf") if tokenizer is None else _named(tokenizer)
    templates, name = described.templates, described.name
    if tokenizer is not None and not templates and chat_template is None:
        templates, name = templates_of(source)
    if chat_template is not None:
        templates, name = {DEFAULT: read_text(Path(chat_template).expanduser())}, chat_template
    if not templates:
        return TextSide(described.tokenizer, None)
    template = ChatTemplate(templates, special_tokens=described.special_tokens, name=name)
    return TextSide(described.tokenizer, template)


def _named(tokenizer: str) -> _Described:
    path = Path(tokenizer).expanduser()
    if path.is_dir():
        return _described(path, gguf=False)
    if path.is_file():
        return _described(path, gguf=path.suffix == ".gguf")
    raise CheckpointError(f"--tokenizer {tokenizer}: no such file or folder")


def _described(path: Path, gguf: bool) -> _Described:
    if gguf:
        with GGUFFile(path) as file:
            metadata = file.metadata
        made = gguf_tokenizer(metadata, str(path))
        return _Described(made, gguf_templates(metadata), gguf_special_tokens(metadata), str(path))
    folder = path if path.is_dir() else path.parent
    config = _config(folder)
    made = _tokenizer_file(path, config)
    tokens = {key: token for key in NAMED_TOKENS if (token := token_text(config.get(key))) is not None}
    templates, name = _folder_templates(folder, config)
    return _Described(made, templates, tokens, name)


def _tokenizer_file(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a folder, or in one file of a folder."""
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
        found = [path / name for name in names if (path / name).is_file()]
        found += sorted(path.glob("*.tiktoken"))
        if not found:
            raise CheckpointError(f"{path}: no {', '.join(names)} or *.tiktoken")
        path = found[0]
    if path.suffix == ".json":
        return LibraryTokenizer.from_file(path, config)
    if path.suffix == ".tiktoken" or looks_like_ranks(read_bytes(path)[:256]):
        return TiktokenTokenizer.from_file(path, config)
    return SentencePieceTokenizer.from_file(path, config)


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, as far as they exist."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= read_json(folder / name)
    return config


def templates_of(source: Source) -> tuple[dict[str, str], str]:
    """A checkpoint's own chat templates by name, and the file they are in."""
    if source.kind == "gguf":
        with GGUFFile(source.path) as file:
            return gguf_templates(file.metadata), str(source.path)
    return _folder_templates(source.path, _config(source.path))


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The chat templates of a folder by name, and the file they are in."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        extra = {file.stem: read_text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        return {DEFAULT: read_text(path), **extra}, str(path)
    path = folder / "chat_template.json"
    if path.is_file():
        return _listed(read_json(path).get("chat_template"), str(path)), str(path)
    name = str(folder / "tokenizer_config.json")
    return _listed(config.get("chat_template"), name), name


def _listed(value: Any, name: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{name}: chat_template is neither a string nor a list of named templates") from error
    if not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise CheckpointError(f"{name}: chat_template is neither a string nor a list of named templates")
    return templates


def gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates in a GGUF file's metadata, by name."""
    prefix = "tokenizer.chat_template"
    found = {key: value for key, value in metadata.items() if key.startswith(prefix) and isinstance(value, str)}
    return {key.removeprefix(prefix).removeprefix(".") or DEFAULT: value for key, value in found.items()}


def gguf_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The spelling of the special tokens that a GGUF file's metadata names."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: tokens[index] for name, index in ids.items() if isinstance(index, int) and 0 <= index < len(tokens)}
