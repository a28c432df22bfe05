"""EBPO advantages by our core, the NumPy twin, torch and verl (if installed), with a copy of the input as the floor.

    python benches/advantages.py [--against PATH] [--json PATH] [--smoke]

All rows of a size are timed in turn, in short rounds, and the best round counts, by its time or the CPU time of all its
threads, whichever is less: on a shared machine that is what the code costs, the rest is what the neighbours did. Ratios
are against the NumPy twin of the same run.

Then, of estimators that hold 100,000 and a million keys: an update with 512 of them, their state, and their memory.

PATH of ``--against`` is a folder that holds another build of the package, ``PATH/ebpo_core``, whose rows stand beside
ours.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

import ebpo_core
from ebpo_core import reference

SIZES = [(64, 8), (512, 8), (4096, 16), (65_536, 16), (1 << 20, 16)]
GOALS = {(64, 8): 25, (512, 8): 15, (4096, 16): 8, (65_536, 16): 20, (1 << 20, 16): 20}
"""Times the twin."""
STATEFUL = {(64, 8): 2.0, (512, 8): 1.5, (4096, 16): 1.5}
"""At most so many times the stateless call."""
STATELESS_ROW, STATEFUL_ROW = "ebpo_core.advantages", "ebpo_core.EBPO (stateful)"
KEYED_ROW, KEYED = "ebpo_core.EBPO, six keys", 4.0
"""At most so many times the stateless call, where there is a goal for the stateful one."""
MANY_KEYS = (100_000, 1_000_000)
Row = tuple[str, Callable[[], Any]]


def build_in(folder: Path) -> Any:
    """Another build of the package, imported beside ours; its extension module is a file of its own."""

    def taken_out() -> dict[str, Any]:
        names = [name for name in sys.modules if name == "ebpo_core" or name.startswith("ebpo_core.")]
        return {name: sys.modules.pop(name) for name in names}

    ours = taken_out()
    sys.path.insert(0, str(folder))
    try:
        build = importlib.import_module("ebpo_core")
    finally:
        sys.path.remove(str(folder))
        taken_out()
        sys.modules.update(ours)
    if not Path(build.__file__).is_relative_to(folder.resolve()):
        raise SystemExit(f"--against {folder}: no package ebpo_core in it")
    return build


def peers(r: np.ndarray, against: Any = None) -> list[Row]:
    """The implementations that take an ``(M, G)`` matrix."""
    stateful = ebpo_core.EBPO()
    rows: list[Row] = [
        ("copy of the input", r.copy),
        ("NumPy twin", lambda: reference.algorithm_1(r)),
        (STATELESS_ROW, lambda: ebpo_core.advantages(r)),
        (STATEFUL_ROW, lambda: stateful(r)),
        ('ebpo_core method="grpo"', lambda: ebpo_core.advantages(r, method="grpo")),
    ]
    keys = [f"topic {topic}" for topic in range(6)]
    keys = [keys[topic] for topic in np.random.default_rng(2).integers(6, size=len(r))]
    keyed = ebpo_core.EBPO()
    if r.shape in STATEFUL:
        rows.append((KEYED_ROW, lambda: keyed(r, keys=keys)))
    if against is not None:
        before, keyed_before = against.EBPO(), against.EBPO()
        rows += [
            (f"{STATELESS_ROW}, before", lambda: against.advantages(r)),
            (f"{STATEFUL_ROW}, before", lambda: before(r)),
        ]
        if r.shape in STATEFUL:
            rows.append((f"{KEYED_ROW}, before", lambda: keyed_before(r, keys=keys)))
    if importlib.util.find_spec("torch"):
        import torch

        t = torch.from_numpy(r)
        rows.append(("ebpo_core.advantages, tensor", lambda: ebpo_core.advantages(t)))
        rows.append(("torch EBPO", lambda: torch_ebpo(t)))
        rows.append(("torch GRPO, as TRL", lambda: trl_grpo(t)))
    if importlib.util.find_spec("verl") and r.size <= 65_536:  # its loop takes seconds beyond
        rows += verl_rows(r)
    return rows


def torch_ebpo(r: Any) -> Any:
    """Algorithm 1 in plain torch, float64 inside as ours."""
    x = r.double()
    G = x.shape[1]
    mu = x.mean(1, keepdim=True)
    noise, tau2 = x.var(correction=0) / G, mu.var(correction=0)
    S = noise / (noise + tau2)
    raw = x - ((1 - S) * mu + S * x.mean())
    return ((raw - raw.mean()) / (raw.std() + 1e-6)).to(r.dtype)


def trl_grpo(r: Any) -> Any:
    """The advantage lines of TRL's GRPOTrainer (scale_rewards="group"), float32 as there."""
    import torch

    flat, G = r.view(-1), r.shape[1]
    mean = torch.nanmean(flat.view(-1, G), dim=1).repeat_interleave(G)
    variance = torch.nanmean((flat.view(-1, G) - mean.view(-1, G)) ** 2, dim=1)
    std = torch.sqrt(variance * (G / (G - 1))).repeat_interleave(G)
    return torch.nan_to_num((flat - mean) / (std + 1e-4), nan=0.0)


