"""``FusionRouteCDPOTrainer`` on tiny models: its loss against the twin, gradients, references, mix training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import numpy as np
import pytest
import torch
import transformers
from fusionroute_worker import after, same, twin

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.training import columns, reference
from ebpo_core.fusionroute.training.batches import MixCollator, MixDataset
from ebpo_core.fusionroute.training.cdpo import FusionRouteCDPOTrainer
from ebpo_core.fusionroute.training.config import FusionRouteSFTConfig
from ebpo_core.fusionroute.training.dropout import disable_dropout
from ebpo_core.fusionroute.training.sequences import PreferencePairs, TokenSequences

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]

ALPHA, BETA = 1.5, 0.3  # alpha is the model's
HEAD = "route_head.weight"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worker.save_fusion(tmp_path_factory.mktemp("models"))


def mixed(start: Path, output: Path, **settings: Any) -> Any:
    rows = settings.pop("sft_rows", worker.sft_rows(9))
    more = {"sft_dataset": rows, **settings.pop("trainer", {})}
    return worker.cdpo_trainer(worker.load(start), output, trainer=more, beta=BETA, **settings)


def twins(trainer: Any, dataset: MixDataset) -> tuple[list[reference.Sample], list[reference.Pair]]:
    """The data as the twin takes it, with the references of the model that the trainer began with."""
    items = [dataset[i] for i in range(len(dataset))]
    samples = [twin(trainer.fusion, item["rows"][0]) for item in items if "reference" not in item]
    pairs = [
        reference.Pair(*(twin(trainer.fusion, row) for row in item["rows"]), *map(float, item["reference"]))
        for item in items
        if "reference" in item
    ]
    return samples, pairs


@pytest.mark.parametrize("reading", ["normalized", "softmax"])
def test_loss_and_metrics_of_mix_training_equal_the_twin(start: Path, tmp_path: Path, reading: str) -> None:
    trainer = mixed(
        start,
        tmp_path,
        routing_loss=reading,
        evaluation=worker.preference_rows(5, seed=4),
        trainer={"eval_sft_dataset": worker.sft_rows(5, seed=3)},
        per_device_eval_batch_size=3,  # one batch holds samples and pairs, the last one is smaller
    )
    data = trainer.eval_dataset
    # References are those of the starting router; they stay while the router moves.
    _, pairs = twins(trainer, data)
    for pair in pairs:
        assert pair.reference_chosen == pytest.approx(-reference.lm_loss(pair.chosen), abs=1e-4)
        assert pair.reference_rejected == pytest.approx(-reference.lm_loss(pair.rejected), abs=1e-4)
    trainer.train()
    samples, pairs = twins(trainer, data)
    found = trainer.evaluate()

    bias = [reference.bias(p, BETA, ALPHA) for p in pairs]
    margins = [reference.margin(p, BETA) for p in pairs]
    chosen = [BETA * (-reference.lm_loss(p.chosen) - p.reference_chosen) for p in pairs]
    tokens = sum(len(reference.predictions(s.labels)) for s in samples)
    routed = [*samples, *(p.chosen for p in pairs)]
    positions = sum(len(reference.predictions(s.labels)) for s in routed)
    expected = {
        "eval_loss": reference.mix_loss(samples, pairs, reading, beta=BETA, alpha=ALPHA),
        "eval_loss_lm": sum(map(reference.lm_loss, samples)) / tokens,
        "eval_loss_routing": sum(reference.routing_loss(s, reading) for s in samples) / tokens,
        "eval_loss_cdpo": np.mean([reference.cdpo_loss(p, BETA, ALPHA) for p in pairs]),
        "eval_rewards/margins": np.mean(margins),
        "eval_rewards/chosen": np.mean(chosen),
        "eval_rewards/rejected": np.mean(chosen) - np.mean(margins),
        "eval_rewards/accuracies": np.mean([m > 0 for m in margins]),
        "eval_cdpo/bias": np.mean(bias),
        "eval_cdpo/bias_magnitude": np.mean(np.abs(bias)),
        "eval_cdpo/accuracy": np.mean([m + b > 0 for m, b in zip(margins, bias, strict=True)]),
        "eval_routing/informative": sum(len(reference.informative(s)) for s in routed) / positions,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=2e-4)
    assert min(abs(m) for m in margins) > 1e-3  # the router has moved


def test_gradient_reaches_the_head_from_samples_alone(start: Path, tmp_path: Path) -> None:
    trainer = mixed(start, tmp_path)
    data, collate = trainer.train_dataset, MixCollator()
    assert (data.num_samples, data.num_pairs) == (9, 12)

    def gradients(items: list[int]) -> dict[str, torch.Tensor | None]:
        trainer.model.zero_grad(set_to_none=True)
        trainer.compute_loss(trainer.model, collate([data[i] for i in items])).backward()
        return {name: value.grad for name, value in trainer.model.named_parameters()}

    pairs = gradients([9, 12, 20])
    assert pairs[HEAD] is None
    assert all(value is not None and value.abs().max() > 0 for name, value in pairs.items() if name != HEAD)
    samples = gradients([0, 3])
    assert samples[HEAD].abs().max() > 0
    # In one batch the head's gradient is the samples' part, divided by the count of both.
    both = gradients([0, 3, 9, 12, 20])
    torch.testing.assert_close(both[HEAD], samples[HEAD] * 2 / 5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_pairs_alone_leave_the_head_as_it_is(start: Path, tmp_path: Path, weight_decay: float) -> None:
    model = worker.load(start)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    now = after(worker.cdpo_trainer(model, tmp_path, weight_decay=weight_decay))
    assert [name for name in before if torch.equal(before[name], now[name])] == [HEAD]
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == [HEAD]


def test_accumulated_batches_equal_one_batch(start: Path, tmp_path: Path) -> None:
    whole = mixed(start, tmp_path / "1", optim="sgd")
    parts = mixed(start, tmp_path / "2", optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    same(after(whole), after(parts), rtol=1e-4, atol=1e-6)
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (whole, parts)]
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"epoch", "rewards/accuracies"}:  # margins of the first step are rounding errors
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-5), name
    counts = {"loss_lm", "loss_cdpo"}
    assert any(counts <= log.keys() for log in logs[0])  # a step with both kinds


def test_training_prefers_the_chosen_side(start: Path, tmp_path: Path) -> None:
    data = worker.preference_rows(16, seed=2)
    trainer = worker.cdpo_trainer(
        worker.load(start), tmp_path, data, data, max_steps=25, logging_steps=25, per_device_train_batch_size=16
    )
    before, _, now = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert now["eval_cdpo/accuracy"] == 1
    assert now["eval_rewards/margins"] > 1
    assert now["eval_loss"] < before["eval_loss"] / 3


def test_a_pair_the_experts_separate_gets_little_gradient(start: Path, tmp_path: Path) -> None:
    # "When the experts already separate the pair the gradient is small": with the same references, the gradient's size
    # is sigma(-(margin + bias)) of that of a pair without bias.
    trainer = worker.cdpo_trainer(worker.load(start), tmp_path, beta=BETA)
    collate, data = MixCollator(), trainer.train_dataset
    for i in range(4):
        batch = collate([data[i]])
        sizes = []
        for logprobs in (batch["expert_logprobs"], torch.zeros_like(batch["expert_logprobs"])):
            trainer.model.zero_grad(set_to_none=True)
            trainer.compute_loss(trainer.model, batch | {"expert_logprobs": logprobs}).backward()
            sizes.append(torch.cat([p.grad.flatten() for p in trainer.model.router.parameters()]).norm().item())
        _, (pair,) = twins(trainer, MixDataset(None, None, *_one(data, i)))
        share = 1 / (1 + np.exp(reference.bias(pair, BETA, ALPHA)))
        assert sizes[0] == pytest.approx(sizes[1] * 2 * share, rel=1e-3)


def _one(data: MixDataset, i: int) -> tuple[Any, Any, Any]:
    rows = [data.pairs.sequences[2 * i], data.pairs.sequences[2 * i + 1]]
    experts = data.pair_experts.select([2 * i, 2 * i + 1])
    return PreferencePairs(TokenSequences.of(rows)), experts, data.reference[i : i + 1]


# ------------------------------------------------------------------------------------------------------- references


def stored(folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    (file,) = folder.glob("reference-train-*.arrow")
    table = columns.read(file)
    sums = np.stack([table["chosen"].to_numpy(), table["rejected"].to_numpy()], axis=1)
    return sums, json.loads(table.schema.metadata[b"made_from"])


def test_references_are_computed_once_and_belong_to_a_router_and_data(start: Path, tmp_path: Path) -> None:
    model = worker.load(start)
    first = worker.cdpo_trainer(model, tmp_path)
    sums, made_from = stored(tmp_path)
    assert sums.shape == (12, 2)
    assert made_from["vocab_size"] == "40"
    (file,) = tmp_path.glob("reference-train-*")
    written = file.stat().st_mtime_ns
    again = worker.cdpo_trainer(worker.load(start), tmp_path)
    assert file.stat().st_mtime_ns == written
    assert (again.train_dataset.reference == first.train_dataset.reference).all()

    first.train()
    with pytest.raises(ValueError, match=r"changed since: the router .*pass the model of the SFT phase"):
        worker.cdpo_trainer(model, tmp_path)
    with pytest.raises(ValueError, match="changed since: the preference pairs"):
        worker.cdpo_trainer(
            worker.load(start), tmp_path, worker.preference_rows(3), expert_cache_dir=str(tmp_path / "other")
        )
    worker.cdpo_trainer(model, tmp_path, on_change="rebuild")
    rebuilt, _ = stored(tmp_path)
    assert np.abs(rebuilt - sums).max() > 0.1


def test_the_head_is_no_part_of_the_reference(start: Path, tmp_path: Path) -> None:
    worker.cdpo_trainer(worker.load(start), tmp_path)
    model = worker.load(start)
    with torch.no_grad():
        model.route_head.weight += 1
    worker.cdpo_trainer(model, tmp_path)


def test_a_new_adapter_has_the_base_as_its_reference(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    worker.cdpo_trainer(worker.load(start), tmp_path)
    base, _ = stored(tmp_path)
    trainers = [
        worker.cdpo_trainer(worker.load(start), tmp_path, seed=seed, trainer={"peft_config": lora}) for seed in (1, 2)
    ]  # another start of the adapter each time, as when a run is resumed
    for trainer in trainers:
        assert (trainer.train_dataset.reference == base).all()
    trainer = trainers[0]
    head = {n: v.clone() for n, v in trainer.model.state_dict().items() if "route_head" in n}
    trainer.train()
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in head.items())
    moved = [log["rewards/margins"] for log in trainer.state.log_history if "loss" in log]
    assert moved[0] == pytest.approx(0, abs=1e-4)
    assert abs(moved[-1]) > 1e-3

    # Trained further, the adapter is part of where the run begins.
    with pytest.raises(ValueError, match="changed since: the router"):
        worker.cdpo_trainer(trainer.model, tmp_path)
    further = worker.cdpo_trainer(trainer.model, tmp_path / "further")
    assert np.abs(further.train_dataset.reference - base).max() > 0.1
    further.train()
    assert next(log["rewards/margins"] for log in further.state.log_history if "loss" in log) == pytest.approx(
        0, abs=1e-4
    )


def test_lora_in_mix_training_moves_the_head_by_samples(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    trainer = mixed(start, tmp_path, trainer={"peft_config": lora})
    name = "base_model.model.route_head.modules_to_save.default.weight"
    before = trainer.model.state_dict()[name].clone()
    trainer.train()
    assert not torch.equal(trainer.model.state_dict()[name], before)
    trainer.save_merged(tmp_path / "merged")
    ids = torch.tensor([[1, 7, 8, 9]])
    expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(worker.load(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("setting", ["bf16", "gradient_checkpointing"])
def test_precision_and_checkpointing(start: Path, tmp_path: Path, setting: str) -> None:
    plain = mixed(start, tmp_path / "plain", max_steps=1)
    other = mixed(start, tmp_path / setting, max_steps=1, **{setting: True})
    noise = {"rtol": 0.0, "atol": 0.2} if setting == "bf16" else {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(other.train_dataset.reference, plain.train_dataset.reference, **noise)
    assert (other.train_dataset.reference != plain.train_dataset.reference).any() == (setting == "bf16")
    plain.train()
    other.train()
    logs = [next(log for log in t.state.log_history if "loss" in log) for t in (plain, other)]
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.05 if setting == "bf16" else 1e-6)
    assert logs[1]["rewards/margins"] == pytest.approx(0, abs=0.05)
    if setting != "bf16":
        same(plain.fusion.state_dict(), other.fusion.state_dict(), rtol=1e-4, atol=1e-5)


def test_no_expert_is_needed_in_memory(tmp_path: Path) -> None:
    start = worker.save_fusion(tmp_path)
    shared = {"expert_cache_dir": str(tmp_path / "cache"), "routing_loss": "softmax"}
    expected = after(mixed(start, tmp_path / "1", **shared))
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)
    model = worker.load(start, load_experts=False)
    more = {"sft_dataset": worker.sft_rows(9)}
    trainer = worker.cdpo_trainer(model, tmp_path / "2", trainer=more, beta=BETA, **shared)
    same(after(trainer), expected, rtol=0, atol=0)
    # Pairs alone do not ask for experts either, whatever the routing loss.
    worker.cdpo_trainer(
        worker.load(start, load_experts=False), tmp_path / "3", expert_cache_dir=shared["expert_cache_dir"]
    ).train()


def test_batches_keep_the_order_of_items(start: Path, tmp_path: Path) -> None:
    trainer = mixed(start, tmp_path)
    data = trainer.train_dataset
    batch = MixCollator(pad_token_id=0)([data[i] for i in (11, 2, 20, 5)])
    assert batch["counts"].tolist() == [2, 2]
    assert batch["order"].tolist() == [1, 3, 0, 2]
    assert batch["input_ids"].shape[0] == 6
    rows = [data[2]["rows"][0], data[5]["rows"][0], *[data[i]["rows"][side] for side in (0, 1) for i in (11, 20)]]
    keep = batch["labels"].shape[1]
    for b, row in enumerate(rows):
        length = len(row.input_ids)
        assert batch["input_ids"][b, :length].tolist() == row.input_ids.tolist()
        assert batch["attention_mask"][b].sum() == length
        padded = np.pad(row.labels, (0, batch["input_ids"].shape[1] - length), constant_values=-100)
        assert (padded[:-keep] == -100).all()
        assert batch["labels"][b].tolist() == padded[-keep:].tolist()
        at = batch["labels"][b] != -100
        assert (batch["expert_logprobs"][b][at].numpy() == row.logprobs).all()
        assert (batch["informative"][b][at].numpy() == (row.argmax[:, 0] != row.argmax[:, 1])).all()
        assert not batch["informative"][b][~at].any()
    assert (batch["labels"][:, 0] == -100).all()
    assert (batch["labels"][:, 1] != -100).any()  # no column more than needed


def test_what_is_refused(start: Path, tmp_path: Path) -> None:
    model = worker.load(start)
    with pytest.raises(TypeError, match="pass a FusionRouteCDPOConfig"):
        FusionRouteCDPOTrainer(model, worker.config(FusionRouteSFTConfig, tmp_path), worker.preference_rows())
    with pytest.raises(TypeError, match="eval_dataset is a dict"):
        worker.cdpo_trainer(model, tmp_path, evaluation={"a": worker.preference_rows()})
    bare, more = worker.load(start, load_experts=False), {"sft_dataset": worker.sft_rows()}
    headless = worker.load(start)
    headless.route_head.requires_grad_(False)
    with pytest.raises(ValueError, match="route_head is frozen"):
        worker.cdpo_trainer(headless, tmp_path, trainer=more)
    with pytest.raises(ValueError, match="none is loaded"):
        worker.cdpo_trainer(bare, tmp_path, trainer=more)
    model.config.complementary = False
    with pytest.raises(ValueError, match="complementary=False"):
        worker.cdpo_trainer(model, tmp_path)
    data = worker.cdpo_trainer(worker.load(start), tmp_path).train_dataset
    with pytest.raises(ValueError, match="0 samples and 12 pairs, but ndarray has 3 entries where 12 are needed"):
        MixDataset(None, None, data.pairs, data.pair_experts, data.reference[:3])
    with pytest.raises(IndexError):
        data[12]


def noisy(family: str, folder: Path, **settings: Any) -> Any:
    """A model whose router of that family has dropout, and an expert without."""
    sizes = {"vocab_size": worker.V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    config = transformers.AutoConfig.for_model(family, **sizes, **settings)
    torch.manual_seed(0)
    router = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = FusionRouteForCausalLM.from_experts(router, {name: folder.parent / name for name in ("one", "two")})
    torch.nn.init.normal_(model.route_head.weight, std=0.3)
    return model


LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
ROUTERS = {
    "llama": {**LLAMA, "attention_dropout": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.5},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "layerdrop": 0.5,
    },
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "attention_dropout": 0.4,
        "hidden_dropout": 0.3,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["global"], 1]],
        "attention_dropout": 0.5,
    },
    "persimmon": {**LLAMA, "attention_dropout": 0.5, "hidden_dropout": 0.3},
}


@pytest.mark.parametrize("family", ROUTERS)
def test_dropout_is_off_in_policy_and_reference(start: Path, tmp_path: Path, family: str) -> None:
    model = noisy(family, start, **ROUTERS[family])
    stored = model.config.router_config.to_dict()
    trainer = worker.cdpo_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "rewards/margins" in log)
    assert abs(log["rewards/margins"]) < 1e-5, "policy and reference are one model at the first step"
    assert log["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert model.config.router_config.to_dict() == stored, "what is saved keeps its dropout"


def test_the_noise_of_a_mixture_of_experts_is_off() -> None:
    sizes = {**LLAMA, "vocab_size": worker.V, "num_key_value_heads": 4, "num_local_experts": 2}
    config = transformers.AutoConfig.for_model("mixtral", **sizes, router_jitter_noise=0.5, attention_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert (model.config.router_jitter_noise, model.config.attention_dropout) == (0.5, 0.5)


def test_dropout_stays_where_it_is_asked_for(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    margins = []
    for disable in (True, False):
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
        trainer = worker.cdpo_trainer(
            worker.load(start),
            tmp_path / str(disable),
            max_steps=1,
            disable_dropout=disable,
            trainer={"peft_config": lora},
        )
        trainer.train()
        log = next(log for log in trainer.state.log_history if "rewards/margins" in log)
        margins.append(abs(log["rewards/margins"]))
    assert margins[0] < 1e-5, "an adapter's dropout too"
    assert margins[1] > 1e-3


def test_evaluate_and_predict_take_rows(start: Path, tmp_path: Path) -> None:
    rows, other, samples = (
        worker.preference_rows(5, seed=4),
        worker.preference_rows(4, seed=8),
        worker.sft_rows(3, seed=9),
    )
    trainer = mixed(start, tmp_path / "1", evaluation=rows, trainer={"eval_sft_dataset": samples})
    before = trainer.evaluate(other)
    assert abs(before["eval_rewards/margins"]) < 1e-5, "the reference is the router as it is"
    trainer.train()
    expected = trainer.evaluate()
    found = trainer.evaluate(rows, eval_sft_dataset=samples)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert trainer.evaluate(rows)["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert trainer.predict(rows).metrics["test_loss_cdpo"] == pytest.approx(expected["eval_loss_cdpo"], rel=1e-4)
    caches = sorted((tmp_path / "1" / "expert_cache").iterdir())
    with pytest.raises(ValueError, match="eval_dataset: the router has moved since training began"):
        trainer.evaluate(worker.preference_rows(4, seed=99))
    assert sorted((tmp_path / "1" / "expert_cache").iterdir()) == caches, "refused before the experts were run"


def test_the_reference_of_rows_given_later_is_the_model_without_its_new_adapter(start: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    rows = worker.preference_rows(5, seed=4)
    results = []
    for evaluation in (rows, None):
        torch.manual_seed(3)
        trainer = worker.cdpo_trainer(
            worker.load(start), tmp_path / str(evaluation is None), evaluation=evaluation, trainer={"peft_config": lora}
        )
        trainer.train()
        results.append(trainer.evaluate() if evaluation else trainer.evaluate(rows))
    assert abs(results[0]["eval_rewards/margins"]) > 1e-4
    for name in ("eval_rewards/margins", "eval_loss"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] > 0
