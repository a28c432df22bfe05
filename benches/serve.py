"""FusionRoute behind vLLM's server, beside our own ``generate``: tokens per second and latency by concurrency.

    .venv-vllm/bin/python benches/serve.py                      # a checkpoint of SmolLM2-135M's sizes, random weights
    .venv-vllm/bin/python benches/serve.py --dtype float32 bfloat16 --output out.json
    .venv-vllm/bin/python benches/serve.py --experts 7 --systems vllm compiled "router alone" "one LoRA per request"
    .venv-vllm/bin/python benches/serve.py --checkpoint ./my-fusionroute --experts 3 --concurrency 1 8 32
    python benches/serve.py --smoke                             # tiny sizes; without vLLM only what is ours

Ways to answer c clients, each of which sends its next request when its last one is answered; all begin at once:
"vllm" is the plugin behind vLLM's OpenAI server, asked by c streaming clients, every expert running for every token;
"compiled" is the same with the experts compiled into adapters; "router alone" is vLLM without FusionRoute, and "one
LoRA per request" vLLM with the same adapters on the router, each request naming one. "generate" stands for two: "static
batch" is one call of it with c rows after another; "one by one" is one row, the other clients waiting in a queue.
Latency is from sending to the last token, the wait included. Ours does not stream: its first token comes with the
last. What one row takes does not depend on how many wait, so "one by one" is timed once (``--one-by-one`` requests)
and its latencies at c clients follow from those times. Greedy, ``ignore_eos``, equal lengths, the same prompts for
all, vLLM's prefix cache off since prompts come again in each round; everything is run once before it is timed.

Both sides get the same cores. ``generate`` has a thread on each. On CPUs vLLM has its own default: a worker with a
thread on each core but one, which is for its scheduler, its server and, here, the clients. With
``VLLM_CPU_OMP_THREADS_BIND=0,1`` the worker has both of two; where it was tried its threads, which wait for each other
beside a scheduler that polls, were slower than one.

Tokens of vLLM and of "one by one" are compared with the static batch's of the same checkpoint, and counted up to a
request's first difference. In float32 a difference is an error unless the two best tokens or the two best experts are
nearly tied. In bfloat16 none is: random weights are close to a tie every few tokens there, and "one by one" differs
from the batch, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from serving import checkpoints
from serving.answering import (
    NAME,
    Answer,
    Case,
    Run,
    Server,
    agreed,
    ask,
    batches,
    generate,
    queued,
    resident,
    start,
)
from serving.offline import Engine, ask_engine
from transformers import AutoConfig
from transformers.utils import logging

from ebpo_core.fusionroute import FusionRouteForCausalLM, RoutingTrace

VLLM, COMPILED, STATIC, ONE = "vllm", "compiled", "static batch", "one by one"
STATIC_COMPILED = "static batch, compiled"
ROUTER, LORA = "router alone", "one LoRA per request"
SERVED = (VLLM, COMPILED, ROUTER, LORA)
GENERATE = "generate"  # static batch and one by one
SYSTEMS = (*SERVED, GENERATE)
Runs = dict[tuple[str, int], list[Run]]
GOAL = (32, 2.0)  # clients, times one by one
GOALS_COMPILED = {3: 1.8, 7: 3.3}  # by the number of experts, times run-all, for as many clients
PAIRS = ((VLLM, ONE), (VLLM, STATIC), (COMPILED, VLLM), (COMPILED, ROUTER), (COMPILED, STATIC_COMPILED))
MEMORY_GOAL = 1.3  # of a compiled checkpoint, times the router alone
FIRST_WORD = 3  # ids before it are special


def routing(traces: Sequence[RoutingTrace]) -> dict[str, Any]:
    """Shares of the experts, and how many tokens in a row one expert writes."""
    chosen = [[token.expert for token in trace.tokens] for trace in traces]
    total = sum(map(len, chosen))
    runs = sum(len(list(itertools.groupby(row))) for row in chosen)
    shares = {name: sum(row.count(i) for row in chosen) / total for i, name in enumerate(traces[0].experts)}
    return {"tokens": total, "shares": shares, "mean_run_length": total / runs}


# -------------------------------------------------------------------------------------------------------------- measure


def summary(system: str, clients: int, runs: list[Run], answers: list[Answer]) -> dict[str, Any]:
    """A row of the table: medians over rounds for rates, over all requests for latencies."""
    latencies = sorted(answer.latency for answer in answers)
    row = {
        "system": system,
        "concurrency": clients,
        "requests_timed": sum(len(run.answers) for run in runs),
        "tokens_timed": sum(len(answer.tokens) for run in runs for answer in run.answers),
        "tokens_per_s": statistics.median(sum(len(a.tokens) for a in run.answers) / run.seconds for run in runs),
        "latency_s": {"median": statistics.median(latencies), "p95": latencies[-(-95 * len(latencies) // 100) - 1]},
        "first_token_s": statistics.median(answer.first for answer in answers),
    }
    if all(run.cpu for run in runs):
        row["tokens_per_cpu_s"] = statistics.median(
            sum(len(a.tokens) for a in run.answers) / (run.cpu or 1) for run in runs
        )
    return row


def engine(system: str, checkpoint: str) -> Engine:
    """What is served; of the checkpoint with random weights, the others lie beside it."""
    if system == VLLM:
        return Engine(checkpoint, {})
    beside = Path(checkpoint).parent
    if system != LORA:
        return Engine(str(beside / (checkpoints.COMPILED if system == COMPILED else checkpoints.ROUTER)), {})
    adapters = sorted((beside / checkpoints.COMPILED / "compiled").iterdir())
    return Engine(str(beside / checkpoints.ROUTER), {adapter.name: str(adapter) for adapter in adapters})


def ask_engines(
    checkpoint: str, dtype: str, cases: list[Case], args: argparse.Namespace
) -> tuple[Runs, dict[str, int]]:
    """The runs of every engine in this process; no memory."""
    runs: Runs = {}
    for system in (one for one in SERVED if one in args.systems):
        found = ask_engine(engine(system, checkpoint), dtype, cases, args)
        runs |= {(system, clients): each for clients, each in found.items()}
        for clients, each in found.items():
            print(f"{dtype}, {system}, {clients}: {each[0].seconds:.1f} s, {each[0].cpu:.1f} CPU s", flush=True)
    return runs, {}


def ask_servers(
    checkpoint: str, dtype: str, cases: list[Case], args: argparse.Namespace
) -> tuple[Runs, dict[str, int]]:
    """The runs of every server, and their resident memory. All of them are up, and asked in turn, case by case: what
    else the machine does falls on all."""
    runs: Runs = {}
    with ExitStack() as stack:
        servers: dict[str, tuple[Server, list[str]]] = {}
        for system in (one for one in SERVED if one in args.systems):
            served = engine(system, checkpoint)
            flags: list[str] = []
            if served.adapters:
                adapters = [f"{name}={path}" for name, path in served.adapters.items()]
                flags = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(args.rank)]
                flags += ["--lora-modules", *adapters]
            server = stack.enter_context(start(served.checkpoint, dtype, args, flags))
            servers[system] = server, list(served.adapters) or [NAME]
        for case in cases:
            for server, models in servers.values():
                ask(server, case._replace(prompts=case.prompts[: case.clients], new=min(4, case.new)), models)
            for _ in range(args.rounds):
                for system, (server, models) in servers.items():
                    run = ask(server, case, models)
                    runs.setdefault((system, case.clients), []).append(run)
                    print(f"{dtype}, {system}, {case.clients}: {run.seconds:.1f} s", flush=True)
        return runs, {system: resident(server.process.pid) for system, (server, _) in servers.items()}


def run_batches(name: str, model: FusionRouteForCausalLM, cases: list[Case], args: argparse.Namespace) -> Runs:
    """The runs of ours, as many rows at once as there are clients."""
    runs: Runs = {}
    for case in cases:
        batches(model, case._replace(prompts=case.prompts[: case.clients], new=min(4, case.new)))
    for case in cases:
        runs[name, case.clients] = [batches(model, case) for _ in range(args.rounds)]
        print(f"{model.dtype}, {name}, {case.clients}: {runs[name, case.clients][0].seconds:.1f} s", flush=True)
    return runs


def measure(checkpoint: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One dtype: the servers first, then, when they have ended, ours."""
    vocab_size = AutoConfig.from_pretrained(checkpoint).vocab_size
    most = max(args.concurrency) * args.requests_per_client
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(FIRST_WORD, vocab_size, (most, args.prompt), generator=generator).tolist()
    cases = [Case(prompts[: c * args.requests_per_client], c, args.new) for c in sorted(args.concurrency)]
    runs: Runs = {}
    memory: dict[str, int] = {}
    result: dict[str, Any] = {}
    if importlib.util.find_spec("vllm") is None:
        print("vllm: left out (this environment has none: run this file where vLLM and ebpo-core are installed)")
    else:
        runs, memory = (ask_engines if args.offline else ask_servers)(checkpoint, dtype, cases, args)
    same: dict[str, tuple[FusionRouteForCausalLM, str]] = {}  # of a system, whose tokens are the same, and in which run
    if GENERATE in args.systems:
        model = FusionRouteForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(args.device)
        result["routing"] = routing(generate(model, prompts[:4], args.new, output_routing=True).routing)
        runs |= run_batches(STATIC, model, cases, args)
        single = [batches(model, Case(prompts[: args.one_by_one], 1, args.new)) for _ in range(args.rounds)]
        runs |= {(ONE, case.clients): single for case in cases}
        memory[GENERATE] = resident()
        same |= dict.fromkeys((VLLM, ONE), (model, STATIC))
        if COMPILED in args.systems:
            folder = engine(COMPILED, checkpoint).checkpoint
            model = FusionRouteForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(args.device)
            runs |= run_batches(STATIC_COMPILED, model, cases, args)
            same[COMPILED] = model, STATIC_COMPILED

    rows = []
    for case in cases:
        c = case.clients
        for system in (system for system in (*SERVED, STATIC, STATIC_COMPILED, ONE) if (system, c) in runs):
            row_runs = runs[system, c]
            answers = [answer for run in row_runs for answer in run.answers]
            if system == ONE:
                answers = [answer for run in row_runs for answer in queued(run, c, len(case.prompts))]
            row = summary(system, c, row_runs, answers)
            if system in same:
                model, batch = same[system]
                both = [zip(case.prompts, runs[batch, c][0].answers, run.answers, strict=False) for run in row_runs]
                equal = [agreed(model, p, a.tokens, b.tokens, dtype) for pairs in both for p, a, b in pairs]
                row |= {"tokens_compared": len(equal) * args.new, "tokens_agreed": sum(equal)}
            rows.append(row)
    return {"rows": rows, "ratios": ratios(rows, memory, args), **result, "resident_bytes": memory}


