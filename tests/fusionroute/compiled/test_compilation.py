"""``compile``: deterministic, resumable, refusing what does not fit, and better than no adapter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from console_scripts import run_script
from fusionroute_tiny import save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute import compile as compile_experts
from ebpo_core.fusionroute.compiled.distillation import (
    Distillation,
    Distiller,
    batches_from,
    divergence,
    rate,
    selecting,
)
from ebpo_core.fusionroute.training.data import tokenize_samples

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "layers": 1}


def rows(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)

    def words(length: int) -> str:
        return " ".join(f"w{n}" for n in rng.integers(6, 32, length))

    return [{"prompt": words(4), "completion": " " + words(6)} for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 router over a Llama and a Gemma 2."""
    folder = tmp_path_factory.mktemp("uncompiled")
    tokenizer = tiny_tokenizer(32)
    experts = {
        "math": save_tiny(folder / "math", "llama", 1, tokenizer=tokenizer, **SIZES),
        "code": save_tiny(folder / "code", "gemma2", 2, tokenizer=tokenizer, **SIZES),
    }
    router = tiny_model("qwen2", 0, **SIZES)
    model = FusionRouteForCausalLM.from_experts(router, experts, tokenizer=tokenizer)
    with torch.no_grad():
        model.route_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


SHORT: dict[str, Any] = {"rank": 4, "steps": 6, "batch_size": 8, "save_steps": 2}


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / "compiled" / name / "adapter_model.safetensors") for name in ("math", "code")}


def equal(one: Path, other: Path) -> bool:
    found, expected = adapters(one), adapters(other)
    return all(
        torch.equal(found[name][key], value) for name, tensors in expected.items() for key, value in tensors.items()
    )


def test_a_compiled_checkpoint_comes_nearer_with_training(checkpoint: Path, tmp_path: Path) -> None:
    reports = [
        compile_experts(checkpoint, tmp_path / str(steps), rows(200), rank=8, steps=steps, batch_size=16)
        for steps in (1, 150)
    ]
    for name in ("math", "code"):
        first, last = (report["experts"][name] for report in reports)
        assert last["kl"] < 0.5 * first["kl"]
        assert last["share"] == first["share"]
    assert reports[1]["fused"]["kl"] < reports[0]["fused"]["kl"]
    assert sum(expert["share"] for expert in reports[0]["experts"].values()) == pytest.approx(1)
    assert reports[0]["rows"] == 10  # every 20th
    assert json.loads((tmp_path / "150/compiled/report.json").read_text())["fused"] == reports[1]["fused"]
    card = (tmp_path / "150/README.md").read_text()
    assert f"| fused | | {reports[1]['fused']['kl']:.4f} |" in card
    model = FusionRouteForCausalLM.from_pretrained(tmp_path / "150")
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/compiled/report.json").read_bytes() == (tmp_path / "150/compiled/report.json").read_bytes()
    assert card.partition("## Compiled")[2] in (tmp_path / "copy/README.md").read_text()
    assert model.config.compiled["rank"] == 8
    assert not list((tmp_path / "150/compiled").glob("*.state*"))
    assert not (tmp_path / "150/compiled/compiling.json").exists()
    again = FusionRouteForCausalLM.from_pretrained(tmp_path / "150", compiled=False)
    assert [type(expert.model).__name__ for expert in again.experts] == ["LlamaForCausalLM", "Gemma2ForCausalLM"]


def test_the_same_seed_gives_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)  # which must not matter
        compile_experts(checkpoint, tmp_path / name, rows(), seed=seed, **SHORT)
    assert equal(tmp_path / "a", tmp_path / "b")
    assert not equal(tmp_path / "a", tmp_path / "c")


_KILLED = """
import json, sys
from ebpo_core.fusionroute.compiled import compilation, distillation
calls = 0
one = distillation.Distiller._one
def counted(self, batch):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        print("here", flush=True)
        import time; time.sleep(60)
    return one(self, batch)
distillation.Distiller._one = counted
compilation.compile(sys.argv[1], sys.argv[2], json.loads(open(sys.argv[3]).read()), **json.loads(sys.argv[5]))
"""


