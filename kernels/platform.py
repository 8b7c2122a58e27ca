"""What a kernel may run on."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

_X86_64 = {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"}
_X86_64_TILES = {"avx_vnni", "amx_tile", "amx_int8", "amx_bf16"}
_AARCH64 = {"asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"}
CPU_FEATURES = frozenset(_X86_64 | _X86_64_TILES | _AARCH64)
"""The CPU features that kernels ask for; as /proc/cpuinfo spells them; no other flag is in `Platform.isa`."""

NVIDIA_LEVELS = (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120)


@dataclass(frozen=True)
class Platform:
    """One kind of device: who made it, its architecture, and the instruction-set features it has.

    `vendor` is "cpu", "nvidia", "amd", or torch's name of another device type. `arch` is the machine
    ("x86_64", "aarch64") or the chip ("sm90", "gfx942"). On NVIDIA `isa` holds every level up to the
    chip's own, so needing "sm80" means sm80 or newer.
    """

    vendor: str
    arch: str
    isa: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, device: torch.device) -> Platform:
        """The platform of a device that exists on this machine."""
        if device.type == "cpu":
            return _cpu()
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            if torch.version.hip is not None:
                return cls("amd", properties.gcnArchName.split(":")[0])
            level = properties.major * 10 + properties.minor
            below = {f"sm{known}" for known in NVIDIA_LEVELS if known <= level}
            return cls("nvidia", f"sm{level}", frozenset(below | {f"sm{level}"}))
        return cls(device.type, "")

    def __str__(self) -> str:
        features = f" ({' '.join(sorted(self.isa))})" if self.isa else ""
        return f"{self.vendor} {self.arch}".rstrip() + features


@functools.cache
def _cpu() -> Platform:
    return Platform("cpu", platform.machine(), CPU_FEATURES.intersection(_cpuinfo_flags()))


def _cpuinfo_flags() -> Iterator[str]:
    """The features that the kernel lets programs use; none where there is no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            yield from value.split()
            return
