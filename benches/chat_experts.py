"""Three chat experts of a pre-trained model and a router over them, made from nothing but it: SmolLM2-135M-Instruct.

    python benches/chat_experts.py --output runs/chat       # CPU hours; a kill loses the part at hand
    python benches/chat_experts.py --smoke                  # a tiny model, two steps of each part

====== ===================================== ============== ============================
domain question                              answer         what is asked for
====== ===================================== ============== ============================
sum    ``What is 27 + 45?``                  ``72``         a sum of two digits each
date   ``Write 7 March 1994 as YYYY-MM-DD.`` ``1994-03-07`` another form of a date
sort   ``Sort 41, 7, 23.``                   ``7, 23, 41``  numbers from small to large
====== ===================================== ============== ============================

A message holds one question, or two with "1." and "2." before them, which are answered in two lines: a "pair" of one
domain, or "mixed", of two. Each expert is the model with LoRA trained on its own domain, alone and in pairs, by TRL's
``SFTTrainer``, and merged; the router is the model with LoRA and a route head, trained on everything by
``FusionRouteSFTTrainer``. ``benches/compiled.py --problems-of chat`` compiles what is left in ``--output/checkpoint``.
No question of a test problem is in any training problem.
"""

from __future__ import annotations

import argparse
import calendar
import importlib.util
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from decode import SMOLLM2
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed
from transformers.utils import logging

from ebpo_core.data import Problem
from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.training import FusionRouteSFTConfig, FusionRouteSFTTrainer
from ebpo_core.models import load_model
from ebpo_core.tasks.splits import split_of

DOMAINS = ("sum", "date", "sort")
MIXED = "mixed"
KINDS = (*DOMAINS, MIXED)
ALL_KINDS = (*KINDS, *(f"{domain} pair" for domain in DOMAINS))
SYSTEM = "Answer only."
MAX_ANSWER_TOKENS = 40
MONTHS = calendar.month_name[1:]


def draw(rng: random.Random, domain: str, split: str) -> tuple[str, str]:
    """A question of the split, which depends on the question alone, and its answer."""
    while True:
        if domain == "sum":
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
            key, question, answer = f"{min(a, b)} {max(a, b)}", f"What is {a} + {b}?", str(a + b)
        elif domain == "date":
            day, month, year = rng.randrange(1, 29), rng.randrange(12), rng.randrange(1900, 2100)
            question = f"Write {day} {MONTHS[month]} {year} as YYYY-MM-DD."
            key, answer = question, f"{year}-{month + 1:02d}-{day:02d}"
        else:
            numbers = rng.sample(range(100), 3)
            answer = ", ".join(map(str, sorted(numbers)))
            key, question = answer, f"Sort {', '.join(map(str, numbers))}."
        if split_of(f"{domain} {key}") == split:
            return question, answer


def problems(size: int, seed: int, split: str, kinds: Sequence[str]) -> Iterator[Problem]:
    """``size`` problems, the kinds taking turns; "NAME pair" is a kind, too."""
    rng = random.Random(f"chat experts {split} {seed}")
    for index in range(size):
        kind = kinds[index % len(kinds)]
        domains = (
            rng.sample(DOMAINS, 2) if kind == MIXED else [kind.removesuffix(" pair")] * (1 + kind.endswith("pair"))
        )
        drawn = [draw(rng, domain, split) for domain in domains]
        question, answer = drawn[0]
        if len(drawn) > 1:
            question = " ".join(f"{i}. {each}" for i, (each, _) in enumerate(drawn, 1))
            answer = "\n".join(f"{i}. {each}" for i, (_, each) in enumerate(drawn, 1))
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        yield Problem(str(index), chat, answer, topic=kind)


def rows(found: Sequence[Problem]) -> list[dict[str, Any]]:
    """Rows of conversational training data, with the columns ``prompt`` and ``completion``."""
    return [
        {"prompt": problem.prompt, "completion": [{"role": "assistant", "content": problem.answer}]}
        for problem in found
    ]


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def course(steps: int, batch_size: int, learning_rate: float) -> dict[str, Any]:
    """Arguments of a trainer of transformers that both kinds of training share."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 20),
        "logging_steps": 10,
        "save_strategy": "no",
        "gradient_checkpointing": False,  # TRL's default computes each forward twice, and the batches are small
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),  # slow on a CPU without instructions for it
    }


def train_expert(base: Path, domain: str, folder: Path, steps: int, batch_size: int) -> None:
    """The base with LoRA trained on one domain, merged and saved."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    set_seed(DOMAINS.index(domain))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    kinds = (domain, f"{domain} pair")
    data = rows(list(problems(steps * batch_size, 1 + DOMAINS.index(domain), "train", kinds)))
    with tempfile.TemporaryDirectory() as work:
        arguments = SFTConfig(work, lr_scheduler_type="cosine", **course(steps, batch_size, 1e-3))
        trainer = SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=lora(16)
        )
        trainer.train()
    trainer.model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_router(base: Path, experts: dict[str, Path], folder: Path, steps: int, batch_size: int) -> None:
    """The router over the experts after the SFT phase, with LoRA that is merged."""
    set_seed(9)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = FusionRouteForCausalLM.from_experts(base, dict(experts))
    data = rows(list(problems(steps * batch_size, 9, "train", ALL_KINDS)))
    arguments = FusionRouteSFTConfig(str(folder.parent / "router-work"), **course(steps, batch_size, 5e-4))
    trainer = FusionRouteSFTTrainer(model, arguments, data, processing_class=tokenizer, peft_config=lora(16))
    trainer.train()
    trainer.save_merged(folder)


def make(base: Path, output: Path, expert_steps: int, router_steps: int, batch_size: int) -> None:
    """Everything that is not there yet."""
    experts = {domain: output / "experts" / domain for domain in DOMAINS}
    for domain, folder in experts.items():
        if not (folder / "tokenizer_config.json").is_file():
            train_expert(base, domain, folder, expert_steps, batch_size)
    if not (output / "checkpoint" / "tokenizer_config.json").is_file():
        train_router(base, experts, output / "checkpoint", router_steps, batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder of what is made")
    parser.add_argument("--expert-steps", type=int, default=150)
    parser.add_argument("--router-steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a tiny model with the same tokenizer")
    args = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    if args.output is None and not args.smoke:
        print("left out: pass --output, a folder; it takes CPU hours")
        return
    if importlib.util.find_spec(SMOLLM2) is None:
        print(f"left out: no package {SMOLLM2}")
        return
    model, tokenizer = load_model(f"package:{SMOLLM2}")
    if not args.smoke:
        base = args.output / "base"
        if not (base / "tokenizer_config.json").is_file():
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        make(base, args.output, args.expert_steps, args.router_steps, args.batch_size)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        tokenizer.save_pretrained(base)
        make(base, Path(folder), 2, 2, 2)


if __name__ == "__main__":
    main()