def verl_rows(r: np.ndarray) -> list[Row]:
    """verl's estimators on the shape that it gives them: token rewards (N, 1), a mask, and uuid strings."""
    import torch
    from verl.trainer.ppo import core_algos

    rewards = torch.from_numpy(r.reshape(-1, 1))
    mask = torch.ones_like(rewards)
    index = np.repeat(np.array([str(uuid.uuid4()) for _ in range(len(r))], dtype=object), r.shape[1])
    rows: list[Row] = []
    for name in ("grpo", "grpo_vectorized"):
        estimator = core_algos.get_adv_estimator_fn(name)
        rows.append((f"verl {name}", lambda f=estimator: f(rewards, mask, index)))
    return rows


def ragged_peers(rows: int) -> tuple[str, list[Row]]:
    """Groups of 4 to 12 rows named by uuid strings, shuffled, float32."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(4, 13, rows // 4)
    ids = np.repeat(np.array([str(uuid.UUID(int=int(i))) for i in range(sizes.size)], dtype=object), sizes)[:rows]
    ids = ids[rng.permutation(rows)]
    r = (rng.random(rows) < 0.3).astype(np.float32)

    def numpy_ebpo() -> np.ndarray:
        index = np.unique(ids.astype(str), return_inverse=True)[1]
        n = np.bincount(index)
        mu = np.bincount(index, r) / n
        sigma2, tau2 = r.var(dtype=np.float64), mu.var()
        S = (sigma2 / n) / (sigma2 / n + tau2)
        raw = r - ((1 - S) * mu + S * r.mean(dtype=np.float64))[index]
        return (raw - raw.mean()) / (raw.std(ddof=1) + 1e-6)

    np.testing.assert_allclose(ebpo_core.advantages(r, ids), numpy_ebpo(), atol=1e-5)
    return f"{rows} ragged, string ids", [
        ("copy of the input", r.copy),
        ("NumPy twin", numpy_ebpo),
        ("ebpo_core.advantages", lambda: ebpo_core.advantages(r, ids)),
    ]


def filled(build: Any, count: int, decay: dict[str, Any]) -> Any:
    """An estimator that holds ``count`` keys."""
    r = (np.random.default_rng(3).random((512, 8)) < 0.3).astype(np.float32)
    ebpo = build.EBPO(max_keys=2 * count, **decay)
    for start in range(0, count, 512):
        ebpo(r[: count - start], keys=[f"prompt-{i:032x}" for i in range(start, min(start + 512, count))])
    return ebpo


def memory_of(count: int, decay: dict[str, Any]) -> float:
    """MB by which a process grows that fills an estimator with ``count`` keys."""
    before = resident()
    ebpo = filled(ebpo_core, count, decay)
    return resident() - before if ebpo.key_count == count else 0.0


def many_keys(build: Any, count: int, seconds: float, decay: dict[str, Any]) -> dict[str, float]:
    """Of an estimator that holds ``count`` keys: microseconds of an update with 512 of them, and of its states; MB."""
    rng = np.random.default_rng(4)
    r = (rng.random((512, 8)) < 0.3).astype(np.float32)
    ebpo = filled(build, count, decay)
    batches = cycle([[f"prompt-{i:032x}" for i in rng.integers(count, size=512)] for _ in range(64)])
    best = measure([("update with 512 of them", lambda: ebpo(r, keys=next(batches)))], seconds)
    if count <= MANY_KEYS[0]:
        best |= measure([("state_dict()", ebpo.state_dict)], 0.0)
    figures = {name: 1e6 * value for name, value in best.items()}
    if build is ebpo_core:
        best = measure([("state_dict(arrays=True)", lambda: ebpo.state_dict(arrays=True))], 0.0)
        figures |= {name: 1e6 * value for name, value in best.items()}
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process, which has no memory to use again
            figures["memory, MB"] = pool.apply(memory_of, (count, decay))
    return figures


def resident() -> float:
    """Resident memory of this process in MB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def measure(rows: list[Row], seconds: float) -> dict[str, float]:
    """Best seconds per call of each row, over interleaved rounds of a few milliseconds; at least 8 rounds."""
    best = {name: float("inf") for name, _ in rows}
    repeats = {}
    for name, call in rows:
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, int(2e-3 / once))
    start, rounds = time.perf_counter(), 0
    while rounds < 8 or time.perf_counter() - start < seconds:
        rounds += 1
        for name, call in rows:
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            spent = min(time.perf_counter() - began, time.process_time() - cpu)
            best[name] = min(best[name], spent / repeats[name])
    return best


