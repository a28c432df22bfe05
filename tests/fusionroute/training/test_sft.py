"""``FusionRouteSFTTrainer`` on tiny models: its loss against the twin, what trains, what it logs, saves and refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import numpy as np
import pytest
import torch
from datasets import Dataset
from fusionroute_worker import after, same, twin

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.training import reference
from ebpo_core.fusionroute.training.config import FusionRouteCDPOConfig, FusionRouteSFTConfig
from ebpo_core.fusionroute.training.preparation import expert_sources
from ebpo_core.fusionroute.training.sft import FusionRouteSFTTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worker.save_fusion(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("reading", ["normalized", "softmax"])
def test_the_loss_and_the_metrics_equal_the_twin(start: Path, tmp_path: Path, reading: str) -> None:
    rows = worker.sft_rows(7)  # two batches of evaluation, the second one smaller
    trainer = worker.sft_trainer(worker.load(start), tmp_path, evaluation=rows, routing_loss=reading)
    samples = [twin(trainer.fusion, trainer.eval_dataset[i]["rows"][0]) for i in range(7)]
    found = trainer.evaluate()

    tokens = sum(len(reference.predictions(s.labels)) for s in samples)
    points = [(s, t) for s in samples for t in reference.informative(s)]
    assert 0 < len(points) < tokens  # the experts agree somewhere
    right = 0
    for s, t in points:
        y = int(s.labels[t + 1])
        best = max(range(2), key=lambda i: reference.expert_logprobs(s, t)[i][y])
        right += int(s.weights[t].argmax()) == best
    used = [
        sum(int(s.weights[t].argmax()) == i for s in samples for t, _ in reference.predictions(s.labels))
        for i in (0, 1)
    ]
    expected = {
        "eval_loss": reference.sft_loss(samples, reading),
        "eval_loss_lm": sum(map(reference.lm_loss, samples)) / tokens,
        "eval_loss_routing": sum(reference.routing_loss(s, reading) for s in samples) / tokens,
        "eval_routing/accuracy": right / len(points),
        "eval_routing/informative": len(points) / tokens,
        "eval_routing/usage/one": used[0] / tokens,
        "eval_routing/usage/two": used[1] / tokens,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert trainer.state.log_history[-1]["eval_loss"] == found["eval_loss"]


def test_a_logged_step_is_of_the_whole_global_batch(start: Path, tmp_path: Path) -> None:
    trainer = worker.sft_trainer(
        worker.load(start), tmp_path, max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=2
    )
    samples = [twin(trainer.fusion, trainer.train_dataset[i]["rows"][0]) for i in range(12)]
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    tokens = sum(len(reference.predictions(s.labels)) for s in samples)
    assert log["loss"] == pytest.approx(reference.sft_loss(samples, "normalized"), rel=1e-4)
    assert log["loss_lm"] == pytest.approx(sum(map(reference.lm_loss, samples)) / tokens, rel=1e-4)


@pytest.mark.parametrize("reading", ["normalized", "softmax"])
def test_accumulated_batches_equal_one_batch(start: Path, tmp_path: Path, reading: str) -> None:
    whole = worker.sft_trainer(worker.load(start), tmp_path / "1", optim="sgd", routing_loss=reading)
    parts = worker.sft_trainer(
        worker.load(start),
        tmp_path / "2",
        optim="sgd",
        routing_loss=reading,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    before = {name: value.clone() for name, value in whole.fusion.state_dict().items()}
    first, second = after(whole), after(parts)
    same(first, second, rtol=1e-4, atol=1e-6)
    assert all(not torch.equal(before[name], first[name]) for name in before)  # every parameter trains
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3


def test_experts_stay_as_they_are(start: Path, tmp_path: Path) -> None:
    model = worker.load(start)
    before = [{name: value.clone() for name, value in e.model.state_dict().items()} for e in model.experts]
    trainer = worker.sft_trainer(model, tmp_path, weight_decay=0.1)
    trainer.train()
    for expert, weights in zip(model.experts, before, strict=True):
        same(expert.model.state_dict(), weights, rtol=0, atol=0)
        assert all(p.grad is None and not p.requires_grad for p in expert.model.parameters())
        assert not expert.model.training
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}


def test_the_head_learns_which_expert_knows_the_answer(start: Path, tmp_path: Path) -> None:
    # Prompts that end in w8 are continued as the first expert would, those in w9 as the second: the route head has to
    # tell from the prompt.
    model = worker.load(start)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(48):
        ids = [1, *rng.integers(10, worker.V, size=3).tolist(), 8 + i % 2]
        prompt = len(ids)
        for _ in range(3):
            logits = model.experts[i % 2](input_ids=torch.tensor([ids])).logits[0, -1, : worker.V]
            ids.append(int(logits.argmax()))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    trainer = worker.sft_trainer(
        model,
        tmp_path,
        rows,
        rows,
        max_steps=60,
        logging_steps=60,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
    )
    before, _, now = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert before["eval_routing/accuracy"] < 0.75
    assert now["eval_routing/accuracy"] > 0.9
    assert 0.4 < now["eval_routing/usage/one"] < 0.6
    assert now["eval_loss_routing"] < before["eval_loss_routing"] / 3


def test_softmax_trains_without_experts_in_memory_or_on_disk(tmp_path: Path) -> None:
    start = worker.save_fusion(tmp_path)
    cache = {"expert_cache_dir": str(tmp_path / "cache"), "routing_loss": "softmax"}
    loaded = worker.sft_trainer(worker.load(start), tmp_path / "1", **cache)
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)
    model = worker.load(start, load_experts=False)
    assert len(model.experts) == 0
    same(after(worker.sft_trainer(model, tmp_path / "2", **cache)), after(loaded), rtol=0, atol=0)


def test_the_cache_is_built_from_references_where_no_expert_is_loaded(start: Path, tmp_path: Path) -> None:
    model = worker.load(start, load_experts=False)
    without = worker.sft_trainer(model, tmp_path / "1", routing_loss="softmax")
    assert len(model.experts) == 0
    with_ = worker.sft_trainer(worker.load(start), tmp_path / "2", routing_loss="softmax")
    files = [sorted(file.name for file in (tmp_path / name / "expert_cache/sft-train").iterdir()) for name in "12"]
    assert files[0] == files[1]  # their names say what they were made from
    assert worker.content(with_.train_dataset.sample_experts) == worker.content(without.train_dataset.sample_experts)
    for reference_ in model.config.experts:
        reference_["hash"] = None
    with pytest.raises(ValueError, match="expert 'one' has no hash"):
        expert_sources(model, torch.device("cpu"))


def test_another_expert_or_other_data_is_noticed(start: Path, tmp_path: Path) -> None:
    worker.sft_trainer(worker.load(start), tmp_path)
    with pytest.raises(ValueError, match=r"sft-train.* changed since: the data .*on_change='rebuild'"):
        worker.sft_trainer(worker.load(start), tmp_path, worker.sft_rows(5))
    rebuilt = worker.sft_trainer(worker.load(start), tmp_path, worker.sft_rows(5), on_change="rebuild")
    assert len(rebuilt.train_dataset) == 5


def test_a_checkpoint_loads_as_a_model(start: Path, tmp_path: Path) -> None:
    trainer = worker.sft_trainer(worker.load(start), tmp_path, save_strategy="steps", save_steps=3)
    expected = after(trainer)
    trainer.save_model(tmp_path / "final")
    trainer.save_merged(tmp_path / "merged")
    for folder in (tmp_path / "checkpoint-3", tmp_path / "final", tmp_path / "merged"):
        model = worker.load(folder)
        same(model.state_dict(), expected, rtol=0, atol=0)
        ids = torch.tensor([[1, 7, 8, 9]])
        assert torch.equal(model(input_ids=ids).logits, trainer.fusion.eval()(input_ids=ids).logits)
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 4
        assert (folder / "tokenizer.json").exists()


def test_lora_on_the_router_trains_the_head_too(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = worker.sft_trainer(
        worker.load(start), tmp_path, save_strategy="steps", save_steps=3, trainer={"peft_config": lora}
    )
    assert lora.modules_to_save is None  # the user's own is left as it was
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or "route_head.modules_to_save" in name for name in trained)
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained
    assert "base_model.model.route_head.modules_to_save.default.weight" in moved

    ids = torch.tensor([[1, 7, 8, 9]])
    expected = trainer.model.eval()(input_ids=ids).logits
    trainer.save_merged(tmp_path / "merged")
    torch.testing.assert_close(worker.load(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(trainer.model(input_ids=ids).logits, expected)  # merging left the trainer's model alone
    adapted = peft.PeftModel.from_pretrained(worker.load(start), tmp_path / "checkpoint-3").eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="has an adapter already"):
        worker.sft_trainer(trainer.model, tmp_path / "2", trainer={"peft_config": lora})


def test_lora_resumes(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = worker.sft_trainer(worker.load(start), tmp_path, trainer={"peft_config": lora}, **saving)
    whole.train()
    torch.manual_seed(99)  # another start of the adapter, which the checkpoint replaces
    resumed = worker.sft_trainer(worker.load(start), tmp_path, trainer={"peft_config": lora}, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_a_frozen_head_is_refused(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    frozen = peft.get_peft_model(worker.load(start), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"route_head is frozen .*modules_to_save"):
        worker.sft_trainer(frozen, tmp_path)
    worker.sft_trainer(frozen, tmp_path, routing_loss_weight=0.0, max_steps=1).train()  # language modelling alone


def test_the_balancing_loss_of_a_mixture_is_refused_and_not_left_out(start: Path, tmp_path: Path) -> None:
    model = worker.load(start)
    model.router.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits=True.*load-balancing loss"):
        worker.sft_trainer(model, tmp_path)
    model.router.config.output_router_logits = False
    assert worker.sft_trainer(model, tmp_path).train().training_loss > 0


def test_several_evaluation_sets_and_lengths_grouped(start: Path, tmp_path: Path) -> None:
    trainer = worker.sft_trainer(
        worker.load(start),
        tmp_path,
        evaluation={"a": worker.sft_rows(3, seed=8), "b": worker.sft_rows(2, seed=9)},
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    names = {name for log in trainer.state.log_history for name in log}
    assert {"eval_a_loss", "eval_b_routing/accuracy", "eval_a_routing/usage/two"} <= names


def test_truncation_is_reported(start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "w7", "completion": " w8 w9 w10 w11"}, {"prompt": "w7 w8 w9 w10 w11", "completion": " w12"}]
    trainer = worker.sft_trainer(worker.load(start), tmp_path, rows, max_length=5)
    assert "sft-train: 2 sequences were cut to max_length=5, 1 rows had nothing to learn left" in caplog.text
    assert len(trainer.train_dataset) == 1
    with pytest.raises(ValueError, match=r"sft-train: the data has no row to train on \(1 were dropped\)"):
        worker.sft_trainer(worker.load(start), tmp_path / "none", rows[1:], max_length=5)


def test_what_is_refused(start: Path, tmp_path: Path) -> None:
    model = worker.load(start)
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM"):
        worker.sft_trainer(model.router, tmp_path)
    with pytest.raises(TypeError, match="pass a FusionRouteSFTConfig"):
        FusionRouteSFTTrainer(model, worker.config(FusionRouteCDPOConfig, tmp_path), worker.sft_rows())
    with pytest.raises(ValueError, match="compute_metrics: FusionRouteSFTTrainer has"):
        worker.sft_trainer(model, tmp_path, trainer={"compute_metrics": lambda _: {}})
    with pytest.raises(TypeError, match="the data is a generator"):
        worker.sft_trainer(model, tmp_path, (row for row in worker.sft_rows()))
    with pytest.raises(ValueError, match="no complete checkpoint in output_dir"):
        worker.sft_trainer(model, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match='none is loaded.*routing_loss="softmax"'):
        worker.sft_trainer(worker.load(start, load_experts=False), tmp_path)


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (FusionRouteSFTConfig, {"routing_loss": "hard"}, "routing_loss='hard': use one of"),
        (FusionRouteSFTConfig, {"train_on": "prompt"}, "train_on='prompt'"),
        (FusionRouteSFTConfig, {"on_change": "ignore"}, "on_change='ignore'"),
        (FusionRouteSFTConfig, {"routing_loss_weight": -1.0}, "routing_loss_weight=-1.0: must not be negative"),
        (FusionRouteSFTConfig, {"remove_unused_columns": True}, "remove_unused_columns=True"),
        (FusionRouteSFTConfig, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        (FusionRouteCDPOConfig, {"beta": 0.0}, "beta=0.0: must be positive"),
        (FusionRouteCDPOConfig, {"sft_loss_weight": -0.5}, "sft_loss_weight=-0.5"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, cls: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worker.config(cls, tmp_path, **setting)


def test_settings_have_the_papers_defaults_and_parse_from_a_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(FusionRouteCDPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--routing_loss", "softmax", "--max_length", "64",
         "--chat_template_kwargs", '{"enable_thinking": false}']
    )  # fmt: skip
    assert (args.beta, args.learning_rate, args.num_train_epochs) == (0.1, 1e-5, 1)
    assert args.sft_loss_weight == args.routing_loss_weight == 1 / 3
    assert (args.routing_loss, args.max_length) == ("softmax", 64)
    assert args.chat_template_kwargs == {"enable_thinking": False}


def test_it_is_lazy() -> None:
    import ebpo_core.fusionroute.training as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    assert package.FusionRouteSFTTrainer is FusionRouteSFTTrainer
    assert isinstance(worker.TOKENIZER.pad_token_id, int)
    assert issubclass(FusionRouteForCausalLM, torch.nn.Module)


def test_evaluate_and_predict_take_rows(start: Path, tmp_path: Path) -> None:
    rows, other = worker.sft_rows(7, seed=5), worker.sft_rows(3, seed=6)
    trainer = worker.sft_trainer(worker.load(start), tmp_path, evaluation=rows)
    trainer.train()
    known = ("eval_loss", "eval_routing/accuracy")
    expected = trainer.evaluate()
    found = trainer.evaluate(rows)
    assert [found[name] for name in known] == [expected[name] for name in known]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected["eval_loss"]
    assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] == expected["eval_loss"]
    assert trainer.evaluate(other)["eval_loss"] != expected["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected["eval_loss"]
    both = trainer.evaluate({"a": rows, "b": other}, metric_key_prefix="held")
    assert both["held_a_loss"] == expected["eval_loss"] != both["held_b_loss"]
    predicted = trainer.predict(rows).metrics
    assert predicted["test_loss"] == expected["eval_loss"]
    assert predicted["test_routing/accuracy"] == expected["eval_routing/accuracy"]
    # As in the constructor.
    with pytest.raises(TypeError, match="the data is a generator"):
        trainer.evaluate(row for row in rows)
    with pytest.raises(ValueError, match="row of SFT data must be one of"):
        trainer.predict([{"question": "w7"}])
    with pytest.raises(ValueError, match="no row to train on"):
        trainer.evaluate([])
    without = worker.sft_trainer(worker.load(start), tmp_path / "without")
    assert without.evaluate(rows)["eval_loss"] > 0


def test_rows_given_later_are_read_in_spite_of_persistent_workers(start: Path, tmp_path: Path) -> None:
    rows, other = worker.sft_rows(4, seed=5), worker.sft_rows(4, seed=6)
    trainer = worker.sft_trainer(
        worker.load(start), tmp_path, evaluation=rows, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    first, second, third = trainer.evaluate(), trainer.evaluate(other), trainer.evaluate()
    assert first["eval_loss"] == third["eval_loss"] != second["eval_loss"]
