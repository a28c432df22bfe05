"""Runner of the training study: queues cells, resumes after a kill, and prints how long the rest will take.

    python benches/evidence/training.py                 # all that is missing, decisive cells first
    python benches/evidence/training.py --list          # what there is, what is missing, how long it will take
    python benches/evidence/training.py --only '{"task":"countdown","rung":"middle","G":2,"arm":"ebpo","seed":3}'

Each run has one thread. Its record is appended to ``records/training.jsonl`` at its end, with the hash of its
configuration, the commit, the processor and PyTorch's version. A run with another configuration has another hash and
is never mixed in. ``--workers N`` runs N at once; where one fails, those under way are recorded and no other begins.
``--stage`` limits the queue to one of ``STAGES``: "rates" tunes the learning rates that the others use, "main" is the
family of the protocol's contrasts, "arms" the other rules on the same rung, "ladder" the other rungs and tasks, "scale"
the advantages of equal root mean square, "calls" one prompt in a call of the rule, "repeat" 512 prompts that come back,
with a prior for each, "common" one learning rate for all arms, "smollm2" a real pre-trained model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "examples")]
sys.path.append(str(HERE.parent))
RECORDS = HERE / "records" / "training.jsonl"

PROTOCOL = 1
"""Changes with anything that changes a run's numbers without being in its configuration."""

WARM_UPS = 4
"""Warmed-up policies of each rung; a run takes the one of its seed modulo this, so that no result hangs on one."""

BASES = ROOT / "runs" / "evidence" / f"protocol-{PROTOCOL}"
"""Folder of the warmed-up policies."""

STEPS, ROLLOUTS = 75, 512
RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEEDS = (1000, 1001)
DEFAULT_RATE = 4e-4
COMMON_RATE, COMMON_SIZES = 2e-4, (2, 4, 8)
STAGES = ("rates", "main", "common", "arms", "ladder", "scale", "calls", "repeat", "smollm2")
Step = tuple[str, Sequence[str] | None, Sequence[int] | None, Sequence[int] | None]
ORDER: tuple[Step, ...] = (
    *(
        (stage, arms, (2,), range(10))
        for arms in (("ebpo", "grpo"), ("constant", "batch_mean"), ("rloo", "ebpo_options"))
        for stage in ("rates", "main", "common")
    ),
    ("arms", ("mix_50", "mix_0"), (2,), None),
    ("main", None, (2,), None),
    *((stage, None, None, None) for stage in STAGES[1:]),
)
"""What a run of everything does, step after step: a stage, and the arms, sizes and seeds that it is limited to."""
MAIN_ARMS = ("ebpo", "grpo", "ebpo_options", "constant", "batch_mean", "rloo")
MORE_ARMS = (
    "mix_50",
    "mix_0",
    "mix_25",
    "mix_75",
    "james_stein",
    "reinforce_pp",
    "dr_grpo",
    "maxrl",
    "dapo",
    "ebpo_topic",
    "grpo_again",
)
LADDER_ARMS = ("grpo", "ebpo", "constant", "batch_mean")
REPEAT_ARMS = ("grpo", "ebpo", "tracker", "constant")
EVALUATION_SAMPLES = 16
"""Completions of each held-out prompt after training, all of which count for pass@1."""

Config = dict[str, Any]


def configuration(
    task: str, rung: str, G: int, arm: str, seed: int, rate: float, equal_rms: bool = False, **more: int
) -> Config:
    """Everything that decides a run's numbers.

    ``more`` names what a cell has besides: ``prompts_per_call`` of the rule, and ``train_size``, the number of prompts.
    """
    settings = {"steps": STEPS, "rollouts": ROLLOUTS, "updates": 2, "samples": EVALUATION_SAMPLES, "protocol": PROTOCOL}
    return {
        "task": task,
        "rung": rung,
        "G": G,
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "equal_rms": equal_rms,
        **settings,
        **more,
    }


def name_of(config: Config) -> str:
    """Hash of a configuration, by which records are found."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def tuning(arm: str) -> Iterator[Config]:
    """Runs that choose an arm's learning rate."""
    for rate, seed in product(RATES, TUNING_SEEDS):
        yield configuration("countdown", "middle", 2, arm, seed, rate)


def tuned_with(arm: str) -> str:
    """The arm whose learning rate an arm takes: its own in the main contrasts, else GRPO's."""
    return arm if arm in MAIN_ARMS else "grpo"


