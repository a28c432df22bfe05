"""What lazy experts would gain in a serving engine: a simulation of designs, for docs/lazy-serving.md.

    python benches/lazy_serving.py --output out.json       # the note's tables, and every case, in some minutes
    python benches/lazy_serving.py --smoke                 # few cases, seconds

B requests are always in flight over a router and n experts; one that ends is followed by the next. A row (a request)
goes from the router to the expert that it selects, back to the router, and so on. An engine that is free takes all rows
that wait for it in one forward, which costs ``Machine.forward``; the longest queue goes first. The designs differ in
which models share an engine, in what an expert's cache keeps for a row, and in what a call of another engine costs.

Inputs are files of ``benches/results/``, made by ``serving_inputs.py``: times on two cores, and the switching of the
demo's model. GPUs are a roofline on stated assumptions; nothing was measured on one. Everything is seeded and no clock
is read, so two runs give the same numbers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 32, 128)
EXPERTS = (2, 4, 8)
PATTERNS = ("random", "sticky", "demo", "single")
ANSWER = (64, 192)  # tokens, uniform between
SHORT, LONG = (128, 384), (3072, 5120)  # of a prompt
RARE = 0.05  # share of the last expert in the pattern of that name


class Machine(NamedTuple):
    """A model's forward, and what surrounds it; times in seconds, for a model of size 1."""

    weights: float  # one pass over the weights
    token: float  # computing one token
    row: float  # one row's logits and attention, however many its tokens
    cached: float  # reading one cached token of one row
    gpu: bool = True  # reading and computing overlap, and the host's time is its own; on two cores everything adds up
    launch: float = 0.3e-3  # an engine's own time for a forward
    round_trip: float = 3e-3  # a call of another engine
    call: float = 0.1e-3  # the host's time for each row of such a call
    block: int = 16  # tokens in a cache's block, the fewest that the engine allows
    each: bool = False  # a device for each model, or one for all

    def forward(self, tokens: int, rows: int, cached: int, size: float) -> float:
        # Sizes scale the weights only: a model of four times the weights has about the same grouped-query cache.
        reads = size * self.weights + self.cached * cached
        computes = size * (self.token * tokens + self.row * rows)
        return max(reads, computes) if self.gpu else reads + computes


def cores(model: str) -> Machine:
    fit = read("serving-times-2-core-epyc.json")["models"][model]["fit"]
    return Machine(**fit, gpu=False, launch=0.0, call=1e-3, block=32)


def roofline(parameters: float, cache_bytes: int, *, each: bool = False) -> Machine:
    """bfloat16 on an H100 SXM by its data sheet, of whose 3.35 TB/s and 989 TFLOP/s 75 % and 60 % are assumed."""
    bandwidth, flops = 0.75 * 3.35e12, 0.6 * 989e12
    return Machine(2 * parameters / bandwidth, 2 * parameters / flops, 0.0, cache_bytes / bandwidth, each=each)


def machines() -> dict[str, Machine]:
    """Two cores with SmolLM2's shapes, as fitted; the paper's two families on H100s, as assumed."""
    return {
        "cpu": cores("smollm2"),
        "gpu-2b": roofline(2.6e9, 2 * 26 * 4 * 256 * 2),  # Gemma 2 2B; cache: K and V, layers, heads, width, bytes
        "gpu-8b-each": roofline(8.0e9, 2 * 32 * 8 * 128 * 2, each=True),  # Llama 3.1 8B
    }


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


class Design(NamedTuple):
    name: str
    own: Callable[[int], bool] = bool  # has expert 1, 2, ... an engine of its own?
    block: str = ""  # a cache is reused up to the last whole block: "least" the machine's, or "128"; "" to the token
    remote: bool = False  # experts' engines are called over a round trip
    lockstep: bool = True  # the router waits until all rows are back


RUN_ALL = Design("a", own=lambda expert: False)  # noqa: ARG005
DESIGNS = (
    Design("b calls, least block", block="least", remote=True),
    Design("b calls, blocks of 128", block="128", remote=True),
    Design("b sessions", remote=True),
    Design("b sessions, free", remote=True, lockstep=False),
    Design("c lockstep"),
    Design("c queues", lockstep=False),
)
LARGE = 4  # the expert that is four times as large as the router and the other three
HYBRIDS = (
    Design("c, all lazy"),
    *(Design(f"d {way}", lambda e: e == LARGE, lockstep=way == "lockstep") for way in ("lockstep", "queues")),
    Design("d session", lambda e: e == LARGE, remote=True),
)