def test_a_killed_run_goes_on_to_the_same_bits(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows()))
    compile_experts(checkpoint, tmp_path / "whole", rows(), **SHORT)
    # Killed in the second expert's fourth step, after its state of two steps was written.
    command = [sys.executable, "-c", _KILLED, checkpoint, tmp_path / "killed", data, "10", json.dumps(SHORT)]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "here"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed/config.json").exists()
    finished = tmp_path / "killed/compiled/math/adapter_model.safetensors"
    written = finished.stat().st_mtime_ns
    assert (tmp_path / "killed/compiled/code.state.safetensors").is_file()
    steps = []
    one = Distiller._one
    monkeypatch.setattr(Distiller, "_one", lambda self, batch: (steps.append(self.step), one(self, batch)))
    with pytest.raises(ValueError, match=r"differs in rank \(4, now 8\), alpha \(8.0, now 16.0\)"):
        compile_experts(checkpoint, tmp_path / "killed", rows(), **{**SHORT, "rank": 8})
    with pytest.raises(ValueError, match="differs in data"):
        compile_experts(checkpoint, tmp_path / "killed", rows(seed=1), **SHORT)
    assert steps == []
    compile_experts(checkpoint, tmp_path / "killed", rows(), **SHORT)
    assert steps == [2, 3, 4, 5]
    assert finished.stat().st_mtime_ns == written
    assert equal(tmp_path / "killed", tmp_path / "whole")
    with pytest.raises(FileExistsError, match="is not empty"):
        compile_experts(checkpoint, tmp_path / "killed", rows(), **SHORT)


def test_positions_of_other_experts_weigh_as_asked(checkpoint: Path) -> None:
    """With weight 0 a row's positions of another expert pull at nothing."""
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    sequences = tokenize_samples(rows(30), tiny_tokenizer(32))
    settings = Distillation(rank=2, steps=2, batch_size=30, other_weight=0.0)
    selects = selecting(model, sequences)
    assert 0 < selects[:, 0].mean() <= 1
    drawn = next(batches_from(selects[:, 0], settings, 0))
    assert selects[drawn, 0].all()


def test_batches_depend_on_seed_and_step_alone() -> None:
    selects = np.arange(20) < 10
    settings = Distillation(batch_size=4, other_weight=0.2)
    whole = batches_from(selects, settings, 0)
    first = [next(whole) for _ in range(9)]
    assert [next(batches_from(selects, settings, step)) for step in range(9)] == first
    passed = [row for batch in first[:3] for row in batch]  # ten rows of its own and two of ten others
    assert sorted(row for row in passed if row < 10) == list(range(10))
    assert sum(row >= 10 for row in passed) == 2
    assert len(next(batches_from(np.zeros(5, dtype=bool), Distillation(other_weight=0.0), 0))) == 5


def test_divergence_is_kl_and_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    logs = q.log_softmax(-1), p.log_softmax(-1)
    expected = torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergence(p, q), expected)
    p[:, 2] = -torch.inf  # a token that the teacher cannot write
    q.requires_grad_()
    kl = divergence(p, q)
    kl.sum().backward()
    assert bool(kl.isfinite().all())
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 3)
    assert max(rates) == rates[3] == 1
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.03
    assert rate(0, 1) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0: expected a whole number"),
        ({"steps": True}, "steps=True: expected"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: expected a positive number"),
        ({"alpha": -1.0}, "alpha=-1.0: expected a positive number"),
        ({"other_weight": 2.0}, "other_weight=2.0: expected 0 to 1"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"seed": 2**62}, "below 2"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3': expected a number"),
        ({"alpha": "x"}, "alpha='x': expected a number"),
        ({"other_weight": None}, "other_weight=None: expected a number"),
        ({"save_steps": 0}, "save_steps=0: expected"),
        ({"save_steps": 2.5}, "save_steps=2.5: expected"),
        ({"train_on": "answers"}, "train_on='answers': expected 'completion' or 'all'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not in this machine .*: name one that it has, such as cpu"),
        ({"max_length": 4}, "data has no row with a label .60 lost theirs to max_length"),
        ({"eval_data": []}, "eval_data has no row with a label"),
        ({"eval_data": [{"prompt": "w7"}]}, "eval_data: row 0: columns"),
    ],
)
def test_settings_that_do_not_fit_leave_nothing(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compile_experts(checkpoint, tmp_path / "out", rows(), **{**SHORT, **changes})
    assert not (tmp_path / "out").exists()


def test_too_few_rows_and_missing_peft(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="data has one row with a label, which is held out.*eval_data"):
        compile_experts(checkpoint, tmp_path / "out", rows(1), **SHORT)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"'peft', which is missing: pip install \"ebpo-core\[fusionroute\]\""):
        compile_experts(checkpoint, tmp_path / "out", rows(), **SHORT)
    assert not (tmp_path / "out").exists()


def test_the_command_compiles_and_shows(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    done = run_script(
        "fusionroute",
        "compile",
        checkpoint,
        "out",
        "--data",
        data,
        "--rank",
        4,
        "--steps",
        3,
        "--batch-size",
        8,
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 4, 3 held-out rows" in done.stdout
    assert "Expert math 3/3" in done.stdout
    assert done.stdout.strip().endswith("out")
    answered = run_script("fusionroute", "generate", "out", "--prompt", "w7 w8", "--max-new-tokens", 4, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    shown = run_script("fusionroute", "show", "out", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "compiled, rank 4" in shown.stdout