def queue(stage: str, rates: dict[str, float]) -> Iterator[Config]:
    """Cells of a stage in their order; ``rates`` holds the tuned learning rate of each arm that has one."""

    def cell(task: str, rung: str, G: int, arm: str, seed: int, equal_rms: bool = False, **more: int) -> Config:
        rate = rates.get(tuned_with(arm), DEFAULT_RATE)
        return configuration(task, rung, G, arm, seed, rate, equal_rms, **more)

    if stage == "rates":
        for arm in MAIN_ARMS:
            yield from tuning(arm)
    elif stage == "main":  # seed by seed, so that a cut leaves whole pairs
        for G, seed, arm in product((2, 4), range(20), MAIN_ARMS):
            yield cell("countdown", "middle", G, arm, seed)
    elif stage == "common":  # where an arm was tuned to this rate, its run is the one of "main"
        for G in COMMON_SIZES:  # at G = 8 the arms and seeds of the ladder
            seeds, arms = (range(20), MAIN_ARMS) if G < 8 else (range(10), LADDER_ARMS)
            for seed, arm in product(seeds, arms):
                yield configuration("countdown", "middle", G, arm, seed, COMMON_RATE)
        rungs = (*product(("sorting",), ("middle", "low", "high")), ("countdown", "low"), ("countdown", "high"))
        for (task, rung), G, seed, arm in product(rungs, (2, 4), range(10), (*LADDER_ARMS, "mix_50", "ebpo_options")):
            yield configuration(task, rung, G, arm, seed, COMMON_RATE)
    elif stage == "arms":
        for G, arms in ((2, MORE_ARMS), (4, MORE_ARMS[:1])):
            for seed, arm in product(range(10, 20), arms):
                yield cell("countdown", "middle", G, arm, seed)
    elif stage == "ladder":
        rungs = (
            *product(("countdown",), ("low", "high"), (2, 4)),
            ("countdown", "middle", 8),
            *product(("sorting",), ("middle", "low", "high"), (2, 4)),
        )
        for seed, (task, rung, G), arm in product(range(10), rungs, LADDER_ARMS):
            yield cell(task, rung, G, arm, seed)
    elif stage == "scale":
        for seed, arm in product(range(10), MAIN_ARMS):  # at one rate: a larger step is what this takes away
            yield configuration("countdown", "middle", 2, arm, seed, COMMON_RATE, equal_rms=True)
    elif stage == "calls":  # the rule sees one prompt at a time, as in TRL on one device by default
        for seed, arm in product(range(10), ("grpo", "ebpo", "ebpo_options")):
            yield cell("countdown", "middle", 8, arm, seed, prompts_per_call=1)
    elif stage == "smollm2":
        for seed, arm in product(range(10), ("ebpo", "grpo", "constant")):
            pretrained = configuration("arithmetic", "smollm2", 4, arm, seed, 3e-4)
            yield {**pretrained, "steps": 40, "rollouts": 64, "samples": 4}
    elif stage == "repeat":  # each prompt comes some 35 or 70 times
        for seed in range(10):
            for G, arm in (*product((1,), ("batch_mean", "tracker", "constant", "ebpo")), *product((2,), REPEAT_ARMS)):
                yield cell("countdown", "middle", G, arm, seed, train_size=512)


