"""verl's trainer in a Ray actor, as verl's own TaskRunner has it; only the worker groups (GPUs) are stand-ins.

Configuration, TransferQueue, padding, balancing, advantages, checkpoints and resuming are verl's.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch

N = 4
PROMPTS = 3
LONGEST = 5
SOURCES = ("gsm8k", "math", "aime")


def compose(folder: Path, *overrides: str) -> Any:
    """verl's configuration for a run in ``folder``."""
    import verl.trainer
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        return compose(
            "ppo_trainer",
            [
                "algorithm.adv_estimator=ebpo",
                "trainer.checkpoint_callback_class=ebpo_core.integrations.verl.PriorCheckpoint",
                f"trainer.default_local_dir={folder}",
                f"data.train_batch_size={PROMPTS}",
                "actor_rollout_ref.actor.ppo_mini_batch_size=2",
                f"actor_rollout_ref.rollout.n={N}",
                "trainer.save_freq=2",
                *overrides,
            ],
        )


class Workers:
    """The GPU side: two data-parallel ranks that save and load nothing."""

    _dispatch_info = {"actor": [0, 1]}  # noqa: RUF012

    def save_checkpoint(self, local_path: str, *_: Any, **__: Any) -> None:
        Path(local_path).mkdir(parents=True, exist_ok=True)

    def load_checkpoint(self, local_path: str, **_: Any) -> None:
        assert Path(local_path).is_dir()


def rollout(step: int, outputs: int = 1) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """What verl's agent loop puts into TransferQueue for a step: keys, fields and tags of its trajectories.

    With ``outputs`` above 1 every second session has that many, all with the session's reward, as verl's loop does.
    """
    from batches import uid

    rng = np.random.default_rng(step)
    keys, fields, tags = [], [], []
    for prompt in range(PROMPTS):
        for session in range(N):
            reward = float(rng.choice([0.0, 0.5, 1.0])) if prompt else 0.0  # the first prompt is saturated
            for output in range(outputs if session % 2 else 1):
                length = int(rng.integers(1, LONGEST + 1))
                mask = torch.ones(length, dtype=torch.int64)
                scores = torch.zeros(length)
                scores[-1] = reward
                keys.append(f"{uid(step, prompt)}_{session}_{output}")
                fields.append(
                    {
                        "uid": uid(step, prompt),
                        "data_source": SOURCES[(step + prompt) % 3],
                        "extra_info": {"level": prompt % 2},
                        "prompts": torch.ones(2, dtype=torch.int64),
                        "responses": mask.clone(),
                        "response_mask": mask,
                        "rm_scores": scores,
                    }
                )
                tags.append({"status": "success", "prompt_len": 2, "response_len": length, "seq_len": 2 + length})
    return keys, fields, tags


@ray.remote(num_cpus=1)
class Runner:
    """A process that trains: verl's ``PPOTrainerSync`` without its GPUs."""

    def start(self, config: Any) -> int:
        """As ``TaskRunnerV1.run`` and ``PPOTrainer._setup``, up to the loaded checkpoint; the step resumed from."""
        import transfer_queue
        from torchdata.stateful_dataloader import StatefulDataLoader
        from verl.trainer.ppo.v1 import get_trainer_cls

        transfer_queue.init()
        self.trainer = get_trainer_cls("sync")(config=config)
        self.trainer.actor_rollout_wg = Workers()
        self.trainer.tokenizer = SimpleNamespace(eos_token_id=0)
        self.trainer.train_dataloader = StatefulDataLoader(list(range(1000)), batch_size=PROMPTS)
        self.trainer._load_checkpoint()
        return int(self.trainer.global_steps)

    def train(self, steps: int, outputs: int = 1, killed_at: int | None = None) -> dict[str, Any]:
        """Train to step ``steps``: each trajectory's advantage by key, each step's metrics and the rows verl saw."""
        import transfer_queue
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        trainer, done = self.trainer, {"advantages": {}, "metrics": {}, "rows": {}}
        for step in range(trainer.global_steps + 1, steps + 1):
            trainer.global_steps = step
            keys, fields, tags = rollout(step, outputs)
            batch = transfer_queue.kv_batch_put(
                keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags
            )
            metrics: dict[str, Any] = {}
            batch = trainer._balance_batch(batch, metrics=metrics)
            if step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            order = list(batch.keys)
            trainer._compute_advantage(batch, metrics=metrics)
            data = transfer_queue.kv_batch_get(keys=order, partition_id="train", select_fields=["advantages"])
            rows = [row.tolist() for row in data["advantages"].unbind()]
            done["advantages"] |= dict(zip(order, rows, strict=True))
            done["metrics"][step] = {name: value for name, value in metrics.items() if name.startswith("ebpo/")}
            done["rows"][step] = order
            transfer_queue.kv_clear(keys=order, partition_id="train")
            if step % trainer.config.trainer.save_freq == 0:
                trainer._save_checkpoint()
        return done

    def state(self) -> dict[str, Any]:
        """The estimator's state in this process; empty where verl trains with another one."""
        from ebpo_core.integrations.verl import estimator as verl_estimator

        algorithm = self.trainer.config.algorithm
        return verl_estimator.running(algorithm).state_dict() if verl_estimator.is_ebpo(algorithm) else {}
