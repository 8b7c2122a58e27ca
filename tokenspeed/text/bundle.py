"""A tokenizer as the files that other programs read: a folder's own, or a GGUF file's written down as such."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.checkpoint.source import Source
from tokenspeed.errors import CheckpointError
from tokenspeed.text.files import read_bytes
from tokenspeed.text.gguf_vocab import gguf_description
from tokenspeed.text.load import gguf_special_tokens, gguf_templates, templates_of
from tokenspeed.text.template import DEFAULT

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "config.json",
    "generation_config.json",
    "chat_template.json",
    TEMPLATE := "chat_template.jinja",
)
ADDITIONAL = "additional_chat_templates"
PATTERNS = ("*.tiktoken", f"{ADDITIONAL}/*.jinja")


def tokenizer_files(
    source: Source, *, tokenizer: str | None = None, chat_template: str | None = None
) -> dict[str, bytes]:
    """File contents by name, from where `load_text` has the tokenizer and the chat template with these arguments.

    Raises `CheckpointError` naming a file that cannot be read.
    """
    path = source.path if tokenizer is None else Path(tokenizer).expanduser()
    files = _of_gguf(path) if path.suffix == ".gguf" and path.is_file() else _of_folder(path)
    if chat_template is not None:
        kept = {name: data for name, data in files.items() if "chat_template" not in name}
        return kept | {TEMPLATE: read_bytes(Path(chat_template).expanduser())}
    if tokenizer is not None and not _has_template(files):
        files |= _written(templates_of(source)[0])
    return files


def _of_folder(path: Path) -> dict[str, bytes]:
    folder = path if path.is_dir() else path.parent
    found = [folder / name for name in NAMES]
    found += [file for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    files = {str(file.relative_to(folder)): read_bytes(file) for file in found if file.is_file()}
    if not files:
        raise CheckpointError(f"{folder}: no tokenizer files")
    return files


def _of_gguf(path: Path) -> dict[str, bytes]:
    with GGUFFile(path) as file:
        metadata = file.metadata
    spec, config = gguf_description(metadata, str(path))
    files = {
        "tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **spec},
        "tokenizer_config.json": {
            **gguf_special_tokens(metadata), **config, "tokenizer_class": "PreTrainedTokenizerFast"
        },
    }  # fmt: skip
    written = {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}
    return written | _written(gguf_templates(metadata))


def _written(templates: Mapping[str, str]) -> dict[str, bytes]:
    """Chat templates as files of their own; one whose name is no file's has none."""
    return {
        TEMPLATE if name == DEFAULT else f"{ADDITIONAL}/{name}.jinja": text.encode()
        for name, text in templates.items()
        if not {"/", "\\"} & set(name)
    }


def _has_template(files: dict[str, bytes]) -> bool:
    return any("chat_template" in name for name in files) or b'"chat_template"' in files.get(
        "tokenizer_config.json", b""
    )