def run(config: Config) -> dict[str, Any]:
    """Train and evaluate one policy; the record without commit and times depends on the configuration alone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    import torch
    import train_countdown as loop
    from ladder import MAX_NEW_TOKENS, TASKS, TRAIN_SIZE, base_policy
    from rules import RULES

    from ebpo_core.evaluation.estimators import majority_at_k, pass_at_k

    torch.set_num_threads(1)
    seed, G = config["seed"], config["G"]
    task = TASKS[config["task"]](seed, config.get("train_size", TRAIN_SIZE))
    policy = base_policy(config["task"], config["rung"], seed % WARM_UPS, BASES)
    rule = RULES[config["arm"]]()
    topics = np.array(task.train["topic"])
    loop.MAX_NEW_TOKENS = MAX_NEW_TOKENS[config["task"]]
    curves: dict[str, list[float]] = {name: [] for name in ("failed", "passed", "equal", "advantage_rms")}

    def score(rewards: Any, groups: Any) -> Any:
        rows = G * config.get("prompts_per_call", config["rollouts"] // G)
        parts = [slice(start, start + rows) for start in range(0, len(rewards), rows)]
        advantages = np.concatenate([rule(rewards[part], groups[part], topics[groups[part]]) for part in parts])
        rms = float(np.sqrt(np.mean(advantages**2)))
        by_group = rewards.reshape(-1, G)
        curves["failed"].append(round(float(np.mean(by_group.max(1) <= 0)), 4))
        curves["passed"].append(round(float(np.mean(by_group.min(1) >= 1)), 4))
        curves["equal"].append(round(float(np.mean(by_group.max(1) == by_group.min(1))), 4))
        curves["advantage_rms"].append(round(rms, 4))
        if config["arm"] == "dapo":  # the loss is averaged over the groups that were kept
            advantages = advantages * len(by_group) / max(1, int((by_group.max(1) > by_group.min(1)).sum()))
        return advantages / rms if config["equal_rms"] and rms > 0 else advantages

    def evaluate() -> dict[str, float]:
        torch.manual_seed(10_000)
        outcomes = []
        prompts, columns = task.test["prompt"], {name: task.test[name] for name in task.test.column_names}
        del columns["prompt"]
        n = config["samples"]
        for start in range(0, len(prompts), 64):
            part = list(prompts[start : start + 64])
            rollout = loop.sample(policy, part, n)
            texts = policy.tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
            given = {
                name: [v for v in values[start : start + 64] for _ in range(n)] for name, values in columns.items()
            }
            scores = task.reward(prompts=[p for p in part for _ in range(n)], completions=texts, **given)
            for q in range(len(part)):
                right = [score >= 1 for score in scores[q * n : q * n + n]]
                answers = texts[q * n : q * n + n]
                found = {a for a, r in zip(answers, right, strict=True) if r}
                outcomes.append(
                    (np.mean(right), pass_at_k(n, sum(right), n), majority_at_k(answers, right, n), len(found))
                )
        names = ("pass@1", f"pass@{n}", f"maj@{n}", "distinct")
        return {name: round(float(value), 5) for name, value in zip(names, np.mean(outcomes, 0), strict=True)}

    def divergence(rollout: Any) -> float:
        """KL of the new policy from the one that sampled, a token, by samples."""
        with torch.no_grad():
            ratio = loop.logprobs_of(policy.model, rollout) - rollout.logprobs
            return float(((ratio.exp() - 1 - ratio) * rollout.mask).sum() / rollout.mask.sum())

    kl: list[float] = []

    def on_step(record: dict[str, float], rollout: Any) -> None:
        if record["step"] % 10 == 1:
            kl.append(round(divergence(rollout), 6))

    policy.model.eval()
    before = evaluate()
    policy.model.train()
    steps = loop.train(
        policy,
        task,
        score,
        steps=config["steps"],
        prompts_per_step=config["rollouts"] // G,
        group_size=G,
        updates=config["updates"],
        learning_rate=config["rate"],
        # The sampled tokens of the replicate differ, its prompts do not.
        seed=seed,
        sampling_seed=seed + 500_000 if config["arm"] == "grpo_again" else seed,
        on_step=on_step,
    )
    policy.model.eval()
    for name in ("reward", "entropy", "grad_norm"):
        curves[name] = [round(record[name], 4) for record in steps]
    return {"before": before, "after": evaluate(), "kl": kl, "curves": {k: v[::3] for k, v in curves.items()}}


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Records of a file in their order; a line that a kill cut short is passed over."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def recorded() -> dict[str, dict[str, Any]]:
    """Records on disk, by their hash."""
    return {record["hash"]: record for record in lines_of(RECORDS)}


def tuned_rates(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Best learning rate of each arm that was tuned in full: highest mean pass@1 over the tuning seeds."""
    rates = {}
    for arm in MAIN_ARMS:
        means: dict[float, list[float]] = {}
        configs = list(tuning(arm))
        if all(name_of(config) in records for config in configs):
            for config in configs:
                means.setdefault(config["rate"], []).append(records[name_of(config)]["after"]["pass@1"])
            rates[arm] = max(means, key=lambda rate: sum(means[rate]))
    return rates


