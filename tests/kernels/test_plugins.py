"""Plug-ins: what an installed package adds, and that a broken one is named and missed by nobody."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.e2e.server import Server, get
from tests.toy import toy_llama
from tokenspeed.kernels import __main__ as command
from tokenspeed.kernels import ops, selection
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Registry, Target
from tokenspeed.kernels.selection import Selector, load_plugins

CPU = Target(Platform("cpu", "x86_64"), torch.float32)
PACKAGE = Path(__file__).parent / "plugin"

PLUGIN = """
from tokenspeed.kernels.registry import Implementation, plain

def declare():
    yield Implementation("silu_mul", "sample", plain(lambda gate_up: "sample"), priority=1000)
"""


def install(folder: Path, module: str, source: str, entry_points: str) -> None:
    """What an installer leaves: a module, and a distribution that names its entry points."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tokenspeed.kernels]\n{entry_points}\n")


def test_an_installed_plugin_is_loaded_and_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, "sample_kernels", PLUGIN, "sample = sample_kernels:declare")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    with caplog.at_level(logging.INFO, "tokenspeed.kernels"):
        (plugin,) = load_plugins(registry)
    assert (plugin.name, plugin.module, plugin.num_implementations) == ("sample", "sample_kernels", 1)
    assert plugin.failure is None
    assert "kernel plug-in sample (sample_kernels): 1 implementations" in caplog.text
    assert Selector(registry).select("silu_mul", CPU, {})(torch.zeros(1, 2)) == "sample"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_package_that_is_not_there\n", "ModuleNotFoundError"),
        ("declare = lambda: 1 / 0\n", "ZeroDivisionError"),
        ("declare = lambda: ['silu_mul']\n", "TypeError: expected Implementation, got str"),
        (PLUGIN.replace("silu_mul", "convolve"), "unknown op 'convolve'"),
        (PLUGIN + "    yield 3\n", "TypeError: expected Implementation, got int"),
    ],
    ids=["import", "call", "type", "op", "half"],
)
def test_a_broken_plugin_is_named_and_the_others_load(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = f"broken_kernels_{abs(hash(reason))}", "sound_kernels"
    install(tmp_path, broken, source, f"broken = {broken}:declare")
    install(tmp_path, sound, PLUGIN, f"sound = {sound}:declare")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    first, second = load_plugins(registry)
    assert first.name == "broken" and first.num_implementations == 0 and reason in (first.failure or "")
    assert f"kernel plug-in broken ({broken}) is skipped: " in caplog.text and reason in caplog.text
    assert second.failure is None and [each.backend for each in registry.all()] == ["sample"]


def test_plugins_join_the_backends_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "joining_kernels", PLUGIN, "joining = joining_kernels:declare")
    monkeypatch.syspath_prepend(tmp_path)
    selection.default.cache_clear()
    try:
        target = Target(Platform.of(torch.device("cpu")), torch.float32)
        assert ops.silu_mul(target)(torch.zeros(1, 2)) == "sample"
        assert "plug-in joining (joining_kernels): 1 implementations" in command.listing(selection.default())
    finally:
        selection.default.cache_clear()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_llama(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the sample package, from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    flags = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder / "site"), str(folder / "source")],
        check=True,
    )
    return folder / "site"


def answer(server: Server) -> str:
    (model,) = json.loads(get(f"{server.url}/v1/models")[1])["data"]
    body = json.dumps({"model": model["id"], "prompt": "one two", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.load(response)["choices"][0]["text"])


@pytest.mark.parametrize(
    ("setting", "said", "chosen"),
    [
        ("sound", "kernel plug-in sample (sample_kernels): 1 implementations", True),
        ("broken", "kernel plug-in sample (sample_kernels) is skipped: RuntimeError: the sample was asked to", False),
    ],
)
def test_an_engine_names_a_plugin_package_and_runs_with_it_or_without(
    setting: str, said: str, chosen: bool, toy: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("SAMPLE_KERNELS", setting)
    server = Server(tmp_path / "log", "--model", str(toy), "--dtype", "float32")
    try:
        server.wait_ready()
        assert answer(server)
    finally:
        assert server.stop() == 0
    log = (tmp_path / "log").read_text()
    assert said in log
    assert ("sample_kernels: silu_mul in torch.float32" in log) is chosen