def choices(pattern: str, n: int, counts: dict[str, Any], rng: random.Random) -> Iterator[int]:
    """The experts of one response, 0 to n - 1, without end."""
    if pattern == "demo":
        # A chain of a kind of problem, its three experts being any of ours (for n = 2, two of them are one).
        kind = counts["kinds"][rng.choice(sorted(counts["kinds"]))]
        seen = len(counts["experts"])
        names = rng.sample(range(n), seen) if n >= seen else rng.choices(range(n), k=seen)
        expert = rng.choices(range(seen), kind["first"])[0]
        while True:
            yield names[expert]
            expert = rng.choices(range(seen), kind["transitions"][expert])[0]
    keep = {"random": 0.0, "sticky": 0.9, "single": 1.0, "rare": 0.0}[pattern]
    weights = [(1 - RARE) / (n - 1)] * (n - 1) + [RARE] if pattern == "rare" else None
    expert = -1
    while True:
        if expert < 0 or rng.random() >= keep:
            expert = rng.choices(range(n), weights)[0]
        yield expert


class Row:
    """A request: ``length`` tokens so far, and of each model how many of them its cache holds."""

    def __init__(self, prompt: int, plan: list[int], models: int, read: int = 0) -> None:
        self.length, self.plan, self.at = prompt, plan, 0
        self.held = [read] * models


def requests(pattern: str, n: int, prompts: tuple[int, int] = SHORT) -> Iterator[Row]:
    """Without end, the same ones at each call."""
    counts = read("switching-demo.json")
    rng = random.Random(f"{pattern} {n}")
    while True:
        prompt, answer = rng.randint(*prompts), rng.randint(*ANSWER)
        experts = choices(pattern, n, counts, rng)
        yield Row(prompt, [1 + next(experts) for _ in range(answer)], n + 1)


