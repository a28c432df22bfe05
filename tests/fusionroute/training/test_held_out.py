"""Held-out rows: the trainers' own numbers, margins and matches against plain forwards and generate, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import numpy as np
import pytest
import torch
from fusionroute_saved import save_fused
from fusionroute_tiny import tiny_tokenizer

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.training import evaluate_pairs, evaluate_samples, tokenize_pairs, tokenize_samples
from ebpo_core.fusionroute.training.held_out import _answer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]

CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12 w13 w14"}]
ROWS: list[dict[str, Any]] = [
    *worker.sft_rows(5),
    {"messages": [*CHAT, {"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21"}]},
    {"conversations": [{"from": "human", "value": "w15"}, {"from": "gpt", "value": "w16 w17"}]},
    {"text": "w6 w7 w8 w9"},
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worker.save_fusion(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fused(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(("train_on", "max_length"), [("completion", None), ("completion", 6), ("all", 5)])
def test_the_losses_are_those_of_trainer_evaluate(start: Path, tmp_path: Path, train_on: Any, max_length: Any) -> None:
    settings = {"train_on": train_on, "max_length": max_length}
    trainer = worker.sft_trainer(worker.load(start), tmp_path, evaluation=ROWS, **settings)
    expected = trainer.evaluate()
    samples = tokenize_samples(ROWS, worker.TOKENIZER, **settings)
    found = evaluate_samples(worker.load(start), samples, max_length=max_length, batch_size=3)
    close: Any = {"rel": 1e-5}
    for name in ("loss", "loss_lm", "loss_routing"):
        assert found["training"][name] == pytest.approx(expected[f"eval_{name}"], **close)
    assert found["models"]["router"]["loss"] == pytest.approx(expected["eval_loss_lm"], **close)
    assert found["routing"]["accuracy"] == pytest.approx(expected["eval_routing/accuracy"])
    assert found["routing"]["informative"] == pytest.approx(expected["eval_routing/informative"])
    assert found["routing"]["usage"] == {
        name: pytest.approx(expected[f"eval_routing/usage/{name}"]) for name in ("one", "two")
    }
    assert 0 < found["routing"]["usage"]["one"] < 1, "both experts are selected"


def test_the_margins_are_those_of_the_cdpo_trainer(start: Path, tmp_path: Path) -> None:
    rows = worker.preference_rows(7)
    trainer = worker.cdpo_trainer(worker.load(start), tmp_path, evaluation=rows)
    reference = trainer.eval_dataset.reference.astype(np.float64)  # of the router itself, before training
    metrics = trainer.evaluate()
    found = evaluate_pairs(worker.load(start), tokenize_pairs(rows, worker.TOKENIZER), batch_size=3)
    margins = reference[:, 0] - reference[:, 1]
    assert found["pairs"] == 7
    assert found["models"]["router"]["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert found["models"]["router"]["accuracy"] == pytest.approx((margins > 0).mean())
    assert 0 < found["models"]["router"]["accuracy"] < 1
    bias = metrics["eval_cdpo/bias"] / (trainer.args.beta * trainer.fusion.config.alpha)
    assert found["selected"]["margin"] == pytest.approx(bias, rel=1e-4)
    usage = {name: pytest.approx(metrics[f"eval_routing/usage/{name}"]) for name in ("one", "two")}
    assert found["routing"]["usage"] == usage


def test_every_model_s_loss_is_its_own_forward_s(checkpoint: Path) -> None:
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    samples = tokenize_samples(ROWS, tiny_tokenizer())
    found = evaluate_samples(model, samples, batch_size=4, alpha=0.7)

    def loss(forward: Any) -> float:
        total = 0.0
        for i in range(len(samples)):
            ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in samples[i])
            with torch.no_grad():
                logprobs = forward(ids).logits.double().log_softmax(-1)
            total -= sum(float(logprobs[0, t, y]) for t, y in enumerate(labels[0, 1:].tolist()) if y != -100)
        return total / int(samples.label_counts.sum())

    models = found["models"]
    assert models["fusionroute"]["loss"] == pytest.approx(loss(lambda ids: model(ids, alpha=0.7)), rel=1e-5)
    assert models["router"]["loss"] == pytest.approx(loss(model.router), rel=1e-5)
    for expert in model.experts:
        assert models["experts"][expert.name]["loss"] == pytest.approx(loss(expert.model), rel=1e-5)
    assert models["router"]["perplexity"] == pytest.approx(math.exp(models["router"]["loss"]))


def written(model: Any, prompt: list[int], length: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=0)
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


def test_exact_match_is_that_of_greedy_decoding(checkpoint: Path) -> None:
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(9):
        prompt = [1, *rng.integers(6, 200, 4).tolist()]
        writer = (model, model.router, model.experts["math"].model)[i % 3]
        answer = written(writer, prompt, 5)
        if i >= 6:
            answer[-1] = 6 + (answer[-1] - 5) % 190  # another last token
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    rows.append({"input_ids": rows[0]["input_ids"], "labels": rows[0]["input_ids"]})  # learnt from its beginning
    samples = tokenize_samples(rows, None)
    found = evaluate_samples(model, samples)
    assert (found["rows"], found["answers"]) == (10, 9)

    def share(writer: Any) -> float:
        hits = [written(writer, r["input_ids"][:5], len(r["input_ids"]) - 5) == r["input_ids"][5:] for r in rows[:9]]
        return sum(hits) / 9

    models = found["models"]
    assert models["fusionroute"]["exact_match"] == share(model) >= 2 / 9
    assert models["router"]["exact_match"] == share(model.router) >= 2 / 9
    for name in model.experts.names:
        assert models["experts"][name]["exact_match"] == share(model.experts[name].model)
    assert evaluate_samples(model, samples, forced_expert="math")["routing"]["usage"] == {"math": 1.0, "code": 0.0}
    # A row that was cut may have lost the end of its answer.
    assert evaluate_samples(model, samples, max_length=10)["answers"] == 0


@pytest.mark.parametrize(
    ("labels", "start", "stop"),
    [([-100, -100, 7, 8], 2, 4), ([-100, 5, -100, 7, 8, -100], 3, 5), ([-100, 5], 1, 2), ([5, 6, 7], 0, 3)],
)
def test_the_answer_is_the_last_run_of_labels(labels: list[int], start: int, stop: int) -> None:
    assert _answer(np.array(labels)) == slice(start, stop)


def test_what_cannot_be_evaluated_is_named(start: Path) -> None:
    model = worker.load(start)
    samples = tokenize_samples(ROWS, worker.TOKENIZER)
    with pytest.raises(TypeError, match="'alhpa' is no option of routing"):
        evaluate_samples(model, samples, alhpa=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate_samples(model, samples, batch_size=0)
    with pytest.raises(ValueError, match="no experts are loaded"):
        evaluate_samples(worker.load(start, load_experts=False), samples)
    nothing = tokenize_samples(ROWS[:1], worker.TOKENIZER, max_length=2)
    with pytest.raises(ValueError, match="no row to evaluate"):
        evaluate_samples(model, nothing)


def jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_command_prints_tables_and_writes_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, pairs = jsonl(tmp_path / "rows.jsonl", ROWS), jsonl(tmp_path / "pairs.jsonl", worker.preference_rows(4))
    output = tmp_path / "made" / "results.json"
    command = ["eval", str(checkpoint), "--device", "cpu", "--data", data, "--preferences", pairs]
    assert main([*command, "--output", str(output), "--limit", "7", "--alpha", "0.5"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "SFT rows",
        "preference rows",
        "router alone",
        "math alone",
        "code alone",
        "selected experts",
        "usage",
    ):
        assert words in printed
    results = json.loads(output.read_text())
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    expected = evaluate_samples(model, tokenize_samples(ROWS[:7], tiny_tokenizer()), alpha=0.5)
    assert results["samples"] == {**expected, "truncated": 0, "dropped": 0}
    assert results["preferences"]["pairs"] == 4
    assert f"{expected['models']['fusionroute']['loss']:.4f}" in printed


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "give either --tasks, or --data"),
        (["--tasks", "x", "--data", "rows.jsonl"], 2, "give either --tasks, or --data"),
        (["--data", "rows.jsonl", "--num-fewshot", "3"], 2, "--num-fewshot goes with --tasks"),
        (["--tasks", "x", "--train-on", "all"], 2, "--train-on goes with --data"),
        (["--data", "rows.jsonl", "--batch-size", "auto"], 1, "batch-size='auto'"),
        (["--data", "rows.jsonl", "--limit", "0.5"], 1, "limit=0.5"),
        (["--preferences", "rows.jsonl", "--train-on", "all"], 1, "train-on='all'"),
        (["--data", "rows.jsonl", "--chat-template-kwargs", "[1]"], 1, "expected a JSON object"),
        (["--data", "gone.jsonl"], 1, "gone.jsonl"),
        (["--data", "rows.jsonl"], 1, "row 0: columns"),
    ],
)
def test_the_command_refuses_what_does_not_fit(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", [{"question": "w6"}])
    if status == 2:
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(checkpoint), *flags])
        assert stop.value.code == 2
    else:
        assert main(["eval", str(checkpoint), *flags]) == 1
    assert message in capsys.readouterr().err
