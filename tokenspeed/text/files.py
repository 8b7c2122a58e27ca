"""Small files of a checkpoint, read with errors that name them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenspeed.errors import CheckpointError


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises `CheckpointError` naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises `CheckpointError` naming it."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` naming it if there is none."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def token_text(value: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
