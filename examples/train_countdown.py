"""Reinforcement learning with EBPO in one file: a one-million-parameter Llama learns mini-countdown on one CPU thread.

Run ``python examples/train_countdown.py``. A supervised warm-up gives a policy that solves one problem in five. Then,
step after step: sample a group of completions for each prompt, score them, turn rewards into advantages
(``ebpo_core.EBPO``), and take clipped policy-gradient steps (Schulman et al. 2017). Copy it and change what you like;
any function of rewards and groups can stand in EBPO's place, ``partial(ebpo_core.advantages, method="grpo")`` for one.

It leaves out: a KL term, a reference model, a value network, learning-rate schedules, half precision, more processes
than one, checkpoints and logs; for those see ``train_trl.py``. A seed gives the same numbers on a machine, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ebpo_core
from ebpo_core.evaluation import evaluate
from ebpo_core.tasks import countdown
from ebpo_core.tasks.loading import Task, load_task
from ebpo_core.tasks.tiny_model import build_model, build_tokenizer
from ebpo_core.tasks.warmup import warm_up

MAX_NEW_TOKENS = countdown.MAX_COMPLETION_TOKENS

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (N,) rewards and the group of each, to (N,) advantages


class Policy(NamedTuple):
    """A causal language model of transformers and its tokenizer."""

    model: Any
    tokenizer: Any


class Rollout(NamedTuple):
    """N sampled completions of up to T tokens, behind prompts of up to P tokens, which are padded on the left."""

    prompts: Tensor  # (N, P) int64
    prompt_mask: Tensor  # (N, P) int64, 0 on padding
    completions: Tensor  # (N, T) int64
    mask: Tensor  # (N, T) int64, 1 on what was sampled, up to and with the end of sequence
    logprobs: Tensor  # (N, T) float32, of each token when it was sampled


def warm_policy(steps: int = 120, *, seed: int = 0, **size: int) -> Policy:
    """A fresh policy after supervised steps on solved problems: one that never succeeds has nothing to learn from."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed, **size)
    warm_up(model, tokenizer, steps=steps, seed=seed)
    return Policy(model, tokenizer)


@torch.no_grad()
def sample(policy: Policy, prompts: list[str], group_size: int) -> Rollout:
    """``group_size`` completions a prompt, side by side, from the policy's own distribution: nothing truncates it."""
    model, tokenizer = policy
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    untruncated = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = {"num_return_sequences": group_size, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, **untruncated, **wanted)
    completions = out.sequences[:, ids.shape[1] :]
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(2, completions[..., None])[..., 0]
    ended = (completions == tokenizer.eos_token_id).long()
    sampled = (ended.cumsum(1) - ended == 0).long()  # no end of sequence before this token
    return Rollout(*(each.repeat_interleave(group_size, 0) for each in (ids, mask)), completions, sampled, logprobs)


def logprobs_of(model: Any, rollout: Rollout) -> Tensor:
    """Log-probabilities ``(N, T)`` that the model gives to the sampled tokens now."""
    ids = torch.cat([rollout.prompts, rollout.completions], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # the first token that is no padding stands at 0
    kept = rollout.completions.shape[1] + 1  # the logits of a token stand one place before it
    logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept, use_cache=False).logits
    return logits[:, :-1].log_softmax(-1).gather(2, rollout.completions[..., None])[..., 0]


def policy_loss(model: Any, rollout: Rollout, advantages: Tensor, clip: float) -> Tensor:
    """The clipped surrogate, negated, averaged over sampled tokens; ``advantages`` is ``(N,)``, one a completion."""
    ratio, advantages = (logprobs_of(model, rollout) - rollout.logprobs).exp(), advantages[:, None]
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gain * rollout.mask).sum() / rollout.mask.sum()


def train(
    policy: Policy,
    task: Task,
    rule: Rule,
    *,
    steps: int = 50,
    prompts_per_step: int = 256,
    group_size: int = 2,
    updates: int = 2,
    learning_rate: float = 3e-4,
    clip: float = 0.2,
    seed: int = 0,
    sampling_seed: int | None = None,
    on_step: Callable[[dict[str, float], Rollout], None] = lambda record, _: print(record),
) -> list[dict[str, float]]:
    """Train ``policy`` in place, ``updates`` optimizer steps a batch, each on its own part of it; a record a step.

    ``rule`` gets as groups the row in ``task.train`` of each completion's prompt, so it may look up topic or level.
    """
    torch.manual_seed(seed if sampling_seed is None else sampling_seed)  # of the completions
    order = np.random.default_rng(seed)  # of the prompts, alike for all rules
    model, tokenizer = policy
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    records = []
    for step in range(1, steps + 1):
        groups = order.choice(len(task.train), prompts_per_step, replace=False).repeat(group_size)  # (N,)
        columns = task.train[groups]
        prompts = columns.pop("prompt")
        rollout = sample(policy, prompts[::group_size], group_size)
        texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        rewards = np.array(task.reward(prompts=prompts, completions=texts, **columns))
        advantages = torch.tensor(rule(rewards, groups), dtype=torch.float32)
        for part in np.array_split(order.permutation(len(groups)), updates):
            policy_loss(model, Rollout(*(each[part] for each in rollout)), advantages[part], clip).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        surprise = -(rollout.logprobs * rollout.mask).sum() / rollout.mask.sum()  # its mean is the entropy of a token
        record = {"step": step, "reward": rewards.mean(), "entropy": surprise, "grad_norm": norm}
        records.append({name: round(float(value), 6) for name, value in record.items()})
        on_step(records[-1], rollout)
    return records


def main(rule: Rule, *, seed: int = 0, warm_up_steps: int = 120, test_size: int = 600, **options: Any) -> list[float]:
    """pass@1 on held-out problems after the warm-up and after training with ``rule``; ``options`` go to ``train``."""
    torch.set_num_threads(1)
    task = load_task("countdown", test_size=test_size, seed=seed)
    policy = warm_policy(warm_up_steps, seed=seed)
    found = [evaluate(*policy, task.test, task.reward, max_new_tokens=MAX_NEW_TOKENS)]
    train(policy, task, rule, seed=seed, **options)
    found.append(evaluate(*policy, task.test, task.reward, max_new_tokens=MAX_NEW_TOKENS))
    for stage, result in zip(("warm-up", "training"), found, strict=True):
        print(f"pass@1 after the {stage}: {result.pass_at_1:.3f} ± {result.standard_error:.3f}")
    return [result.pass_at_1 for result in found]


if __name__ == "__main__":
    main(ebpo_core.EBPO())