def append(record: dict[str, Any]) -> None:
    """Add a line that is on the disk when this returns."""
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a+b") as file:
        file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
        cut_short = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_short + json.dumps(record, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def machine() -> dict[str, str]:
    """What, besides configuration and commit, decides the bits of a run."""
    import torch
    from advantages import processor

    return {"cpu": processor(), "torch": torch.__version__}


def timed(config: Config) -> tuple[dict[str, Any], float]:
    """A run's record with its CPU seconds, in a worker."""
    started = time.process_time()
    result = run(config)
    return {**result, **machine()}, time.process_time() - started


def commit() -> str:
    """The commit that is checked out, marked where files other than records differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)  # noqa: S607
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RECORDS.parent.relative_to(ROOT)}")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def run_all(missing: list[Config], workers: int) -> None:
    """Run cells in their order, a record each as soon as it is done.

    Raises:
        Exception: the first error of a run, once the runs that were under way have ended.
    """
    version = commit()
    failed: BaseException | None = None
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(timed, config): config for config in missing}
        while pending:
            ended = next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
            config = pending.pop(ended)
            if (error := ended.exception()) is not None:
                failed = failed or error
                pending = {run: config for run, config in pending.items() if not run.cancel()}
                continue
            result, seconds = ended.result()
            known = {"hash": name_of(config), "commit": version, "config": config}
            append({**known, **result, "cpu_seconds": round(seconds, 1)})
            shown = (config[name] for name in ("task", "rung", "G", "arm", "seed", "rate"))
            print(*shown, result["after"]["pass@1"], f"{seconds:.0f} s", flush=True)
    if failed is not None:
        raise failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", type=json.loads, help="one configuration, printed as a record and not written")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--tasks", nargs="+", help="of the stage, these alone")
    parser.add_argument("--rungs", nargs="+", help="of the stage, these alone")
    parser.add_argument("--arms", nargs="+", help="of the stage, these alone")
    parser.add_argument("--G", type=int, nargs="+", help="of the stage, these group sizes alone")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the stage, these seeds alone")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two tiny runs, nothing written")
    arguments = parser.parse_args()
    if arguments.smoke:
        import ladder

        ladder.WARM_UP_STEPS.update(dict.fromkeys(ladder.WARM_UP_STEPS, 2))
        for task, arm in (("sorting", "ebpo"), ("countdown", "dapo")):
            tiny = configuration(task, "low", 2, arm, 0, DEFAULT_RATE)
            print(json.dumps(run({**tiny, "steps": 2, "rollouts": 32, "samples": 2})))
        return
    limits = ("tasks", "rungs", "arms", "G", "seeds")
    if arguments.stage is None and (given := [f"--{name}" for name in limits if getattr(arguments, name) is not None]):
        parser.error(f"{' '.join(given)}: of which stage? add --stage")
    records = recorded()
    rates = tuned_rates(records)
    if arguments.only:
        rate = rates.get(tuned_with(arguments.only["arm"]), DEFAULT_RATE)
        config = configuration(**{"rate": rate, **arguments.only})
        print(json.dumps({"hash": name_of(config), "config": config, **run(config)}))
        return
    filters = (arguments.arms, arguments.G, arguments.seeds)
    for stage, arms, sizes, seeds in [(arguments.stage, *filters)] if arguments.stage else ORDER:
        records = recorded()
        rates = tuned_rates(records)
        wanted = [
            config
            for config in queue(stage, rates)
            if (arguments.tasks is None or config["task"] in arguments.tasks)
            and (arguments.rungs is None or config["rung"] in arguments.rungs)
            and (arms is None or config["arm"] in arms)
            and (sizes is None or config["G"] in sizes)
            and (seeds is None or config["seed"] in seeds or stage == "rates")
        ]
        untuned = {tuned_with(config["arm"]) for config in wanted} - set(rates)
        if stage not in ("rates", "common") and untuned and not arguments.list:
            names = " ".join(sorted(untuned))
            parser.error(f"--stage {stage}: the learning rates come first, run --stage rates --arms {names}")
        missing = [config for config in wanted if name_of(config) not in records]
        spent = [record["cpu_seconds"] for record in records.values()]
        each = sum(spent) / len(spent) if spent else 100.0
        done, hours = len(wanted) - len(missing), len(missing) * each / 3600
        name = " ".join((stage, *(arms or ["all arms"])))
        print(f"{name}: {done} of {len(wanted)} runs done, {hours:.1f} CPU hours to go; rates {rates}", flush=True)
        if not arguments.list:
            run_all(missing, arguments.workers)


if __name__ == "__main__":
    main()
