"""Odd but possible input of ``compile``: what is refused, by which name, and what a killed run leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusionroute_tiny import save_tiny, tiny_model, tiny_tokenizer

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute import compile as compile_experts
from ebpo_core.fusionroute.cli.options import number_or_named
from ebpo_core.fusionroute.compiled import compilation
from ebpo_core.fusionroute.compiled.distillation import Batch, read_batch
from ebpo_core.fusionroute.compiled.report import _fused
from ebpo_core.fusionroute.decoding.routing import RoutingOptions
from ebpo_core.fusionroute.training.data import tokenize_samples

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "layers": 1}
SHORT: dict[str, Any] = {"rank": 4, "steps": 4, "batch_size": 8, "save_steps": 2}


def rows(count: int = 60) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    texts = [[f"w{n}" for n in rng.integers(6, 32, 10)] for _ in range(count)]
    return [{"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])} for words in texts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("uncompiled"), tiny_tokenizer(32)
    names = {"math": 1, "code": 2}
    experts = {name: save_tiny(folder / name, "llama", n, tokenizer=tokenizer, **SIZES) for name, n in names.items()}
    model = FusionRouteForCausalLM.from_experts(tiny_model("qwen2", 0, **SIZES), experts, tokenizer=tokenizer)
    with torch.no_grad():
        model.route_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def test_a_bad_row_is_named_by_its_place_in_the_data(checkpoint: Path, tmp_path: Path) -> None:
    data: list[Any] = rows(30)
    data[21] = {"prompt": "w7"}
    with pytest.raises(ValueError, match="data: row 21: columns"):
        compile_experts(checkpoint, tmp_path / "out", data, **SHORT)
    with pytest.raises(TypeError, match="data: row 0 is 'r', a str: give rows as mappings"):
        compile_experts(checkpoint, tmp_path / "out", "rows.jsonl", **SHORT)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_rows_beyond_a_table_of_positions_are_found_first(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    expert = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    tokenizer = tiny_tokenizer(32)
    expert.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("llama", 0, **SIZES), {"math": tmp_path / "gpt2"}, tokenizer=tokenizer
    )
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="holds no tokenizer: save the router's into it"):
        compile_experts(tmp_path / "checkpoint", tmp_path / "out", rows(), **SHORT)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    long = [{"prompt": "w7", "completion": " w8" * 20}]
    for part in ({"data": [*rows(), *long]}, {"data": rows(), "eval_data": long}):
        with pytest.raises(
            ValueError, match=r"data: a sequence has 23 tokens, and expert 'math' is a GPT2.*max_length=16"
        ):
            compile_experts(tmp_path / "checkpoint", tmp_path / "out", **part, **SHORT)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_cut_and_rows_beyond_a_context_are_told(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in training: nothing is left out in silence."""
    dropped = {"prompt": "w7 w8 w9 w10 w11 w12 w13 w14", "completion": " w8"}
    compile_experts(checkpoint, tmp_path / "cut", [*rows(), dropped], max_length=8, **SHORT)
    message = "data: 61 sequences were cut to max_length=8, 1 rows had nothing to learn left and were dropped"
    assert [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()] == [message]
    caplog.clear()
    long = [{"prompt": "w7", "completion": " w8" * 520}]
    compile_experts(checkpoint, tmp_path / "long", rows(2), eval_data=long, **SHORT)
    assert (
        "eval_data: a sequence has 523 tokens, and the shortest context among router and experts is 512" in caplog.text
    )
    assert " data: a sequence" not in caplog.text


def test_a_loss_that_is_not_finite_ends_the_run(checkpoint: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "learning_rate": 1e30}
    with pytest.raises(FloatingPointError, match=r"expert 'math', step \d: .*lower learning_rate \(it is 1e\+30\)"):
        compile_experts(checkpoint, tmp_path / "out", rows(), **settings)
    assert not (tmp_path / "out/compiled/math/adapter_model.safetensors").exists()


def kill_before_the_report(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compilation, "compare", killed)
    with pytest.raises(KeyboardInterrupt):
        compile_experts(checkpoint, out, rows(), **SHORT)
    monkeypatch.undo()


