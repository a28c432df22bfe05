"""Tiny data, models and trainers of FusionRoute's training tests, and jobs that run as processes of their own.

``python fusionroute_worker.py JOBS.json`` runs a list of jobs ``{"kind": ..., "ranks": ..., "output": folder, ...}``,
each in a forked process (or several, as torchrun would start them), since most of the time of runs this small goes into
importing torch. Exit statuses go to ``JOBS.status``, negative for a signal; what a test compares goes to
``result_<rank>.json`` in the output folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from fusionroute_tiny import save_tiny, tiny_model, tiny_tokenizer
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.training import losses, reference
from ebpo_core.fusionroute.training.batches import MixCollator, MixDataset
from ebpo_core.fusionroute.training.cdpo import FusionRouteCDPOTrainer
from ebpo_core.fusionroute.training.config import FusionRouteCDPOConfig, FusionRouteSFTConfig
from ebpo_core.fusionroute.training.data import tokenize_pairs, tokenize_samples
from ebpo_core.fusionroute.training.expert_cache import ExpertSource, annotation, expert_columns
from ebpo_core.fusionroute.training.preparation import expert_sources
from ebpo_core.fusionroute.training.reference_logprobs import reference_sums
from ebpo_core.fusionroute.training.sequences import TokenSequences
from ebpo_core.fusionroute.training.sft import FusionRouteSFTTrainer

V = 40
TOKENIZER = tiny_tokenizer(V)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal ends the process before this returns


def random_sequences(count: int = 23, seed: int = 0) -> TokenSequences:
    """Sequences of 3 to 12 tokens, about half of them with labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(3, V, size=rng.integers(3, 13))
        labels = np.where(rng.random(len(ids)) < 0.5, ids, -100)
        labels[-1] = ids[-1]
        rows.append((ids, labels))
    return TokenSequences.of(rows)


class Counted:
    """An expert that counts its batches, and may die or fail in one of them."""

    def __init__(self, model: Any, *, die_at: int | None = None, fail_at: int | None = None) -> None:
        self.model, self.device = model, model.device
        self.calls, self.die_at, self.fail_at = 0, die_at, fail_at

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        if self.calls == self.die_at:
            die()
        output = self.model(**inputs)
        if self.calls == self.fail_at:
            output.logits.fill_(float("nan"))
        return output


def experts(**second: Any) -> list[Counted]:
    """A Llama and a wider Qwen2; ``second`` goes to the latter's :class:`Counted`."""
    return [
        Counted(tiny_model("llama", 1, vocab_size=V, hidden_size=32, layers=1)),
        Counted(tiny_model("qwen2", 2, vocab_size=V + 8, hidden_size=32, layers=1), **second),
    ]


def sources(models: list[Counted]) -> list[ExpertSource]:
    return [ExpertSource(f"e{i}", f"hash{i}", lambda model=model: model) for i, model in enumerate(models)]


def build_cache(folder: Path, models: list[Any] | None = None, data: Any = None, **options: Any) -> Dataset:
    """An expert cache of random sequences in shards of four."""
    defaults = {"vocab_size": V, "shard_rows": 4, "batch_tokens": 30, "progress": False}
    given = options.pop("experts", None) or sources(experts() if models is None else models)
    return expert_columns(folder, random_sequences() if data is None else data, given, **(defaults | options))


def content(cache: Dataset) -> list[list[Any]]:
    return [[part.tolist() for part in annotation(cache, i)] for i in range(len(cache))]


