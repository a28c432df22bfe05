"""FusionRoute in the lm-evaluation-harness: by object, by path and by name, on a task of a few lines from a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import torch
from fusionroute_saved import DOCUMENTS, save_fused, save_tasks
from fusionroute_tiny import tiny_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.evaluation import FusionRouteLM, evaluate, write_results

pytestmark = pytest.mark.slow

TASKS = ["tiny_answers", "tiny_choices"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fused(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Every second answer is what the model writes: exact match is a half."""
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(checkpoint), tiny_tokenizer()
    right = [written(model, tokenizer, str(document["question"])) for document in DOCUMENTS]
    answers = [answer if index % 2 == 0 else "w5" for index, answer in enumerate(right)]
    return save_tasks(tmp_path_factory.mktemp("tasks"), answers)


def written(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**encoded, max_new_tokens=6, do_sample=False, **options)
    return str(tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def log_likelihood(model: Any, tokenizer: Any, prompt: str, choice: str, **options: Any) -> float:
    """log of the policy's probability of a choice, straight from the model's logits."""
    context = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
    with torch.no_grad():
        logs = model(ids, **options).logits.log_softmax(-1)[0, :-1]
    return float(logs.gather(-1, ids[0, 1:, None])[len(context) - 1 :].sum())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.25}, {"forced_expert": "code"}, {"complementary": False}])
def test_the_harness_scores_what_the_model_says(checkpoint: Path, tasks: Path, options: dict[str, Any]) -> None:
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(checkpoint), tiny_tokenizer()
    results = evaluate(model, TASKS, tokenizer=tokenizer, include_path=tasks, batch_size=4, log_samples=True, **options)
    assert results["config"]["fusionroute_options"] == options
    right = 0
    for sample in results["samples"]["tiny_choices"]:
        document = sample["doc"]
        expected = [
            log_likelihood(model, tokenizer, document["question"], choice, **options) for choice in document["choices"]
        ]
        assert [float(response[0]) for response in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == document["label"]
    assert results["results"]["tiny_choices"]["acc,none"] == right / len(DOCUMENTS)
    for sample in results["samples"]["tiny_answers"]:
        assert sample["resps"][0][0].strip() == written(model, tokenizer, sample["doc"]["question"], **options).strip()
    if not options:
        assert results["results"]["tiny_answers"]["exact_match,none"] == 0.5


def test_path_object_and_name_give_the_same(checkpoint: Path, tasks: Path) -> None:
    by_path = evaluate(checkpoint, TASKS, include_path=tasks, device="cpu", alpha=0.5)
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    by_object = evaluate(model, TASKS, tokenizer=tiny_tokenizer(), include_path=str(tasks), batch_size=2, alpha=0.5)
    by_name = simple_evaluate(
        "fusionroute",
        model_args=f"pretrained={checkpoint},alpha=0.5",
        tasks=TASKS,
        batch_size=3,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    assert by_path["results"] == by_object["results"] == by_name["results"]
    assert by_path["n-samples"]["tiny_choices"] == {"original": 6, "effective": 6}
    assert "samples" not in by_path
    assert set(by_path["config"]["fusionroute_experts"]) == {"math", "code"}
    limited = evaluate(model, "tiny_choices", tokenizer=tiny_tokenizer(), include_path=tasks, limit=2)
    assert limited["n-samples"]["tiny_choices"]["effective"] == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_without_the_experts_weight_the_harness_says_of_the_model_what_it_says_of_its_router(
    checkpoint: Path, batch_size: int
) -> None:
    """All three requests of the harness, its own class for the router and ours with ``alpha=0``."""
    shared: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "device": "cpu", "batch_size": batch_size}
    fused = FusionRouteLM(str(checkpoint), alpha=0.0, dtype="float32", **shared)
    router = HFLM(str(checkpoint.parent / "router"), backend="causal", dtype="float32", **shared)
    assert fused.max_length == router.max_length
    prompts = [str(document["question"]) for document in DOCUMENTS] + ["w8", "w9 " * 60, "w11 " * 700]
    generation = {"until": ["w7"], "max_gen_toks": 12, "do_sample": False}
    requests: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(prompt, f" w{20 + index} w7 w9") for index, prompt in enumerate(prompts)],
        "loglikelihood_rolling": [(prompt,) for prompt in prompts],
        "generate_until": [(prompt, generation) for prompt in prompts],
    }
    for kind, arguments in requests.items():
        found, expected = (
            getattr(lm, kind)([Instance(kind, {}, one, index) for index, one in enumerate(arguments)])
            for lm in (fused, router)
        )
        if kind == "generate_until":
            assert found == expected
            assert any(found)
        elif kind == "loglikelihood":
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        else:
            assert found == pytest.approx(expected, abs=1e-3)