def test_what_a_kill_leaves_in_between_is_cleared(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the state is there, in the middle of a file, and between an adapter and the removal of its state."""
    out = tmp_path / "out"
    (out / "compiled").mkdir(parents=True)
    (out / "compiled/.compiling.json.0123abcd").write_text("{")
    kill_before_the_report(checkpoint, out, monkeypatch)
    (out / "compiled/math.state.safetensors").write_bytes(b"of its last step")
    (out / "compiled/code/.adapter_model.safetensors.0123abcd").write_bytes(b"half")
    compile_experts(checkpoint, out, rows(), **SHORT)
    names = {file.relative_to(out / "compiled").as_posix() for file in (out / "compiled").rglob("*") if file.is_file()}
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert names == {"report.json", *(f"{name}/{file}" for name in ("math", "code") for file in files)}


def changed_config(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_killed_run_does_not_go_on_with_another_routing_or_teacher(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    kill_before_the_report(checkpoint, out, monkeypatch)
    other = changed_config(checkpoint, tmp_path / "other", hysteresis=2.0)
    paths = {"math": str(checkpoint.parent / "math"), "code": str(checkpoint.parent / "code")}
    with pytest.raises(ValueError, match=r"killed, and this one differs in hysteresis \(0.0, now 2.0\): start it as"):
        compile_experts(other, out, rows(), expert_paths=paths, **SHORT)
    with pytest.raises(ValueError, match=r"differs in experts, rank \(4, now 5\), alpha \(8.0, now 10.0\): start"):
        compile_experts(checkpoint, out, rows(), expert_paths={"math": {"dtype": "bfloat16"}}, **{**SHORT, "rank": 5})
    compile_experts(checkpoint, out, rows(), **SHORT)


def test_a_broken_state_is_named_with_the_remedy(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError):
        compile_experts(checkpoint, out, rows(), **{**SHORT, "alpha": 1e30})
    state = out / "compiled/math.state.safetensors"
    state.write_bytes(b"broken")
    monkeypatch.setattr(compilation.Distiller, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"math.state.safetensors' is no state of a training .*: remove it, then"):
        compile_experts(checkpoint, out, rows(), **{**SHORT, "alpha": 1e30})


@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_an_expert_whose_logits_are_no_numbers_is_named(tmp_path: Path, where: str) -> None:
    """In training, and on held-out rows alone, whose report would hold what JSON cannot."""
    tokenizer = tiny_tokenizer(32)
    expert = tiny_model("llama", 1, **SIZES)
    with torch.no_grad():
        expert.get_input_embeddings().weight[7] = torch.nan
    expert.save_pretrained(tmp_path / "math")
    tokenizer.save_pretrained(tmp_path / "math")
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("qwen2", 0, **SIZES), {"math": tmp_path / "math"}, tokenizer=tokenizer
    )
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    parts = {"data": [{"prompt": "w8", "completion": " w9"}] * 4, "eval_data": [{"prompt": "w8", "completion": " w10"}]}
    parts[where] = [{"prompt": "w7", "completion": " w9"}] * 4
    message = "step 0: its own logits" if where == "data" else "its own logits on held-out rows"
    with pytest.raises(FloatingPointError, match=f"expert 'math'.*{message} are no numbers: give it a wider dtype"):
        compile_experts(tmp_path / "checkpoint", tmp_path / "out", **parts, **SHORT)


def test_experts_are_counted_as_decoding_selects_them(checkpoint: Path) -> None:
    """With hysteresis too; a draw of routes counts as its likeliest."""
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    sequences = tokenize_samples(rows(8), tiny_tokenizer(32))
    found = []
    for hysteresis in (0.0, 2.0):
        model.config.hysteresis, model.config.route = hysteresis, "sample"
        batch = read_batch(model, sequences, list(range(8)))
        with torch.no_grad():
            out = model(input_ids=batch.ids, attention_mask=batch.mask, route="argmax")
        assert torch.equal(batch.selected[batch.labelled], out.expert_ids[:, -batch.keep : -1][batch.labelled])
        found.append(batch.selected)
    assert not torch.equal(*found)


def test_alpha_of_zero_leaves_nothing_to_lose(tmp_path: Path) -> None:
    """The router alone, also where an expert gives a token minus infinity."""
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(1, 2, 7, generator=generator)
    targets, students = torch.randn(2, 1, 1, 2, 7, generator=generator)
    targets[..., 3] = -torch.inf
    labels = torch.ones(1, 2, dtype=torch.int64)
    batch: Any = Batch(labels, labels, labels, torch.zeros_like(labels), router, None, 3)  # type: ignore[arg-type]
    kl, same, *_ = _fused(batch, targets, students, RoutingOptions(alpha=0.0)).tolist()
    assert (kl, same) == (0, 2)
    assert _fused(batch, targets, students, RoutingOptions()).isfinite().all()


def test_an_expert_that_is_named_like_a_file_of_the_format_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(32)
    expert = save_tiny(tmp_path / "expert", "llama", 1, tokenizer=tokenizer, **SIZES)
    model = FusionRouteForCausalLM.from_experts(
        tiny_model("llama", 0, **SIZES), {"report.json": expert}, tokenizer=tokenizer
    )
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"expert 'report.json': a file of compiled checkpoints has this name"):
        compile_experts(tmp_path / "checkpoint", tmp_path / "out", rows(), **SHORT)


def test_each_expert_has_its_own_number_of_steps(checkpoint: Path, tmp_path: Path) -> None:
    """The bits of a run with that number for all, and a report that tells."""
    short = {**SHORT, "rank": 2, "batch_size": 4}
    report = compile_experts(checkpoint, tmp_path / "own", rows(), **{**short, "steps": {"code": 3, "math": 1}})
    assert report["settings"]["steps"] == {"code": 3, "math": 1}
    for name, steps in (("math", 1), ("code", 3)):
        compile_experts(checkpoint, tmp_path / name, rows(), **{**short, "steps": steps})
        file = f"compiled/{name}/adapter_model.safetensors"
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"math": 3}, r"steps names \['math'\], the experts are \['math', 'code'\]: give one number, or one for each"),
        ({"math": 3, "code": 3, "x": 3}, r"steps names \['math', 'code', 'x'\]"),
        ({}, r"steps names \[\]"),
        ({"math": 3, "code": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"math": True, "code": 2}, r"steps=True: expected a whole number"),
    ],
)
def test_steps_of_other_experts_are_refused(checkpoint: Path, tmp_path: Path, steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_experts(checkpoint, tmp_path / "out", rows(), **{**SHORT, "steps": steps})
    assert not (tmp_path / "out").exists()


def test_the_command_reads_one_number_or_named_ones() -> None:
    assert number_or_named("steps", ["40"]) == 40
    assert number_or_named("steps", ["a=1", "b=c=2"]) == {"a": 1, "b=c": 2}
    for items in (["x"], ["4", "5"], ["a=1", "5"], ["=4"], ["a=-1"], ["a="], ["1.5"]):
        with pytest.raises(ValueError, match=r"steps='.*': expected one number, or NAME=N for each"):
            number_or_named("steps", items)
    with pytest.raises(ValueError, match=r"steps='a=2': 'a' is there twice"):
        number_or_named("steps", ["a=1", "a=2"])