def job_cache(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Build an expert cache with experts that ``on_rank`` lets die or fail."""
    models = experts(**job["on_rank"].get(str(rank), {}))
    output = Path(job["output"])
    try:
        cache = build_cache(output / "cache", models)
    except Exception as error:
        (output / f"error_{rank}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        dist.barrier()  # the launcher ends the other ranks, whatever they were about to say, when one has ended
        raise
    return {"calls": [model.calls for model in models], "content": content(cache)}


# ------------------------------------------------------------------------------------------------------------ training


def save_fusion(folder: Path) -> Path:
    """A FusionRoute checkpoint of a Llama router and two experts, one wider than V; returns its folder.

    The experts are related, so that they agree here and there.
    """
    small = {"hidden_size": 32, "layers": 1}
    save_tiny(folder / "router", "llama", 3, vocab_size=V, tokenizer=TOKENIZER, **small)
    one, two = (tiny_model("llama", 1, vocab_size=width, **small) for width in (V, V + 8))
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, other in zip(two.parameters(), one.parameters(), strict=True):
            mine[: len(other)] = other + 0.05 * torch.randn_like(other)
    for name, model in (("one", one), ("two", two)):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    model = FusionRouteForCausalLM.from_experts(
        folder / "router", {"one": folder / "one", "two": folder / "two"}, alpha=1.5
    )
    torch.nn.init.normal_(model.route_head.weight, std=0.3)
    model.save_pretrained(folder / "start")
    TOKENIZER.save_pretrained(folder / "start")
    return folder / "start"


def words(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(6, V, size=rng.integers(least, most + 1)))


def sft_rows(count: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of one to five words, completions of one to six: uneven numbers of labels."""
    rng = np.random.default_rng(seed)
    return [{"prompt": words(rng, 1, 5), "completion": " " + words(rng, 1, 6)} for _ in range(count)]


def preference_rows(count: int = 12, seed: int = 1) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    return [
        {"prompt": words(rng, 1, 4), "chosen": " " + words(rng, 1, 5), "rejected": " " + words(rng, 1, 5)}
        for _ in range(count)
    ]


def config(cls: type[Any], output: Path | str, **settings: Any) -> Any:
    """A silent config of four items per step, on CPU."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return cls(**(defaults | settings))


def sft_trainer(model: Any, output: Path | str, rows: Any = None, evaluation: Any = None, **settings: Any) -> Any:
    options = settings.pop("trainer", {})
    args = config(FusionRouteSFTConfig, output, **settings)
    return FusionRouteSFTTrainer(model, args, sft_rows() if rows is None else rows, evaluation, TOKENIZER, **options)


def cdpo_trainer(model: Any, output: Path | str, pairs: Any = None, evaluation: Any = None, **settings: Any) -> Any:
    options = settings.pop("trainer", {})
    args = config(FusionRouteCDPOConfig, output, **settings)
    data = preference_rows() if pairs is None else pairs
    return FusionRouteCDPOTrainer(model, args, data, evaluation, TOKENIZER, **options)


def load(start: Path | str, **options: Any) -> Any:
    return FusionRouteForCausalLM.from_pretrained(start, **options)


@torch.no_grad()
def twin(model: Any, row: Any) -> reference.Sample:
    """A row of a trainer's data, alone, through the router and every expert, as the NumPy twin takes it."""
    ids = torch.tensor(row.input_ids[None]).long()
    out = model(input_ids=ids, router_only=True)
    logits = [expert(input_ids=ids).logits[0].double().numpy() for expert in model.experts]
    labels = row.labels.astype(np.int64)
    return reference.Sample(out.logits[0].double().numpy(), out.routing_weights[0].double().numpy(), logits, labels)


def after(trainer: Any) -> dict[str, torch.Tensor]:
    """Train; the weights then."""
    trainer.train()
    return {name: value.clone() for name, value in trainer.fusion.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


def weights(model: Any) -> dict[str, list[float]]:
    """The state as JSON holds it, without loss."""
    return {name: value.double().flatten().tolist() for name, value in model.state_dict().items()}


def job_train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train; ``kill_in_save`` ends the process half-way through writing that checkpoint. Rank 1 is slow to save."""
    model = load(job["start"])
    settings = job["settings"]
    if job["phase"] == "sft":
        trainer = sft_trainer(model, job["output"], evaluation=sft_rows(7, seed=5), **settings)
    else:
        more = {"sft_dataset": sft_rows(9), "eval_sft_dataset": sft_rows(3, seed=5)} if job["phase"] == "mix" else {}
        evaluation = preference_rows(4, seed=6)
        trainer = cdpo_trainer(model, job["output"], evaluation=evaluation, trainer=more, **settings)

    save_rng_state = transformers.Trainer._save_rng_state

    def deadly(self: Any, output_dir: str) -> None:
        if self.state.global_step == job.get("kill_in_save"):
            die()
        time.sleep(0.3 * rank)
        save_rng_state(self, output_dir)

    transformers.Trainer._save_rng_state = deadly
    trainer.train(resume_from_checkpoint=job.get("resume") or None)
    timing = ("runtime", "per_second", "total_flos")
    logs = [
        {name: value for name, value in log.items() if not any(word in name for word in timing)}
        for log in trainer.state.log_history
    ]
    kind = type(trainer.model_wrapped).__name__  # where Trainer keeps what it runs
    return {"weights": weights(trainer.fusion), "logs": logs, "kind": kind}


def job_fsdp(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Mix training with torch's ``fully_shard``, without a Trainer; in one process the same steps without it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, ranks, output = load(job["start"]), job["ranks"], Path(job["output"])
    samples, pairs = tokenize_samples(sft_rows(8), TOKENIZER), tokenize_pairs(preference_rows(8), TOKENIZER)
    caches = []
    for name, data in (("samples", samples), ("pairs", pairs.sequences)):
        found = expert_sources(model, torch.device("cpu"))
        caches.append(expert_columns(output / name, data, found, vocab_size=V, shard_rows=3, progress=False))
    references = reference_sums(config(FusionRouteCDPOConfig, output), "train", pairs, model, model)
    dataset, collate = MixDataset(samples, caches[0], pairs, caches[1], references), MixCollator()

    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.router.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
        experts = [parameter for expert in model.experts for parameter in expert.model.parameters()]
        assert not any(isinstance(parameter, DTensor) for parameter in experts)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses_ = []
    for step in range(3):
        items = [(4 * step + i) % 16 for i in range(4)]  # samples in the first steps, then pairs, then both
        items = [*items, *(15 - i for i in items)] if step == 1 else items
        batch = collate([dataset[i] for i in items[rank::ranks]])
        loss = mix_sum(model, batch) / len(items)
        (loss * ranks).backward()  # gradients are averaged over ranks
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if ranks > 1:
            dist.all_reduce(total)
        losses_.append(float(total))
    full = {
        name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in model.state_dict().items()
    }
    return {"losses": losses_, "weights": {name: value.flatten().tolist() for name, value in full.items()}}


def mix_sum(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Algorithm 1's numerator for one batch, by the loss functions alone."""
    n_s = int(batch["counts"][0])
    keep = batch["labels"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = model(**inputs, router_only=True, logits_to_keep=keep, use_cache=False)
    labels, weights_ = batch["labels"][:, 1:], out.routing_weights[:, :-1]
    logprobs = losses.label_logprobs(out.logits[:, :-1], labels).sum(1)
    mask = batch["informative"][:n_s, 1:]
    logits = [e(**inputs, logits_to_keep=keep).logits[:n_s, -keep:-1][mask] for e in model.experts]
    values = losses.routing_loss_normalized(weights_[:n_s][mask], logits, labels[:n_s][mask], vocab_size=V)
    routing = torch.zeros(n_s).index_add(0, mask.nonzero()[:, 0], values)
    sft = (routing / 3 - logprobs[:n_s]) / (labels[:n_s] != -100).sum(1)
    sides = logprobs[n_s:].chunk(2)
    selected = losses.selected_logprobs(weights_, batch["expert_logprobs"][:, 1:]).sum(1)[n_s:].chunk(2)
    margin = losses.cdpo_margin(*sides, *batch["reference"].T, beta=0.1)
    cdpo = losses.cdpo_loss(margin, losses.cdpo_bias(*selected, beta=0.1, alpha=model.config.alpha))
    return sft.sum() / 3 + cdpo.sum()


JOBS = {"cache": job_cache, "train": job_train, "fsdp": job_fsdp}


def run(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rank = int(os.environ.get("RANK", "0"))
    if job["ranks"] > 1 and job["kind"] != "train":  # there the Trainer does
        dist.init_process_group("gloo")
    result = JOBS[job["kind"]](job, rank)
    Path(job["output"]).mkdir(parents=True, exist_ok=True)
    (Path(job["output"]) / f"result_{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def forked(job: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(job)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def launched(job: dict[str, Any], run_id: str) -> int:
    """What torchrun does, but its workers are forked too."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["ranks"],
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(launch, run)(job)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(file: Path) -> None:
    statuses = []
    for i, job in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        statuses.append(forked(job) if job["ranks"] == 1 else launched(job, f"{file.stem}-{i}"))
        file.with_suffix(".status").write_text(json.dumps(statuses), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
