"""The run of ``train_countdown.py`` through ``EBPOTrainer``: TRL's ``GRPOTrainer`` with EBPO's advantages.

Run ``python examples/train_trl.py``. TRL brings what the loop leaves out: checkpoints and ``resume_from_checkpoint``,
several processes, logs, a KL term (``beta``), PEFT, vLLM. Every option of the estimator is a field ``ebpo_...``.
"""

from __future__ import annotations

from typing import Any

import torch

from ebpo_core.tasks.evaluation import evaluate
from ebpo_core.tasks.loading import load_task
from ebpo_core.tasks.tiny_model import build_model, build_tokenizer
from ebpo_core.tasks.warmup import warm_up
from ebpo_core.trainer import EBPOConfig, EBPOTrainer

MAX_NEW_TOKENS = 8  # the longest answer: four numbers, three operators and the end of sequence


def main(*, seed: int = 0, warm_up_steps: int = 120, test_size: int = 600, **options: Any) -> list[float]:
    """pass@1 on held-out problems after the warm-up and after training; ``options`` are fields of ``EBPOConfig``."""
    torch.set_num_threads(1)
    task = load_task("countdown", test_size=test_size, seed=seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    warm_up(model, tokenizer, steps=warm_up_steps, seed=seed)
    found = [evaluate(model, tokenizer, task.test, task.reward, max_new_tokens=MAX_NEW_TOKENS)]
    settings = {
        "output_dir": "runs/train-trl",
        "max_steps": 100,
        "per_device_train_batch_size": 256,  # completions an optimizer step
        "steps_per_generation": 2,  # optimizer steps a batch of completions: 256 prompts, two completions each
        "num_generations": 2,
        "max_completion_length": MAX_NEW_TOKENS,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # on by default in TRL; it would switch the cache of keys and values off
        "save_strategy": "no",
        "report_to": "none",
    }
    config = EBPOConfig(**settings | options)
    trainer = EBPOTrainer(model, task.reward, config, task.train, processing_class=tokenizer)
    trainer.train()
    found.append(evaluate(model, tokenizer, task.test, task.reward, max_new_tokens=MAX_NEW_TOKENS))
    for stage, result in zip(("warm-up", "training"), found, strict=True):
        print(f"pass@1 after the {stage}: {result.pass_at_1:.3f} ± {result.standard_error:.3f}")
    return [result.pass_at_1 for result in found]


if __name__ == "__main__":
    main()
