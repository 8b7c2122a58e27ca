"""A tokenizer's files, as another program reads them, are the tokenizer that the engine has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import pytest
import tokenizers

from tests.text.conftest import FOLDERS, TEXTS, write_json
from tests.text.test_tokenizers import small_byte_metadata
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.errors import CheckpointError
from tokenspeed.text.bundle import tokenizer_files
from tokenspeed.text.load import TextSide, load_text

MARKED = "<|im_start|>user\nHello<|im_end|>\n"


def unpacked(files: Mapping[str, bytes], folder: Path) -> Source:
    """The files as a folder of their own."""
    for name, data in files.items():
        assert not Path(name).is_absolute() and ".." not in Path(name).parts
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Source("hf", folder, "unpacked")


def assert_same(one: TextSide, other: TextSide) -> None:
    for text in [*TEXTS, MARKED]:
        for special in (False, True):
            ids = one.tokenizer.encode(text, parse_special=special)
            assert other.tokenizer.encode(text, parse_special=special) == ids
            assert other.tokenizer.decode(ids) == one.tokenizer.decode(ids)
    assert one.tokenizer.prefix_ids == other.tokenizer.prefix_ids
    assert one.tokenizer.eos_token_id == other.tokenizer.eos_token_id
    assert one.tokenizer.special_ids == other.tokenizer.special_ids
    assert (one.template and one.template.sources) == (other.template and other.template.sources)


def write_vocabulary(path: Path, **templates: str) -> Source:
    """A GGUF file with a small vocabulary and chat templates, and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = small_byte_metadata("qwen2")
    metadata["tokenizer.ggml.merges"] = ["Ġ H"]
    tokens = [*metadata["tokenizer.ggml.tokens"], "ĠH"]
    for key, value in {**metadata, "tokenizer.ggml.tokens": tokens}.items():
        match value:
            case str():
                writer.add_string(key, value)
            case int():
                writer.add_uint32(key, value)
            case _:
                writer.add_array(key, [*value, 1] if key.endswith("token_type") else value)
    for name, template in templates.items():
        suffix = "" if name == "default" else f".{name}"
        writer.add_string(f"tokenizer.chat_template{suffix}", template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Source("gguf", path, "toy")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folders_files_are_as_they_are(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    files = tokenizer_files(Source("hf", folder, "toy"))
    assert files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert_same(load_text(Source("hf", folder, "toy")), load_text(unpacked(files, tmp_path)))


def test_weights_and_whatever_else_lies_there_are_left_out(byte_level: Path, tmp_path: Path) -> None:
    source = unpacked(tokenizer_files(Source("hf", byte_level, "toy")), tmp_path)
    kept = {"config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    unpacked(dict.fromkeys([*kept, "model.safetensors", "README.md", "secret.jinja"], b"x"), tmp_path)
    assert set(tokenizer_files(source)) == {"tokenizer.json", "tokenizer_config.json", *kept}


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: no tokenizer files"):
        tokenizer_files(Source("hf", tmp_path, "toy"))


def test_the_demonstration_models_tokenizer_is_written_down_as_the_engine_reads_it(
    demo: TextSide, tmp_path: Path
) -> None:
    files = tokenizer_files(resolve(None))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert_same(demo, load_text(unpacked(files, tmp_path)))
    library = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    for text in [*TEXTS, MARKED]:
        assert library.encode(text).ids == demo.tokenizer.encode(text, parse_special=True)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["eos_token"], config["bos_token"]) == ("<|im_end|>", "<|im_start|>")


def test_every_template_of_a_gguf_is_a_file(tmp_path: Path) -> None:
    source = write_vocabulary(tmp_path / "toy.gguf", default="{{ 1 }}", tool_use="{{ 2 }}", **{"../../x": "{{ 3 }}"})
    files = tokenizer_files(source)
    assert (files["chat_template.jinja"], files["additional_chat_templates/tool_use.jinja"]) == (b"{{ 1 }}", b"{{ 2 }}")
    assert len(files) == 4, "one has the name of no file"
    found = load_text(unpacked(files, tmp_path / "files"))
    assert found.template is not None and found.template.sources == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    assert found.tokenizer.encode(" H") == load_text(source).tokenizer.encode(" H") and len(
        found.tokenizer.encode(" H")
    ) == 1


CASES = {
    "a tokenizer with a template": {"tokenizer": "byte_level"},
    "one without": {"tokenizer": "spaced"},
    "one of a GGUF file": {"tokenizer": "demo"},
    "a template": {"chat_template": "mine"},
    "both": {"tokenizer": "spaced", "chat_template": "mine"},
}


@pytest.mark.parametrize("kind", ["folder", "inline", "gguf"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_given_instead_of_the_checkpoints_own_is_in_the_files(
    kind: str, case: str, byte_level: Path, spaced: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ 'mine' }}")
    places = {"byte_level": byte_level, "spaced": spaced, "demo": resolve(None).path, "mine": mine}
    given = {name: str(places[value]) for name, value in CASES[case].items()}
    own = {"default": "{{ 'own' }}", "tool_use": "{{ 'tools' }}"}
    if kind == "gguf":
        source = write_vocabulary(tmp_path / "toy.gguf", **own)
    else:
        folder = tmp_path / "model"
        source = unpacked(tokenizer_files(Source("hf", byte_level, "toy")), folder)
        if kind == "folder":
            names = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
            unpacked({names[name]: text.encode() for name, text in own.items()}, folder)
        else:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            listed = [{"name": name, "template": template} for name, template in own.items()]
            write_json(folder / "tokenizer_config.json", config | {"chat_template": listed})
    expected = load_text(source, **given)
    assert expected.template is not None
    files = tokenizer_files(source, **given)
    assert_same(expected, load_text(unpacked(files, tmp_path / "files")))
