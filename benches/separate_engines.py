"""The prototype of separate engines beside the plugin's run-all engine: tokens per second, work, and the simulation.

    .venv-vllm/bin/python benches/separate_engines.py --output out.json     # SmolLM2-135M's sizes, random weights
    python benches/separate_engines.py --smoke                              # tiny sizes; without vLLM only what is ours

For docs/lazy-serving.md. Four ways to decode B rows that begin together, greedily and with equal lengths:

* "run-all": the plugin's engine, router and 4 experts in one model. What it takes does not depend on the selection.
* "sessions", "calls": an engine per model, ``serving/separate.py``; calls with the CPU build's least block, 32.
* "generate": ours, lazy, as one static batch.

All but the first follow a plan of selected experts, by a pattern of ``lazy_serving.py``. Engines run without a server
in processes of their own, each with a thread on every core; but one of them computes at a time. The clock runs from
the prompts to the last token. "modelled" is the same ratio by the simulation, whose times are transformers'; "refitted"
by the simulation with vLLM's: a pass over a model's weights and an engine's own time for a forward are set so that
run-all and sessions come out right with the fewest rows, in the first pattern. "waiting" is the share of the time in
which no engine computes: messages, selection, fusing. Tokens of "sessions" and "calls" must be those of "generate", up
to a step that float32 does not decide.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from decode import NUM_EXPERTS, check_tokens, lazy
from lazy_serving import PATTERNS, RUN_ALL, Design, Machine, choices, cores, modelled, read
from serve import FIRST_WORD, confine, positive
from serving.checkpoints import FUSED, SMOLLM2, TINY, save_checkpoints
from serving.separate import ENVIRONMENT, Child, SeparateEngines
from transformers.utils import logging

from ebpo_core.fusionroute import FusionRouteForCausalLM

SYSTEMS = {
    "sessions": Design("b sessions", remote=True),
    "calls": Design("b calls, least block", block="least", remote=True),
    "generate": Design("lazy"),
}
BLOCK = 32
MODELS = NUM_EXPERTS + 1
CHECKED = 4  # rows of each case


def plans(pattern: str, rows: int, steps: int) -> list[list[int]]:
    """Of each row the experts of all steps."""
    counts, rng = read("switching-demo.json"), random.Random(f"{pattern} {rows}")
    chosen = [choices(pattern, NUM_EXPERTS, counts, rng) for _ in range(rows)]
    return [[next(row) for _ in range(steps)] for row in chosen]


# ---------------------------------------------------------------------------------------------------------- the systems


def start_run_all(checkpoint: str, settings: dict[str, Any]) -> Callable[[list[list[int]], int], list[list[int]]]:
    """The plugin's engine, for a process of its own."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name != "VLLM_PLUGINS"})
    from vllm import LLM, SamplingParams

    llm = LLM(checkpoint, dtype="float32", enforce_eager=True, enable_prefix_caching=False, **settings)

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        return [list(out.outputs[0].token_ids) for out in llm.generate(asked, sampling, use_tqdm=False)]

    return answer


# -------------------------------------------------------------------------------------------------------------- measure


