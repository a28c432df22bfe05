"""`fusionroute convert`: the checkpoint it writes, what comes along, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")
pytest.importorskip("peft")

import torch
from fusionroute_convertible import (
    NAMES,
    Made,
    check,
    copied,
    dtypes,
    edit,
    forced,
    fused,
    own,
    remove,
    save_convertible,
    snapshot,
    stored,
)
from fusionroute_tiny import put_in_hub_cache, save_tiny, save_tiny_gguf, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebpo_core.fusionroute import ExpertReference, FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.conversion import convert_checkpoint
from ebpo_core.fusionroute.experts.export import needs_conversion
from ebpo_core.fusionroute.experts.files import weight_files
from ebpo_core.fusionroute.experts.hashes import files_hash

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return save_convertible(tmp_path_factory.mktemp("models"))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    return copied(original, tmp_path / "models")


def test_the_command_writes_what_an_engine_needs(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "plain"
    capsys.readouterr()
    assert main(["convert", str(made.checkpoint), str(output)]) == 0
    parameters = tiny_model("llama").num_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(", ", 1)[0] for line in lines[:3]] == [
        "math: GGUF file dequantised, experts/math",
        "code: adapter merged into its base, experts/code",
        f"chat: stays a reference, {made.root / 'chat'}",
    ]
    assert lines[0].endswith(f"{(output / 'experts/math/model.safetensors').stat().st_size / 1e6:.1f} MB")
    assert 4 * parameters < (output / "experts/math/model.safetensors").stat().st_size < 4.2 * parameters
    assert lines[3:] == [str(output)]
    assert [path.name for path in output.parent.iterdir()] == ["plain"], "nothing but the output"

    before, after = stored(made.checkpoint), stored(output)
    assert list(after) == NAMES
    assert after["chat"] == before["chat"], "a reference stays as it was"
    for name in ("math", "code"):
        folder = output / "experts" / name
        assert after[name] == {
            "name": name,
            "path": f"experts/{name}",
            "hash": files_hash(weight_files(folder)),
            "vocab_size": 200,
        }
        assert not {"adapter_config.json", "adapter_model.safetensors"} & snapshot(folder)
        assert (folder / "generation_config.json").is_file()
        origin = {"math": (made.root, "math.gguf"), "code": (made.root / "base", None)}[name]
        tokenizer = AutoTokenizer.from_pretrained(origin[0], gguf_file=origin[1])
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert (output / "experts" / "code" / "LICENSE").read_text() == "as it is"
    assert AutoTokenizer.from_pretrained(output / "experts" / "code").chat_template == tiny_tokenizer().chat_template

    others = {"model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    others.add("chat_template.jinja")
    for name in others:
        assert (output / name).read_bytes() == (made.checkpoint / name).read_bytes(), name
    kept = {path.name for path in output.iterdir()}
    assert kept == others | {"config.json", "README.md", "experts"}
    new, old = (json.loads((folder / "config.json").read_text()) for folder in (output, made.checkpoint))
    assert {**new, "experts": None} == {**old, "experts": None}
    assert "math.gguf" in (made.checkpoint / "README.md").read_text()
    assert "math.gguf" not in (output / "README.md").read_text()
    assert "experts/math" in (output / "README.md").read_text()

    for path in ("math.gguf", "code", "base"):  # what was converted is needed no more, nor is the old checkpoint
        remove(made.root / path)
    remove(made.checkpoint)
    check(output, made.logits)
    for expert in after.values():
        assert needs_conversion(ExpertReference.from_dict(expert).anchored(output)) is None
    # Each of them is a model like any other.
    torch.testing.assert_close(
        own(AutoModelForCausalLM.from_pretrained(output / "experts" / "math")), own(tiny_model("llama", 3))
    )


def test_only_what_must_be_is_loaded(made: Made, tmp_path: Path) -> None:
    for folder in ("chat", "base"):
        (made.root / folder / "model.safetensors").write_bytes(b"no weights at all")
    (made.checkpoint / "model.safetensors").write_bytes(b"no router either")
    reports: list[Any] = []
    result = convert_checkpoint(made.checkpoint, tmp_path / "out", experts=["math"], report=reports.append)
    assert reports == result
    assert [(each.name, each.done) for each in result] == [
        ("math", "GGUF file dequantised"),
        ("code", "stays a reference"),
        ("chat", "stays a reference"),
    ]
    adapter = (made.root / "code" / "adapter_model.safetensors").stat().st_size
    assert [each.size for each in result[1:]] == [len(b"no weights at all") + adapter, len(b"no weights at all")]
    assert stored(tmp_path / "out")["code"] == stored(made.checkpoint)["code"]
    assert snapshot(tmp_path / "out" / "experts") >= {"math", "math/model.safetensors"}
    assert not (tmp_path / "out" / "experts" / "code").exists()


def test_named_experts_are_written_though_they_need_it_not(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["convert", "--expert", "chat", "--expert", "code", "--", str(made.checkpoint), str(tmp_path / "out")])
        == 0
    )
    assert "chat: copied, experts/chat, " in capsys.readouterr().out
    after = stored(tmp_path / "out")
    assert after["math"] == stored(made.checkpoint)["math"]
    assert [after[name]["path"] for name in ("code", "chat")] == ["experts/code", "experts/chat"]
    remove(made.root / "chat")
    check(tmp_path / "out", made.logits)


def test_all_makes_a_folder_that_is_complete(made: Made, tmp_path: Path) -> None:
    (made.root / "chat" / "optimizer.pt").write_bytes(b"")
    assert main(["convert", str(made.checkpoint), str(tmp_path / "out"), "--all"]) == 0
    copied, origin = tmp_path / "out" / "experts" / "chat", made.root / "chat"
    assert snapshot(copied) == snapshot(origin) - {"optimizer.pt"}
    for name in snapshot(copied):
        assert (copied / name).read_bytes() == (origin / name).read_bytes(), name
    assert stored(tmp_path / "out")["chat"]["hash"] == stored(made.checkpoint)["chat"]["hash"]
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    remove(made.root)
    check(tmp_path / "elsewhere", made.logits)


def test_experts_in_the_checkpoint_come_along(made: Made, tmp_path: Path) -> None:
    whole = made.root / "whole"
    FusionRouteForCausalLM.from_pretrained(made.checkpoint).save_pretrained(whole, save_experts=True)
    result = convert_checkpoint(whole, tmp_path / "out")
    assert [each.done for each in result] == ["GGUF file dequantised", "adapter merged into its base", "copied"]
    assert {path.name for path in (tmp_path / "out" / "experts").iterdir()} == set(NAMES), "without the adapter's base"
    remove(made.root)
    check(tmp_path / "out", made.logits)


def test_experts_that_moved(made: Made, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    shutil.move(made.root / "math.gguf", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="expert 'math': no file"):
        convert_checkpoint(made.checkpoint, tmp_path / "out")
    moved = f"math={tmp_path / 'moved' / 'math.gguf'}"
    assert main(["convert", str(made.checkpoint), str(tmp_path / "out"), "--expert-path", moved]) == 0
    check(tmp_path / "out", made.logits)


def test_a_checkpoint_and_an_expert_of_the_hub(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("chat", "base", "code"):
        put_in_hub_cache(tmp_path / "cache", f"owner/{name}", made.root / name)
    edit(made.checkpoint, "chat", path="owner/chat")
    edit(made.checkpoint, "code", path="owner/base", adapter="owner/code")
    whole = made.root / "whole"
    model = FusionRouteForCausalLM.from_pretrained(made.checkpoint)
    model.save_pretrained(whole, save_experts=True)
    put_in_hub_cache(tmp_path / "cache", "owner/fused", whole)
    result = convert_checkpoint(made.checkpoint, tmp_path / "one")
    assert (tmp_path / "one" / "experts" / "code" / "tokenizer.json").is_file()
    assert (result[2].done, result[2].path) == ("stays a reference", "owner/chat")
    assert result[2].size == (made.root / "chat" / "model.safetensors").stat().st_size
    assert convert_checkpoint(made.checkpoint, tmp_path / "two", copy_all=True)[2].done == "copied"
    result = convert_checkpoint("owner/fused", tmp_path / "three")
    assert [each.path for each in result] == [f"experts/{name}" for name in NAMES]
    remove(made.root)
    check(tmp_path / "one", made.logits)
    remove(tmp_path / "cache")
    for name in ("two", "three"):
        check(tmp_path / name, made.logits)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_live_model_that_was_never_saved(made: Made, tmp_path: Path) -> None:
    live = tiny_model("mistral", 5)
    live.name_or_path = ""
    model = fused(made.root, {"live": live, "chat": made.root / "chat"})
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="expert 'live' was given as a live model and never saved"):
        convert_checkpoint(tmp_path / "fused", tmp_path / "out")
    result = convert_checkpoint(tmp_path / "fused", tmp_path / "out", expert_paths={"live": live})
    assert [each.done for each in result] == ["live model saved", "stays a reference"]
    check(tmp_path / "out", forced(model), exact=("live", "chat"))
    convert_checkpoint(tmp_path / "fused", tmp_path / "half", expert_paths={"live": live}, dtype="bfloat16")
    assert dtypes(tmp_path / "half", "live") == "bfloat16"
    assert live.dtype == torch.float32, "the model that was passed stays as it is"


def test_live_models_that_were_saved_are_compared(made: Made, tmp_path: Path) -> None:
    """The hash of such an expert is of its tensors, which are compared once it is loaded."""
    live = AutoModelForCausalLM.from_pretrained(made.root / "chat")
    fused(made.root, {"chat": live}).save_pretrained(tmp_path / "fused")
    assert stored(tmp_path / "fused")["chat"]["hash"].startswith("sha256:tensors:")
    convert_checkpoint(tmp_path / "fused", tmp_path / "out", copy_all=True)
    assert stored(tmp_path / "out")["chat"]["hash"] == files_hash(weight_files(made.root / "chat"))
    save_tiny(made.root / "chat", "qwen3", 9)
    with pytest.raises(ValueError, match="'chat' are not those the router was trained with"):
        convert_checkpoint(tmp_path / "fused", tmp_path / "refused", copy_all=True)


@pytest.mark.parametrize("name", NAMES)
def test_changed_experts_are_refused(name: str, made: Made, tmp_path: Path) -> None:
    if name == "math":
        save_tiny_gguf(made.root / "math.gguf", 9)
    else:
        file = made.root / name / ("adapter_model.safetensors" if name == "code" else "model.safetensors")
        save_file({key: value * 2 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"'{name}' are not those the router was trained with"):
        convert_checkpoint(made.checkpoint, tmp_path / "out", copy_all=True)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(made.checkpoint, tmp_path / "out", copy_all=True, verify_experts=False)
    found = forced(FusionRouteForCausalLM.from_pretrained(tmp_path / "out"))
    assert {other for other in NAMES if torch.allclose(found[other], made.logits[other], atol=1e-3)} == {*NAMES} - {
        name
    }


def test_the_command_accepts_changed_experts_and_says_which_file_is_broken(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made.root / "code" / "adapter_model.safetensors"
    save_file({key: value * 2 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    command = ["convert", str(made.checkpoint)]
    assert main([*command, str(tmp_path / "refused")]) == 1
    assert main([*command, str(tmp_path / "accepted"), "--no-verify-experts"]) == 0
    assert (tmp_path / "accepted" / "experts" / "code").is_dir()
    file.write_bytes(file.read_bytes()[:-8])
    capsys.readouterr()
    assert main([*command, str(tmp_path / "broken"), "--no-verify-experts"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # after progress bars
    assert error.startswith("fusionroute convert: expert 'code': broken safetensors: ")
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_when_it_fails(there: bool, made: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if there:
        output.mkdir()
    file = made.root / "code" / "adapter_model.safetensors"  # of the second one: the first is written by then
    save_file(dict(list(load_file(file).items())[1:]), file)
    before = snapshot(tmp_path)
    reports: list[Any] = []
    with pytest.raises(ValueError, match="expert 'code'.*missing keys"):
        convert_checkpoint(made.checkpoint, output, verify_experts=False, report=reports.append)
    assert [each.name for each in reports] == ["math"]
    assert snapshot(tmp_path) == before


def test_an_empty_output_is_filled(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_checkpoint(made.checkpoint, tmp_path / "out")
    check(tmp_path / "out", made.logits)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/fused", "{root}/chat"], "chat' is not empty: give another folder, or empty it"),
        (["{root}/fused", "{root}/math.gguf"], "math.gguf' is a file: give a folder"),
        (["{root}/fused", "{root}/out", "--expert", "maths"], "experts names ['maths']: the checkpoint's experts are"),
        (["{root}/fused", "{root}/out", "--expert-path", "math"], "expert-path='math': expected NAME=PATH"),
        (["{root}/fused", "{root}/out", "--expert-path", "maths=x"], "experts names ['maths']"),
        (["{root}/nowhere", "{root}/out"], "nowhere': no such folder"),
        (["{root}/code", "{root}/out"], "code': no config.json in it"),
        (["{root}/chat", "{root}/out"], "model_type 'qwen3' and 0 experts; give a FusionRoute checkpoint"),
        (["{root}/newer", "{root}/out"], "fusionroute_version is 99"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, original: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(original.root)
    capsys.readouterr()
    assert main(["convert", *(argument.format(root=original.root) for argument in arguments)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("fusionroute convert: ")
    assert message in error
    assert snapshot(original.root) == before


def test_a_missing_package_is_one_line(
    original: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    capsys.readouterr()
    assert main(["convert", str(original.checkpoint), str(tmp_path / "out")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "expert 'math': gguf_file='math.gguf' needs the package 'gguf'" in error
    assert snapshot(tmp_path) == set()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    assert "usage: fusionroute convert" in capsys.readouterr().out


def test_expert_and_all_exclude_each_other(original: Made, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(original.checkpoint), str(tmp_path / "out"), "--all", "--expert", "math"])
    assert stop.value.code == 2
    with pytest.raises(ValueError, match=r"experts is \['math'\] beside copy_all=True"):
        convert_checkpoint(original.checkpoint, tmp_path / "out", copy_all=True, experts=["math"])