def report(title: str, best: dict[str, float], goal: float | None = None, stateful: float | None = None) -> Any:
    twin, copy = best["NumPy twin"], best["copy of the input"]
    print(f"\n{title}" + (f"   (goal: {goal}x the twin)" if goal else ""))
    print(f"  {'':33} {'microseconds':>12} {'x twin':>8} {'x copy':>8}")
    for name, seconds in best.items():
        print(f"  {name:33} {seconds * 1e6:12.2f} {twin / seconds:8.1f} {seconds / copy:8.2f}")
    for suffix in ("", ", before"):
        if STATEFUL_ROW + suffix in best:
            ratio = best[STATEFUL_ROW + suffix] / best[STATELESS_ROW + suffix]
            goal_of_ratio = f" (goal: at most {stateful})" if stateful and not suffix else ""
            print(f"  stateful / stateless{suffix}: {ratio:.2f}{goal_of_ratio}")
        if KEYED_ROW + suffix in best:
            ratio = best[KEYED_ROW + suffix] / best[STATELESS_ROW + suffix]
            print(f"  keyed / stateless{suffix}: {ratio:.2f}" + ("" if suffix else f" (goal: at most {KEYED})"))
    return {"size": title, "microseconds": {name: seconds * 1e6 for name, seconds in best.items()}}


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__, "ebpo_core": ebpo_core.__version__}
    for module in ("torch", "verl"):
        if module in sys.modules:
            versions[module] = str(sys.modules[module].__version__)
    return {"cpu": processor(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="PATH", help="folder of another build of the package")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes, once: does it run?")
    args = parser.parse_args()
    against = build_in(args.against) if args.against else None
    seconds = 0.01 if args.smoke else 12.0
    results = []
    for M, G in SIZES[:2] if args.smoke else SIZES:
        r = (np.random.default_rng(0).random((M, G)) < 0.3).astype(np.float32)
        np.testing.assert_allclose(ebpo_core.advantages(r), reference.algorithm_1(r), atol=1e-5)
        best = measure(peers(r, against), seconds)
        results.append(report(f"{M} x {G}, float32", best, GOALS[M, G], STATEFUL.get((M, G))))
    title, rows = ragged_peers(512 if args.smoke else 65_536)
    results.append(report(title, measure(rows, seconds)))
    for count in (1000,) if args.smoke else MANY_KEYS:
        for name, build, decay in (
            ('decay=0.99, decay_by="update"', ebpo_core, {"decay": 0.99}),
            ('decay=0.99, decay_by="visit"', ebpo_core, {"decay": 0.99, "decay_by": "visit"}),
            ("decay=0.99, before", against if count == MANY_KEYS[0] else None, {"decay": 0.99}),
        ):
            if build is not None:
                figures = many_keys(build, count, seconds / 4, decay)
                print(f"\n{count} keys, {name}")
                for what, value in figures.items():
                    print(f"  {what:33} {value:12.1f}" + ("" if "MB" in what else " microseconds"))
                results.append({"size": f"{count} keys, {name}", "figures": figures})
    info = machine()
    print(f"\n{info['cpu']}, {info['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in info["versions"].items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": info, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