def timed(call: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def measure_run_all(checkpoint: Path, prompts: list[list[int]], args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    settings = engine_settings(args, models=MODELS) | {"max_num_seqs": max(args.rows)}
    with closing(Child(start_run_all, str(checkpoint), settings)) as engine:
        engine.receive()

        def generate(asked: list[list[int]], new: int) -> list[list[int]]:
            engine.send(asked, new)
            tokens: list[list[int]] = engine.receive()
            return tokens

        for rows in args.rows:
            generate(prompts[:rows], 2)
            seconds = [timed(lambda: generate(prompts[:rows], args.new))[0] for _ in range(args.rounds)]  # noqa: B023
            found.append({"system": "run-all", "pattern": "any", "rows": rows, "seconds": statistics.median(seconds)})
            show(found[-1], args)
    return found


def measure_separate(
    system: str, checkpoint: Path, prompts: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    found = []
    turns = itertools.count(1)
    options = engine_settings(args) | {"sessions": system == "sessions", "block_size": BLOCK}
    with (
        tempfile.TemporaryDirectory(prefix="separate-") as folder,
        SeparateEngines(checkpoint, Path(folder), max(args.rows), **options) as engines,
    ):
        for rows in args.rows:
            engines.generate(prompts[:rows], 2, plans("random", rows, 2))
            for pattern in args.patterns:
                plan = plans(pattern, rows, args.new)
                rounds = []
                for _ in range(args.rounds):
                    turn = next(turns) % args.prompt  # other prompts each time: a prefix cache must not know them
                    asked = [prompt[turn:] + prompt[:turn] for prompt in prompts[:rows]]
                    rounds.append((*timed(lambda: engines.generate(asked, args.new, plan)), asked))  # noqa: B023
                seconds = statistics.median(one for one, _, _ in rounds)
                _, made, asked = rounds[0]
                found.append(
                    {
                        "system": system,
                        "pattern": pattern,
                        "rows": rows,
                        "seconds": seconds,
                        "forwards": [work.forwards for work in made.work],
                        "computed": [work.computed for work in made.work],
                        "waiting": 1 - sum(work.seconds for work in made.work) / rounds[0][0],
                        "_tokens": [a + b for a, b in zip(asked, made.tokens, strict=True)],
                    }
                )
                show(found[-1], args)
    return found


def measure_generate(
    model: FusionRouteForCausalLM, prompts: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    found = []
    for rows in args.rows:
        ids = torch.tensor(prompts[:rows])
        lazy(model, ids, plans_by_step("random", rows, 2), "lazy")
        for pattern in args.patterns:
            schedule = plans_by_step(pattern, rows, args.new)
            seconds = [timed(lambda: lazy(model, ids, schedule, "lazy"))[0] for _ in range(args.rounds)]  # noqa: B023
            found.append(
                {"system": "generate", "pattern": pattern, "rows": rows, "seconds": statistics.median(seconds)}
            )
            show(found[-1], args)
    return found


def plans_by_step(pattern: str, rows: int, steps: int) -> list[list[int]]:
    return [list(step) for step in zip(*plans(pattern, rows, steps), strict=True)]


def agree(model: FusionRouteForCausalLM, case: dict[str, Any], args: argparse.Namespace) -> int:
    """Steps until a near-tie, up to which the case's tokens are those of ``generate``; raises where they are not.

    Of the first rows only: that takes long enough.
    """
    texts = torch.tensor(case.pop("_tokens")[:CHECKED])
    schedule = [step[:CHECKED] for step in plans_by_step(case["pattern"], case["rows"], args.new)]
    expected = lazy(model, texts[:, : args.prompt], schedule, "lazy")[0].tokens
    return check_tokens(model, expected, texts, args.prompt, schedule)


def engine_settings(args: argparse.Namespace, models: int = 1) -> dict[str, Any]:
    return {
        "max_model_len": -(-(args.prompt + args.new + 1) // 128) * 128,
        "kv_cache_memory_bytes": models * args.kv_cache * 2**20,
    }


def show(case: dict[str, Any], args: argparse.Namespace) -> None:
    rate = case["rows"] * args.new / case["seconds"]
    print(f"{case['system']}, {case['pattern']}, {case['rows']}: {rate:.1f} tokens/s", flush=True)


# --------------------------------------------------------------------------------------------------------------- report


def refitted(run_all: float, sessions: float, plan: list[list[int]], args: argparse.Namespace) -> Machine:
    """The machine on which both take these ms per token."""
    given = cores("smollm2")._replace(round_trip=0, call=0)

    def time(design: Design, **changed: float) -> float:
        return modelled(given._replace(**changed), design, args.prompt, plan, MODELS)

    def root(excess: Callable[[float], float]) -> float:
        """Of a rising function, between 0 and a second."""
        low, high = 0.0, 1.0
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return low

    def weights(launch: float) -> float:
        return root(lambda w: time(RUN_ALL, weights=w, launch=launch) - run_all)

    launch = root(lambda t: time(SYSTEMS["sessions"], weights=weights(t), launch=t) - sessions)
    return given._replace(weights=weights(launch), launch=launch)


def compare(cases: list[dict[str, Any]], args: argparse.Namespace) -> Machine | None:
    """Adds to each case its rate, run-all's time over its own, and the same by the simulation; the refitted machine."""
    time = {(case["system"], case["pattern"], case["rows"]): case["seconds"] for case in cases}
    fewest, first, assumed = min(args.rows), args.patterns[0], cores("smollm2")
    machine, ms = None, 1e3 / (fewest * args.new)
    if ("sessions", first, fewest) in time:
        plan = plans(first, fewest, args.new)
        machine = refitted(time["run-all", "any", fewest] * ms, time["sessions", first, fewest] * ms, plan, args)
    for case in cases:
        rows, system = case["rows"], case["system"]
        case["tokens_per_s"] = rows * args.new / case["seconds"]
        if system == "run-all" or ("run-all", "any", rows) not in time:
            continue
        case["ratio"] = time["run-all", "any", rows] / case["seconds"]
        plan = plans(case["pattern"], rows, args.new)
        for name, given in (("modelled", assumed), ("refitted", machine)):
            if given is not None and (name == "modelled" or system != "generate"):
                ours, theirs = (modelled(given, d, args.prompt, plan, MODELS) for d in (SYSTEMS[system], RUN_ALL))
                case[name] = theirs / ours
    return machine


def markdown(cases: list[dict[str, Any]]) -> str:
    columns = [
        "rows",
        "pattern",
        "system",
        "tok/s",
        "of run-all's rate",
        "modelled",
        "refitted",
        "forwards",
        "computed",
        "waiting",
    ]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for case in sorted(cases, key=lambda case: (case["rows"], case["pattern"])):
        cells = [str(case["rows"]), case["pattern"], case["system"], f"{case['tokens_per_s']:.1f}"]
        cells += [f"{case[name]:.2f}" if name in case else "" for name in ("ratio", "modelled", "refitted")]
        cells += [str(sum(case["forwards"])), str(sum(case["computed"]))] if "forwards" in case else ["", ""]
        cells.append(f"{case['waiting']:.0%}" if "waiting" in case else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models, few tokens")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--rows", nargs="+", type=positive, default=[1, 8, 32])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["random", "demo"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="beside run-all")
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=positive, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=positive, help="cores to use; by default all of this process")
    parser.add_argument(
        "--kv-cache", type=positive, default=512, help="MiB of each engine's cache, run-all's five times"
    )
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.patterns, args.prompt, args.new, args.kv_cache = [1, 3], ["random"], 8, 8, 64
    return args


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    using = confine(args.threads)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, using)))
    generator = torch.Generator().manual_seed(1)
    sizes = TINY if args.smoke else SMOLLM2
    prompts = torch.randint(
        FIRST_WORD, sizes["vocab_size"], (max(args.rows), args.prompt), generator=generator
    ).tolist()
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        save_checkpoints(Path(folder), sizes, NUM_EXPERTS)
        checkpoint = Path(folder, FUSED)
        if importlib.util.find_spec("vllm") is None:
            print("run-all, sessions, calls: left out (run this file where vLLM and ebpo-core are installed)")
        else:
            cases += measure_run_all(checkpoint, prompts, args)
            for system in args.systems:
                if system != "generate":
                    cases += measure_separate(system, checkpoint, prompts, args)
        model = FusionRouteForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        for case in cases:
            if "_tokens" in case:
                case["agreed_steps"] = agree(model, case, args)
        if "generate" in args.systems:
            cases += measure_generate(model, prompts, args)
    machine = compare(cases, args)
    processor = platform.processor() or platform.machine()
    print(f"\n{processor}, {len(using)} cores, PyTorch {torch.__version__}")
    print(markdown(cases))
    if machine is not None:
        print(f"\nrefitted: {1e3 * machine.weights:.1f} ms a pass, {1e3 * machine.launch:.1f} ms an engine's forward")
    if args.output:
        made = {"cores": len(using), "torch": torch.__version__}
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        content = {"machine": made, "settings": settings, "cases": cases, "refitted": machine and machine._asdict()}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