def ratios(rows: list[dict[str, Any]], memory: dict[str, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What one system's rate, or memory, is of another's, and whether the goal was met where it has one."""
    kind = "tokens_per_cpu_s" if args.offline else "tokens_per_s"
    rate = {(row["system"], row["concurrency"]): row[kind] for row in rows if kind in row}
    found = []
    for c in args.concurrency:
        for one, other in PAIRS:
            if (one, c) in rate and (other, c) in rate:
                goal = {(VLLM, ONE): GOAL[1], (COMPILED, VLLM): GOALS_COMPILED.get(args.experts)}.get((one, other))
                ratio = rate[one, c] / rate[other, c]
                met = None if goal is None or c != GOAL[0] else ratio >= goal
                found.append({"concurrency": c, "of": one, "to": other, "ratio": ratio, "goal": goal, "met": met})
    if COMPILED in memory and ROUTER in memory:
        ratio = memory[COMPILED] / memory[ROUTER]
        found.append({"of": "memory, compiled", "to": ROUTER, "ratio": ratio, "goal": MEMORY_GOAL})
        found[-1] |= {"met": ratio <= MEMORY_GOAL}
    return found


# --------------------------------------------------------------------------------------------------------------- report


def markdown(results: dict[str, dict[str, Any]]) -> str:
    columns = ["dtype", "clients", "system", "tok/s", "tok per CPU s", "latency p50 s", "p95 s", "first token p50 s"]
    columns += ["tokens up to the first difference"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for dtype, result in results.items():
        for r in result["rows"]:
            same = f"{r['tokens_agreed']} of {r['tokens_compared']}" if "tokens_agreed" in r else "-"
            cpu = f"{r['tokens_per_cpu_s']:.1f}" if "tokens_per_cpu_s" in r else "-"
            lines.append(
                f"| {dtype} | {r['concurrency']} | {r['system']} | {r['tokens_per_s']:.1f} | {cpu} "
                f"| {r['latency_s']['median']:.2f} | {r['latency_s']['p95']:.2f} | {r['first_token_s']:.2f} | {same} |"
            )
    for dtype, result in results.items():
        lines.append("")
        for r in result["ratios"]:
            clients = f", {r['concurrency']} clients" if "concurrency" in r else ""
            goal = "" if r["met"] is None else f"; goal {r['goal']}x {'' if r['met'] else 'not '}met"
            lines.append(f"{dtype}{clients}: {r['of']} is {r['ratio']:.2f}x {r['to']}{goal}")
        if "routing" in result:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in result["routing"]["shares"].items())
            run_length = result["routing"]["mean_run_length"]
            lines.append(f"{dtype}, routing: {shares}; runs of {run_length:.1f} tokens on average")
        memory = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in result["resident_bytes"].items())
        lines.append(f"{dtype}, resident memory: {memory}")
    return "\n".join(lines)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few short requests")
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--checkpoint", help="a FusionRoute checkpoint, in place of random weights")
    parser.add_argument("--experts", type=positive, default=3, help="of the checkpoint with random weights")
    parser.add_argument("--offline", action="store_true", help="no servers: engines in this process, by CPU time")
    parser.add_argument("--rank", type=positive, default=8, help="of its compiled experts")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="by default vllm, compiled and generate")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--concurrency", nargs="+", type=positive, default=[1, 8, 32], help="clients")
    parser.add_argument("--requests-per-client", type=positive, default=2, help="one after another")
    parser.add_argument("--one-by-one", type=positive, default=8, help="requests timed one by one")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=positive, default=64, help="tokens to generate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="cores of either side; by default all of this process")
    parser.add_argument("--kv-cache", type=positive, default=2, help="GiB of vLLM's cache, on a CPU")
    parser.add_argument(
        "--enforce-eager", action=argparse.BooleanOptionalAction, help="vLLM compiles nothing; the default on a CPU"
    )
    args = parser.parse_args()
    if args.systems is None:
        args.systems = [VLLM, GENERATE] if args.checkpoint else [VLLM, COMPILED, GENERATE]
    if args.checkpoint and not {VLLM, GENERATE}.issuperset(args.systems):
        parser.error(f"--checkpoint goes with --systems {VLLM} {GENERATE} only")
    if args.enforce_eager is None:
        args.enforce_eager = args.device == "cpu"
    if args.smoke:
        args.concurrency, args.one_by_one, args.rounds, args.prompt, args.new, args.kv_cache = [1, 4], 3, 1, 8, 8, 1
    return args


def confine(threads: int | None) -> list[int]:
    """Have this process and what it starts use so many of its cores, all by default; returns their numbers."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)
    else:  # macOS binds no process to cores
        cores = list(range(threads or os.cpu_count() or 1))
    torch.set_num_threads(len(cores))
    return cores


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    cores = confine(args.threads)
    results = {}
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        if args.checkpoint is None:
            sizes = checkpoints.TINY if args.smoke else checkpoints.SMOLLM2
            checkpoints.save_checkpoints(Path(folder), sizes, args.experts, args.rank)
        checkpoint = args.checkpoint or str(Path(folder, checkpoints.FUSED))
        for dtype in args.dtype:
            results[dtype] = measure(checkpoint, dtype, args)
    processor = platform.processor() or platform.machine()
    print(f"\n{processor}, {args.device}, {len(cores)} cores, PyTorch {torch.__version__}")
    print(markdown(results))
    if args.output:
        machine = {"cores": len(cores), "torch": torch.__version__}
        machine["vllm_cpu_omp_threads_bind"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        content = {"machine": machine, "settings": settings, "results": results}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
