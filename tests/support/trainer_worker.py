"""A tiny policy, task and trainer for the trainer tests, and the script that they run as a process of its own.

``python tests/support/trainer_worker.py --output DIR --steps N`` trains and writes what a test compares to
``DIR/result_<rank>.json``; ``--kill-in-save S`` and ``--kill-in-reward S`` end it with a real SIGKILL.
``python tests/support/trainer_worker.py JOBS.json`` runs a list of such jobs in forked processes, since importing TRL
takes most of the time of runs this small, and writes their exit statuses to ``JOBS.status``.
"""

from __future__ import annotations

import argparse
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

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from ebpo_core.trainer import EBPOConfig, EBPOTrainer, last_complete_checkpoint

GROUP = 4
SPECIALS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words 0 to 9 and three specials, split at spaces."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS.values(), *map(str, range(10))])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def model(seed: int = 0) -> LlamaForCausalLM:
    """About 11,000 random parameters, the same ones for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config)


def prompts(count: int = 6) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i % 10} {i // 10} {(7 * i) % 10}" for i in range(count)]})


def key(prompt: str) -> tuple[str, int | None]:
    """A topic and a level that a prompt's first number tells; every fifth prompt has no level."""
    number = int(prompt.split()[0])
    return "odd" if number % 2 else "even", None if number % 5 == 0 else number % 3


def keyed_prompts(count: int = 6) -> Dataset:
    """The same prompts with their keys in the columns ``topic`` and ``level``, and as lists in ``path``."""
    texts = prompts(count)["prompt"]
    topics, levels = zip(*map(key, texts), strict=True)
    paths = [[topic] if level is None else [topic, str(level)] for topic, level in zip(topics, levels, strict=True)]
    columns = {"prompt": texts, "topic": list(topics), "level": list(levels), "path": paths}
    return Dataset.from_dict({name: list(column) for name, column in columns.items()})


def third(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 where the token ids sum to a multiple of 3: binary, about a third of random completions."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def size(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The mean token id: a shaped reward."""
    return [sum(ids) / (10 * max(len(ids), 1)) for ids in completion_ids]


def config(cls: type[GRPOConfig], output: Path | str, **settings: Any) -> Any:
    """A config of two groups of four per step, on CPU, silent."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2 * GROUP,
        "per_device_eval_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return cls(**(defaults | settings))


class Recorder:
    """In front of a trainer: keeps what each generation batch was scored with and got."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modes: list[str] = []
        self.prompts: list[list[str]] = []
        self.rewards: list[torch.Tensor] = []
        self.outputs: list[dict[str, torch.Tensor]] = []

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self.modes.append("train" if self.model.training else "eval")
        self.rewards.append(rewards.clone())
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.prompts.append([example["prompt"] for example in inputs])
        output = super()._generate_and_score_completions(inputs)
        self.outputs.append({k: v.clone() for k, v in output.items() if isinstance(v, torch.Tensor)})
        return output


class RecordingEBPO(Recorder, EBPOTrainer):
    pass


class RecordingGRPO(Recorder, GRPOTrainer):
    pass


def build(cls: type[Any], args: Any, reward_funcs: Any = third, **settings: Any) -> Any:
    """A trainer of the tiny model on the tiny task."""
    defaults = {
        "model": model(),
        "reward_funcs": reward_funcs,
        "args": args,
        "train_dataset": prompts(),
        "processing_class": tokenizer(),
    }
    return cls(**(defaults | settings))


AGENT = {
    "ebpo_turns": True,
    "ebpo_normalize": "none",
    "ebpo_leave_one_out": "row",
    "max_completion_length": 200,
    "max_tool_calling_iterations": 3,
    "learning_rate": 1e-4,
}


def agent_trainer(args: Any, turns: list[list[list[float]]]) -> Any:
    """A trainer of the policy of ``agent_policy``; what the reward function answers goes into ``turns``."""
    import agent_policy

    def lengths(completions: list[Any], **_: Any) -> list[list[float]]:
        """For each assistant message the number of its characters."""
        own = [[message for message in talk if message["role"] == "assistant"] for talk in completions]
        turns.append([[float(len(str(message.get("content", "")))) - 0.5 for message in talk] for talk in own])
        return turns[-1]

    tokens = agent_policy.tokenizer()
    return RecordingEBPO(
        agent_policy.policy(tokens),
        lengths,
        args,
        train_dataset=agent_policy.prompts(),
        processing_class=tokens,
        tools=[agent_policy.look],
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal ends the process before this returns


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2 * GROUP, help="completions per process and step")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-in-save", type=int, help="die half-way through writing this checkpoint")
    parser.add_argument("--kill-in-reward", type=int, help="die while the batch after this step is scored")
    parser.add_argument("--keys", nargs="+", help="columns of the dataset that name a prompt's key")
    parser.add_argument("--per-reward", action="store_true", help="two reward functions, a prior for each")
    parser.add_argument("--turns", action="store_true", help="an agent that calls a tool, with a reward for each turn")
    parser.add_argument("--slow-rank", type=int, help="this rank is late when it saves its random state")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    trainer: Any = None

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if trainer.state.global_step == options.kill_in_reward:
            die()
        return third(completion_ids)

    args = config(
        EBPOConfig,
        options.output,
        max_steps=options.steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        per_device_train_batch_size=options.batch,
        ebpo_keys=options.keys,
        ebpo_per_reward=options.per_reward,
        **(AGENT if options.turns else {}),
        reward_weights=[1.0, -0.5] if options.per_reward else None,
    )
    functions = [reward, size] if options.per_reward else reward
    turns: list[list[list[float]]] = []  # rewards of every batch's completions, turn by turn
    if options.turns:
        trainer = agent_trainer(args, turns)
    else:
        trainer = build(RecordingEBPO, args, functions, train_dataset=keyed_prompts() if options.keys else prompts())

    save_rng_state = transformers.Trainer._save_rng_state

    def slow_or_deadly(self: Any, output_dir: str) -> None:
        if self.state.global_step == options.kill_in_save:
            die()
        if self.args.process_index == options.slow_rank:
            time.sleep(0.5)
        save_rng_state(self, output_dir)

    transformers.Trainer._save_rng_state = slow_or_deadly

    resumed_from = last_complete_checkpoint(options.output) if options.resume else None
    trainer.train(resume_from_checkpoint=options.resume or None)
    result = {
        "resumed_from": resumed_from,
        "state": [ebpo.state_dict() for ebpo in trainer.ebpos],
        "prompts": trainer.prompts,
        "turns": turns,
        "rewards": [rewards.T.flatten().tolist() for rewards in trainer.rewards],
        "advantages": [output["advantages"].tolist() for output in trainer.outputs],
        "logged": list(trainer._logs["advantages"]),
        "weights": {name: value.flatten().tolist() for name, value in trainer.model.state_dict().items()},
    }
    path = Path(options.output) / f"result_{trainer.accelerator.process_index}.json"
    path.write_text(json.dumps(result), encoding="utf-8")


def run_jobs(file: Path) -> None:
    statuses = []
    for job in json.loads(file.read_text(encoding="utf-8")):
        if job["ranks"] == 1:
            child = os.fork()
            if child == 0:
                try:
                    main(job["arguments"])
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:  # what torchrun does, but its workers are forked too
            launch = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=job["ranks"],
                run_id=file.stem,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                start_method="fork",
            )
            elastic_launch(launch, main)(job["arguments"])
            statuses.append(0)
    file.with_suffix(".status").write_text(json.dumps(statuses), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        run_jobs(Path(sys.argv[1]))
    else:
        main(sys.argv[1:])
