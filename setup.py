"""Three extensions, two of them C++20 behind Cython, built without torch. Everything else is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-Wall", "-Wextra", "-Werror=unused-result"]
# Plans are equal on all ranks to the last bit of a predicted time.
SAME_EVERYWHERE = ["-ffp-contract=off"]
CORE = sorted(str(path) for path in Path("csrc").glob("*.cc"))
KERNELS = sorted(str(path) for path in Path("tokenspeed/kernels/cpu").glob("*.cc"))

extensions = [
    Extension(
        "tokenspeed._core.scheduler",
        ["tokenspeed/_core/scheduler.pyx", *CORE],
        include_dirs=["csrc"],
        depends=[str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").glob(pattern)],
        extra_compile_args=FLAGS + SAME_EVERYWHERE,
        language="c++",
    ),
    Extension(
        "tokenspeed.kernels.cpu._ops",
        ["tokenspeed/kernels/cpu/_ops.pyx", *KERNELS],
        include_dirs=["tokenspeed/kernels/cpu"],
        depends=[str(path) for path in Path("tokenspeed/kernels/cpu").glob("*.h")],
        extra_compile_args=FLAGS,
        language="c++",
    ),
    Extension("tokenspeed.engine.lane", ["tokenspeed/engine/lane.pyx"], extra_compile_args=["-O3", "-g0", "-Wall"]),
]

setup(ext_modules=cythonize(extensions, language_level=3, build_dir="build/cython"))