def test_an_expert_alone_is_evaluated_without_options(checkpoint: Path, tasks: Path) -> None:
    folder = checkpoint.parent / "math"
    expert = AutoModelForCausalLM.from_pretrained(folder)
    results = evaluate(folder, ["tiny_choices"], include_path=tasks, device="cpu", log_samples=True)
    sample = results["samples"]["tiny_choices"][0]
    expected = [
        log_likelihood(expert, tiny_tokenizer(), sample["doc"]["question"], choice)
        for choice in sample["doc"]["choices"]
    ]
    assert [float(response[0]) for response in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
    assert "fusionroute_experts" not in results["config"]
    with pytest.raises(ValueError, match="alpha: FusionRoute's options, and this is a LlamaForCausalLM"):
        evaluate(folder, ["tiny_choices"], include_path=tasks, device="cpu", alpha=0.5)


def test_results_are_written_as_json(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    results = evaluate(checkpoint, ["tiny_choices"], include_path=tasks, device="cpu", limit=3, log_samples=True)
    content = json.loads(write_results(tmp_path / "a" / "results.json", results).read_text(encoding="utf-8"))
    assert content["results"]["tiny_choices"]["acc,none"] == results["results"]["tiny_choices"]["acc,none"]
    assert content["config"]["model_dtype"] == "torch.float32"
    assert len(content["samples"]["tiny_choices"]) == 3


def test_generation_options_override_the_task_s(checkpoint: Path, tasks: Path) -> None:
    results = evaluate(
        checkpoint,
        ["tiny_answers"],
        include_path=tasks,
        device="cpu",
        generation_kwargs={"max_gen_toks": 2},
        log_samples=True,
    )
    answers = [sample["resps"][0][0] for sample in results["samples"]["tiny_answers"]]
    assert max(len(answer.split()) for answer in answers) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": []}, ValueError, "at least one name"),
        ({"include_path": "nowhere"}, FileNotFoundError, "include_path='nowhere'"),
        ({"alhpa": 1.0}, TypeError, "alhpa: no such option; choose among alpha"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"forced_expert": "maths"}, ValueError, "forced_expert names 'maths'"),
        ({"allowed_experts": "math:cod"}, ValueError, "allowed_experts names 'cod'"),
    ],
)
def test_wrong_input_is_named(
    changes: dict[str, Any], error: type[Exception], message: str, checkpoint: Path, tasks: Path
) -> None:
    arguments = {"tasks": ["tiny_choices"], "include_path": tasks, "device": "cpu", **changes}
    with pytest.raises(error, match=message):
        evaluate(checkpoint, **arguments)


def test_a_list_of_experts_is_written_with_colons(checkpoint: Path) -> None:
    lm = FusionRouteLM.create_from_arg_string(f"pretrained={checkpoint},allowed_experts=code:math", {"device": "cpu"})
    assert lm.routing == {"allowed_experts": ["code", "math"]}
    assert lm.model.dtype == torch.float32


def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "math")
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        FusionRouteLM(tmp_path, device="cpu")


def test_the_harness_s_own_command_knows_the_name_and_unknown_tasks_are_named(checkpoint: Path, tasks: Path) -> None:
    """Both read the harness's whole index, once each."""
    with pytest.raises(ValueError, match=r"tasks=\['tiny_choice'\]"):
        evaluate(checkpoint, ["tiny_choice", "tiny_choices"], include_path=tasks, device="cpu")
    command = [sys.executable, "-m", "ebpo_core.fusionroute.evaluation", "run", "--model", "fusionroute"]
    command += ["--model_args", f"pretrained={checkpoint}", "--tasks", "tiny_choices"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--limit", "2"]
    # Not at the root of the repository, whose folder `kernels` would hide Hugging Face's package of that name.
    done = subprocess.run(command, cwd=tasks, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choices" in done.stdout
    assert "fusionroute" in done.stdout
