"""What `tune` has measured: the fastest implementation of an op by number of tokens, in a file that all ranks read.

There is a file for each platform and version of torch and Triton, in `TOKENSPEED_KERNELS_CACHE` or the user's cache
folder. It holds names; an entry whose implementation is no longer there or not legal for a request is passed over.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Kernel, Target, Traits

CACHE = "TOKENSPEED_KERNELS_CACHE"

logger = logging.getLogger("tokenspeed.kernels")


@dataclass(frozen=True)
class Winner:
    """The fastest implementation up to a number of tokens; None: for all that are more."""

    most_tokens: int | None
    name: str

    def __str__(self) -> str:
        return f"{'more' if self.most_tokens is None else f'up to {self.most_tokens} tokens'}: {self.name}"


_Key = tuple[str, str, tuple[tuple[str, int | bool | str], ...]]


class Winners:
    """The files of one folder, each read once, when its platform is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Platform, dict[_Key, tuple[Winner, ...]]] = {}

    @classmethod
    def of_user(cls) -> Winners:
        """Where the environment says, or else in the user's cache folder."""
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(os.environ.get(CACHE) or Path(caches) / "tokenspeed" / "kernels"))

    def path(self, platform: Platform) -> Path:
        """The file of a platform: another chip, instruction set, torch or Triton has another one."""
        versions = f"{platform}, {_versions()}"
        digest = hashlib.sha256(versions.encode()).hexdigest()[:12]
        return self.folder / f"{platform.vendor}-{platform.arch}-{digest}.json"

    def find(self, op: str, target: Target, traits: Traits) -> tuple[Winner, ...]:
        """The winners in order of tokens, the last one without an end; none where nothing was measured."""
        return self._of(target.platform).get(_key(op, target.dtype, traits), ())

    def put(self, op: str, target: Target, traits: Traits, winners: Sequence[Winner]) -> Path:
        """Keep what was measured, beside what others have kept since, and return the file."""
        self._read.pop(target.platform, None)
        known = self._of(target.platform)
        known[_key(op, target.dtype, traits)] = tuple(winners)
        entries = [
            {
                "op": op,
                "dtype": dtype,
                "traits": dict(traits),
                "winners": [[winner.most_tokens, winner.name] for winner in found],
            }
            for (op, dtype, traits), found in sorted(known.items(), key=str)
        ]
        path = self.path(target.platform)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A rank that starts meanwhile reads the old file or the new one, never half of one.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as new:
            json.dump({"platform": str(target.platform), "versions": _versions(), "entries": entries}, new, indent=1)
        Path(new.name).replace(path)
        return path

    def _of(self, platform: Platform) -> dict[_Key, tuple[Winner, ...]]:
        if platform not in self._read:
            self._read[platform] = _load(self.path(platform))
        return self._read[platform]


def _key(op: str, dtype: torch.dtype, traits: Traits) -> _Key:
    return op, str(dtype).removeprefix("torch."), tuple(sorted(traits.items()))


def _versions() -> str:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__}, triton {triton}"


def _load(path: Path) -> dict[_Key, tuple[Winner, ...]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except OSError as error:
        logger.warning("kernels are chosen by priority: %s", error)
        return {}
    try:
        found = dict(map(_entry, json.loads(text)["entries"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("kernels are chosen by priority: %s is not what tune writes (%r)", path, error)
        return {}
    logger.info("kernels measured on this machine: %d choices from %s", len(found), path)
    return found


def _entry(entry: Any) -> tuple[_Key, tuple[Winner, ...]]:
    winners = tuple(Winner(most, str(name)) for most, name in entry["winners"])
    bounds = [winner.most_tokens for winner in winners]
    ends = [bound for bound in bounds if isinstance(bound, int)]
    if bounds != [*sorted(set(ends)), None]:
        raise ValueError(f"numbers of tokens {bounds}")
    return (str(entry["op"]), str(entry["dtype"]), tuple(sorted(entry["traits"].items()))), winners


def num_tokens(arguments: object) -> int:
    """Tokens of a call: the rows of its first tensor."""
    while isinstance(arguments, tuple):
        arguments = arguments[0]
    assert isinstance(arguments, torch.Tensor)
    return arguments.shape[0]


def by_tokens(kernels: Sequence[tuple[int | None, Kernel]]) -> Kernel:
    """A kernel that calls the one whose number of tokens, the most that it is for, is the next one up."""
    if len(kernels) == 1:
        return kernels[0][1]
    bounds = [most for most, _ in kernels if most is not None]

    def dispatch(*arguments: Any) -> Any:
        return kernels[bisect.bisect_left(bounds, num_tokens(arguments))][1](*arguments)

    return dispatch