class Simulation:
    """One design on one machine. Model 0 is the router and lives in engine 0."""

    def __init__(self, machine: Machine, design: Design, sizes: list[float], source: Iterator[Row], rows: int) -> None:
        self.machine, self.design, self.sizes, self.source, self.rows = machine, design, sizes, source, rows
        own = [expert for expert in range(1, len(sizes)) if design.own(expert)]
        self.engines = [[m for m in range(len(sizes)) if m not in own], *([expert] for expert in own)]
        self.home = {model: engine for engine, models in enumerate(self.engines) for model in models}
        self.device_of = [engine * machine.each for engine in range(len(self.engines))]
        self.block = {"": 1, "least": machine.block, "128": 128}[design.block]
        self.busy = [False] * (max(self.device_of) + 1)
        self.queues: list[list[Row]] = [[next(source) for _ in range(rows)], *([] for _ in own)]
        self.events: list[tuple[float, int, int, list[Row], bool]] = []  # time, order, engine, rows, done there?
        self.now, self.order, self.emitted = 0.0, count(), 0
        self.tokens, self.passes, self.held = [0] * len(sizes), [0] * len(sizes), 0.0

    def run(self, skip: int, total: int) -> dict[str, Any]:
        """``total`` emitted tokens, after the first ``skip``, in which requests that began together drift apart."""
        self.until(skip)
        start, emitted, tokens, passes, held = self.now, self.emitted, [*self.tokens], sum(self.passes), self.held
        self.until(skip + total)
        new, seconds = self.emitted - emitted, self.now - start
        return {
            "ms_per_token": 1e3 * seconds * self.rows / new,
            "forwarded": [(now - then) / new for now, then in zip(self.tokens, tokens, strict=True)],  # of each model
            "passes": (sum(self.passes) - passes) * self.rows / new,  # of all models, per B emitted tokens
            "held": (self.held - held) / new,  # cached tokens in all models, per token of text
        }

    def until(self, emitted: int) -> None:
        while self.emitted < emitted:
            self.dispatch()
            self.now = self.events[0][0]
            while self.events and self.events[0][0] <= self.now + 1e-12:
                _, _, engine, rows, done = heapq.heappop(self.events)
                if done:
                    self.busy[self.device_of[engine]] = False
                    self.leave(engine, rows)
                else:
                    self.queues[engine] += rows

    def dispatch(self) -> None:
        for device, busy in enumerate(self.busy):
            ready = [e for e, queue in enumerate(self.queues) if self.device_of[e] == device and queue]
            if self.design.lockstep and len(self.queues[0]) < self.rows:
                ready = [e for e in ready if e]
            if ready and not busy:
                self.serve(max(ready, key=lambda e: len(self.queues[e])))

    def serve(self, engine: int) -> None:
        batch, self.queues[engine] = self.queues[engine], []
        seconds = self.machine.launch
        for model in self.engines[engine]:
            # Only engines that are called lose what is behind the last whole block. The last token runs always.
            block = self.block if engine else 1
            reused = [min(row.held[model], row.length - 1) // block * block for row in batch]
            tokens = sum(row.length for row in batch) - sum(reused)
            seconds += self.machine.forward(tokens, len(batch), sum(reused), self.sizes[model])
            self.tokens[model] += tokens
            self.passes[model] += 1
            for row in batch:
                row.held[model] = row.length
        if self.machine.each:
            seconds /= len(self.engines[engine])  # ideal tensor parallelism over the devices of all its models
        if engine and self.design.remote and not self.machine.gpu:
            seconds += self.machine.call * len(batch)
        self.busy[self.device_of[engine]] = True
        heapq.heappush(self.events, (self.now + seconds, next(self.order), engine, batch, True))

    def leave(self, engine: int, rows: list[Row]) -> None:
        """From the router to the selected expert's engine, from there back."""
        ways: dict[int, list[Row]] = {}
        for row in rows:
            target = 0 if engine else self.home[row.plan[row.at]]
            if not target:
                row = self.emit(row)
            ways.setdefault(target, []).append(row)
        for target, moved in ways.items():
            remote = self.design.remote and (engine or target)
            delay = self.machine.round_trip / 2 if remote else 0.0
            if remote and engine and self.machine.gpu:
                delay += self.machine.call * len(moved)
            heapq.heappush(self.events, (self.now + delay, next(self.order), target, moved, False))

    def emit(self, row: Row) -> Row:
        self.emitted += 1
        self.held += sum(row.held) / row.length
        row.length += 1
        row.at += 1
        return row if row.at < len(row.plan) else next(self.source)


def modelled(
    machine: Machine, design: Design, prompt: int, plans: list[list[int]], models: int, read: int = 0
) -> float:
    """ms per token of rows that begin together; ``read`` tokens of each prompt are in every cache."""
    # A last token that is never reached, so that no row ends and asks for the next request.
    batch = iter([Row(prompt, [1 + expert for expert in plan] + [1], models, read) for plan in plans])
    run = Simulation(machine, design, [1.0] * models, batch, len(plans))
    return float(run.run(0, len(plans) * len(plans[0]))["ms_per_token"])


def checks() -> list[tuple[str, int, float, float]]:
    """What other benches measured: its name, rows, the number, and the same number by the simulation."""
    from decode import Case, make_schedule

    found = []
    for model, file in (("synthetic", "decode-2-core-epyc.json"), ("smollm2", "decode-smollm2-2-core-epyc.json")):
        recorded = read(file)
        prompt, steps = recorded["machine"]["prompt"], recorded["machine"]["steps"]
        for case in recorded["results"][model]:
            rows, switching, together = case["rows"], case["switching"], case["rows_switch"]
            experts = len(case["expert_steps"])
            schedule = make_schedule(Case(rows, switching, together == "together"), experts, steps)[1:]
            plans, models = [list(plan) for plan in zip(*schedule, strict=True)], 1 + experts
            run_all, ours = (
                modelled(cores(model), d, prompt + 1, plans, models, prompt) for d in (RUN_ALL, Design("lazy"))
            )
            found.append((f"lazy / run-all, {model}, {switching}, {together}", rows, case["ratio"], run_all / ours))
    served = read("serve-2-core-epyc.json")
    prompt, new, n = (served["settings"][key] for key in ("prompt", "new", "experts"))
    for case in served["results"]["float32"]["rows"]:
        if case["system"] == "vllm":
            rows = case["concurrency"]
            time = modelled(cores("smollm2"), RUN_ALL, prompt, [[0] * new] * rows, n + 1)
            found.append(("run-all in vLLM, tokens/s", rows, case["tokens_per_s"], 1e3 * rows / time))
    return found


class Tables:
    """Runs cases, prints what they give, and keeps everything for ``--output``."""

    def __init__(self, batches: tuple[int, ...]) -> None:
        self.batches, self.machines = batches, machines()
        self.cases: dict[str, dict[str, Any]] = {}

    def case(self, machine: str, design: Design, pattern: str, n: int, rows: int, **options: Any) -> dict[str, Any]:
        """A simulation, run once. ``options``: ``prompts``, ``sizes``, and fields of the machine to replace."""
        key = f"{machine}, {design.name}, {pattern}, n={n}, B={rows}{options or ''}"
        if key not in self.cases:
            sizes, prompts = options.pop("sizes", [1.0] * (n + 1)), options.pop("prompts", SHORT)
            given = self.machines[machine]._replace(**options)
            run = Simulation(given, design, sizes, requests(pattern, n, prompts), rows)
            self.cases[key] = run.run(ANSWER[1] * rows, 2 * ANSWER[1] * rows + 2000)
        return self.cases[key]

    def values(self, what: Callable[[Any], float], *case: Any, form: str = ".2f", **options: Any) -> str:
        return " ".join(f"{what(self.case(*case, rows, **options)):{form}}" for rows in self.batches)

    def ratios(self, machine: str, design: Design, *case: Any, **options: Any) -> str:
        """Run-all's time per token over the design's, for each B."""
        time = lambda d, rows: self.case(machine, d, *case, rows, **options)["ms_per_token"]  # noqa: E731
        return " ".join(f"{time(RUN_ALL, rows) / time(design, rows):.2f}" for rows in self.batches)

    def designs(self, title: str, machine: str, n: int, patterns: tuple[str, ...], **options: Any) -> None:
        head(f"{title}, n = {n}", ["pattern", "a, ms a token", *(design.name for design in DESIGNS)])
        for p in patterns:
            times = self.values(lambda case: case["ms_per_token"], machine, RUN_ALL, p, n, form=".1f", **options)
            line(p, times, *(self.ratios(machine, design, p, n, **options) for design in DESIGNS))

    def work(self, n: int, patterns: tuple[str, ...]) -> None:
        """Tokens, passes and caches; in lockstep they do not depend on times, only the least block on the machine."""
        least, blocks, _, _, lazy, queues = DESIGNS
        columns = ["pattern", "a", "calls, 16", "32", "128", "lazy", "passes: a", "lazy", "queues", "held: a", "lazy"]
        head(f"Work, n = {n}: tokens of an expert for an emitted one, passes for B, caches", columns)
        expert: Callable[[Any], float] = lambda case: sum(case["forwarded"][1:]) / n  # noqa: E731
        calls = [("cpu", RUN_ALL), ("gpu-2b", least), ("cpu", least), ("cpu", blocks), ("cpu", lazy)]
        for p in patterns:
            cells = [self.values(expert, *call, p, n) for call in calls]
            cells += [self.values(lambda case: case["passes"], "cpu", d, p, n) for d in (RUN_ALL, lazy, queues)]
            line(p, *cells, *(self.values(lambda case: case["held"], "cpu", d, p, n) for d in (RUN_ALL, lazy)))


def head(title: str, columns: list[str]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="few cases")
    parser.add_argument("--output", type=Path, help="also write every case here, as JSON")
    args = parser.parse_args()
    batches, experts, patterns = ((1, 4), (2,), ("random", "demo")) if args.smoke else (BATCHES, EXPERTS, PATTERNS)
    tables = Tables(batches)
    print(f"Ratios are run-all's time per token over the design's, for B = {batches}; more than 1 is faster.")
    head("Checks", ["what", "rows", "measured", "modelled", "off by"])
    found = checks()
    for name, rows, measured, modelled in found:
        line(name, str(rows), f"{measured:.2f}", f"{modelled:.2f}", f"{modelled / measured - 1:+.0%}")
    for n in experts:
        tables.work(n, patterns)
        for name in tables.machines:
            tables.designs(name, name, n, patterns)
    n = experts[len(experts) // 2]
    tables.designs("gpu-2b, prompts of 3072 to 5120 tokens", "gpu-2b", n, patterns, prompts=LONG)
    head(f"b sessions by round trip, demo, n = {n}", ["machine", "2 ms", "5 ms", "10 ms"])
    for name in tables.machines:
        line(name, *(tables.ratios(name, DESIGNS[2], "demo", n, round_trip=t) for t in (2e-3, 5e-3, 10e-3)))
    head("One large expert of 4, gpu-2b", ["pattern", *(design.name for design in HYBRIDS)])
    sizes = [1.0] * LARGE + [4.0]
    for pattern in ("random", "rare"):
        line(pattern, *(tables.ratios("gpu-2b", design, pattern, LARGE, sizes=sizes) for design in HYBRIDS))
    if args.output:
        given = {name: machine._asdict() for name, machine in tables.machines.items()}
        content = {"machines": given, "checks": found, "cases": tables.cases}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
