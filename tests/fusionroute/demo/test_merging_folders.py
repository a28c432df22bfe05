"""Merging of model folders: equal to merging whole state dicts, one tensor at a time, refused by name."""

from __future__ import annotations

import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from fusionroute_tiny import save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ebpo_core.fusionroute.baselines import dare, merge_folders, task_arithmetic, ties
from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.experts.files import INDEX, WEIGHTS, weight_files

METHODS: dict[str, Any] = {
    "task arithmetic": partial(task_arithmetic, weights=[0.3, 0.6]),
    "dare": partial(dare, weights=0.5, drop=0.4, seed=3),
    "ties": partial(ties, weights=[1.0, 2.0], density=0.3),
}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in weight_files(folder).values() for name, value in load_file(file).items()}


def three(root: Path, *shards: str, **settings: Any) -> list[Path]:
    """A base and two others, with shards of these sizes."""
    return [save_tiny(root / str(n), "llama", n, max_shard_size=size, **settings) for n, size in enumerate(shards)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tie", [False, True])
def test_shards_merge_as_single_files_and_state_dicts_do(tmp_path: Path, name: str, tie: bool) -> None:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "tie_word_embeddings": tie}
    base, one, two = three(tmp_path / "sharded", "60KB", "100KB", "5GB", **settings)
    alone = three(tmp_path / "single", "5GB", "5GB", "5GB", **settings)
    assert len(weight_files(base)) > len(weight_files(one)) > len(weight_files(two)) == 1
    merged = merge_folders(base, [one, two], tmp_path / "merged", METHODS[name])
    single = merge_folders(alone[0], alone[1:], tmp_path / "of-single", METHODS[name])
    expected = METHODS[name](state(base), [state(one), state(two)])
    for folder, files in ((merged, list(weight_files(base))), (single, [WEIGHTS])):
        assert list(weight_files(folder)) == files
        found = state(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert ("lm_head.weight" in expected) != tie
    assert json.loads((merged / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    assert not any(torch.equal(expected[key], state(base)[key]) for key in expected if "proj" in key)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert (merged / "tokenizer.json").is_file()


def test_one_tensor_of_each_model_is_in_memory_at_a_time(tmp_path: Path) -> None:
    base, one, two = three(tmp_path, "60KB", "60KB", "60KB")
    alive: list[weakref.ref[torch.Tensor]] = []
    calls = 0

    def method(start: Any, tuned: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        assert [len(each) for each in (start, *tuned)] == [1, 1, 1]
        assert not any(reference() is not None for reference in alive), "tensors of an earlier call"
        alive[:] = [weakref.ref(tensor) for each in (start, *tuned) for tensor in each.values()]
        return task_arithmetic(start, tuned)

    merge_folders(base, [one, two], tmp_path / "merged", method)
    assert calls == len(state(base))


def changed(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    tensors = state(folder)
    change(tensors)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def retyped(tensors: Any) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def reshaped(tensors: Any) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"other' lacks 'model.norm.weight', which .*/0' has \(1 names differ"),
        (lambda t: t.update(extra=torch.ones(2)), r"/0' lacks 'extra', which .*other' has"),
        (retyped, r"other': 'model.norm.weight' has dtype F16, and in the base .* F32: save them in one dtype"),
        (reshaped, r"other': 'model.norm.weight' has shape \(63,\), and in the base .* \(64,\)"),
    ],
)
def test_what_differs_is_named_before_anything_is_merged(tmp_path: Path, change: Any, message: str) -> None:
    base, one = three(tmp_path, "60KB", "5GB")
    other = changed(one, tmp_path / "other", change)

    def method(*_: Any) -> dict[str, torch.Tensor]:
        raise AssertionError("merged")

    with pytest.raises(ValueError, match=message):
        merge_folders(base, [one, other], tmp_path / "merged", method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "other"]


def test_tied_and_untied_embeddings_are_named(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    untied = save_tiny(tmp_path / "untied", "llama")
    for base, other in ((tied, untied), (untied, tied)):
        with pytest.raises(
            ValueError, match=r"lacks 'lm_head.weight'.*tied' ties its embeddings and the other does not"
        ):
            merge_folders(base, [other], tmp_path / "merged")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    base, one = three(tmp_path, "60KB", "60KB")
    with pytest.raises(ValueError, match="density=2"):
        merge_folders(base, [one], tmp_path / "merged", partial(ties, density=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    with pytest.raises(ValueError, match=r"tuned=\[\]"):
        merge_folders(base, [], tmp_path / "merged")
    with pytest.raises(FileExistsError, match="not empty"):
        merge_folders(base, [one], base)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        merge_folders(base, [tmp_path / "gone"], tmp_path / "merged")
    shard = next(iter(weight_files(one).values()))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        merge_folders(base, [one], tmp_path / "merged")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="lacks"):
        merge_folders(base, [one], tmp_path / "merged")


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], partial(task_arithmetic, weights=0.5)),
        (["--weights", "0.2", "0.7"], partial(task_arithmetic, weights=[0.2, 0.7])),
        (["--method", "dare", "--drop", "0.3", "--seed", "4"], partial(dare, weights=0.5, drop=0.3, seed=4)),
        (["--method", "ties", "--weights", "1", "--density", "0.5"], partial(ties, weights=1.0, density=0.5)),
    ],
)
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], method: Any) -> None:
    base, one, two = three(tmp_path, "60KB", "5GB", "100KB")
    output = tmp_path / "merged"
    assert main(["merge", str(output), "--base", str(base), "--tuned", str(one), str(two), *flags]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    expected = method(state(base), [state(one), state(two)])
    found = state(output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--density", "0.5"], "--density goes with --method ties"),
        (["--method", "ties", "--drop", "0.5"], "--drop goes with --method dare"),
        (["--method", "dare"], "--method dare needs --drop"),
    ],
)
def test_the_command_refuses_settings_of_another_method(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["merge", "out", "--base", "b", "--tuned", "t", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_numbers_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, one = three(tmp_path, "60KB", "60KB")
    capsys.readouterr()
    command = ["merge", str(tmp_path / "merged"), "--base", str(base), "--tuned", str(one)]
    assert main([*command, "--weights", "1", "2"]) == 1
    assert main([*command, "--method", "dare", "--drop", "1"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "one for each of 1 models" in first
    assert "drop=1.0" in second
