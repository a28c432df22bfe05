"""The whole demo: models, router, baselines, a table, a coloured page and a checkpoint, from nothing, on a CPU.

What was chosen for it, and why, is in :mod:`.settings`. Held-out problems share no question with any training problem.
Every number that is printed was computed in the run, by greedy decoding through ``generate``.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ebpo_core.files import write_json
from ebpo_core.fusionroute.baselines import (
    Response,
    likelihood_scores,
    reward_scores,
    select_sequences,
    write_responses,
)
from ebpo_core.fusionroute.traces import trace
from ebpo_core.fusionroute.traces.page import write_page
from ebpo_core.fusionroute.traces.show import print_traces
from ebpo_core.progress import bar
from ebpo_core.rewards.text import exact_match

from .domains import (
    DOMAINS,
    MAX_ANSWER_TOKENS,
    MIXED,
    Problem,
    build_tokenizer,
    generate,
    preference_rows,
    sft_rows,
)
from .experts import build_model, train_base, train_expert
from .results import Outcomes, as_json, difference, outcomes, results_table
from .rivals import merges
from .routers import new_router, train_mix, train_sft
from .settings import FULL_SIZE, QUICK, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

DEFAULT_DIRECTORY = "runs/fusionroute"
RESULT_NAME = "result.json"
KINDS = (*DOMAINS, MIXED)
FULL = "FusionRoute"
SHOWN_PER_KIND = 3


class Demo:
    """One run: its models, the answers of each system to the same held-out problems, and what it leaves on the disk."""

    def __init__(self, settings: Settings, seed: int, output: Path, work: Path, console: Console) -> None:
        self.settings, self.seed, self.console = settings, seed, console
        self.output, self.work = output, work
        self.tokenizer: Any = build_tokenizer()
        self.test = list(generate(len(KINDS) * settings.test_problems, self.stream(9), "test", KINDS))
        self.systems: dict[str, Outcomes] = {}
        self.notes: dict[str, Any] = {}

    def stream(self, number: int) -> int:
        """A seed for each use of random numbers."""
        return 100 * self.seed + number

    def problems(self, size: int, number: int) -> list[Problem]:
        """Training problems of all kinds that are tested."""
        return list(generate(size, self.stream(number), "train", KINDS))

    def answers(self, name: str, model: Any, **options: Any) -> list[Response]:
        """A system's greedy answers to the held-out problems, which are also scored."""
        prompts = [problem.prompt for problem in self.test]
        responses = write_responses(
            model, self.tokenizer, prompts, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=400, **options
        )
        self.record(name, responses)
        return responses

    def record(self, name: str, responses: Sequence[Response]) -> None:
        found = outcomes(self.test, [response.text for response in responses])
        self.systems[name] = found
        shown = "  ".join(f"{kind} {sum(values) / len(values):.3f}" for kind, values in found.items())
        self.console.print(f"{name}: {shown}", style="dim", highlight=False, soft_wrap=True)

    # ------------------------------------------------------------------------------------------------------- the models

    def train_models(self) -> None:
        """The base model and its experts; each is saved as an ordinary model folder."""
        settings = self.settings
        self.base = build_model(self.tokenizer, hidden_size=settings.hidden_size, seed=self.stream(0))
        with step_bar(self.console, "Base model", settings.base.steps) as on_step:
            train_base(self.base, self.tokenizer, settings.base, seed=self.stream(0), on_step=on_step)
        self.save(self.base, "base")
        self.answers("base model", self.base)
        self.experts = {}
        self.expert_answers = []
        for index, domain in enumerate(DOMAINS, start=1):
            with step_bar(self.console, f"Expert {domain}", settings.experts[domain].steps) as on_step:
                expert = train_expert(
                    self.base,
                    domain,
                    self.tokenizer,
                    settings.experts[domain],
                    seed=self.stream(index),
                    on_step=on_step,
                )
            self.save(expert, f"experts/{domain}")
            self.experts[domain] = expert
            self.expert_answers.append(self.answers(f"expert {domain}", expert))

    def save(self, model: Any, name: str) -> None:
        model.save_pretrained(self.output / name)
        self.tokenizer.save_pretrained(self.output / name)

    # ---------------------------------------------------------------------------------------------------------- routers

    def train_router(self, with_experts: bool) -> Any:
        """SFT, then preference pairs from the model's own answers, then mix training; measures systems on the way."""
        name = FULL if with_experts else "fine-tuned router"
        settings, work = self.settings, self.work
        model = new_router(
            self.output / "base",
            {domain: self.output / "experts" / domain for domain in DOMAINS},
            seed=self.stream(4),
            with_experts=with_experts,
        )
        rows = sft_rows(self.problems(settings.sft.steps * settings.sft.batch_size, 5))
        shown: dict[str, Any] = {"seed": self.seed, "console": self.console}
        log = train_sft(model, self.tokenizer, rows, settings.sft, work / "sft", name=f"{name}: SFT", **shown)
        policy = model if with_experts else model.router
        if with_experts:
            self.answers("routing only", model, complementary=False)
            self.answers("SFT only", model)
            # What the second phase gains has to be more than what further steps of the first would.
            longer = copy.deepcopy(model)
            rows = sft_rows(self.problems(settings.mix.steps * settings.mix.batch_size, 7))
            train_sft(longer, self.tokenizer, rows, settings.mix, work / "longer", name="SFT, as many steps", **shown)
            self.answers("SFT, as many steps", longer)
        else:
            self.answers("fine-tuned, SFT", policy)
        half = settings.mix.steps * settings.mix.batch_size // 2
        problems = self.problems(half, 6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.stream(6))
            with step_bar(self.console, f"{name}: answers for pairs", half) as on_step:
                answers = write_responses(
                    policy,
                    self.tokenizer,
                    [problem.prompt for problem in problems],
                    max_new_tokens=MAX_ANSWER_TOKENS,
                    temperature=1.0,
                    batch_size=400,
                    on_batch=lambda done, _total: on_step(done, math.nan),
                )
        texts = [answer.text for answer in answers]
        mistakes = sum(text != problem.answer for text, problem in zip(texts, problems, strict=True))
        log += train_mix(
            model,
            self.tokenizer,
            sft_rows(self.problems(half, 7)),
            preference_rows(problems, texts, self.stream(8)),
            settings.mix,
            work / ("mix" if with_experts else "mix-without-experts"),
            name=f"{name}: SFT + {'CDPO' if with_experts else 'DPO'}",
            **shown,
        )
        self.notes[name] = {"pairs": half, "pairs_from_mistakes": mistakes, "log": log}
        return model if with_experts else model.router

    def save_and_load(self, model: Any) -> Any:
        """What is measured and shown is what a user gets: the checkpoint, with its experts, loaded by transformers."""
        folder = self.output / "checkpoint"
        model.save_pretrained(folder, save_experts=True)
        self.tokenizer.save_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    # -------------------------------------------------------------------------------------------------------- baselines

    def compare(self, fine_tuned: Any) -> None:
        """Merging, and sequence selection by likelihood under the fine-tuned model and by an oracle."""
        tuning = self.problems(len(KINDS) * self.settings.tuning_problems, 10)
        experts = list(self.experts.values())
        for name, merge in merges(self.base, experts, self.tokenizer, tuning, seed=self.seed).items():
            self.notes[name] = merge.setting
            self.answers(name, merge.model)
        prompts = [problem.prompt for problem in self.test]
        right = [problem.answer for problem in self.test]
        judges = {
            "sequence selection": likelihood_scores(fine_tuned, self.tokenizer),
            "... by an oracle": reward_scores(exact_match, answer=right),
        }
        for name, scores in judges.items():
            picked = select_sequences(prompts, self.expert_answers, scores)
            self.record(name, [selection.response for selection in picked])

    # ------------------------------------------------------------------------------------------------------------ page

    def write_answers(self, model: Any) -> None:
        """The first held-out problems of each kind with the routing of each token; nothing is selected."""
        shown = self.test[: SHOWN_PER_KIND * len(KINDS)]
        encoded = self.tokenizer([problem.prompt for problem in shown], padding=True, return_tensors="pt")
        result = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            output_routing=True,
        )
        traces = [
            found.with_text(self.tokenizer, self.tokenizer(problem.prompt)["input_ids"])
            for found, problem in zip(result["routing"], shown, strict=True)
        ]
        trace.dump(self.output / "answers.json", traces)
        write_page(self.output / "answers.html", traces, title="FusionRoute demo: which expert wrote which character")
        mixed = next(index for index, problem in enumerate(shown) if problem.kind == MIXED)
        self.console.print()
        self.console.print("One mixed answer, by the expert selected for each character:", style="bold")
        print_traces(traces[mixed], self.console)


@contextmanager
def step_bar(console: Console, name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A bar, moved by calling what this gives with a step and its loss (NaN shows none)."""
    with bar(console, name, steps) as shown:
        yield lambda step, loss: shown.update(step, "" if math.isnan(loss) else f"loss {loss:.3f}")


def run(settings: Settings, seed: int, output: Path, console: Console) -> dict[str, Any]:
    """Run everything, print the table, and write ``result.json``; returns what is in it.

    In ``output``: the model folders ``base``, ``experts/<domain>`` and ``checkpoint``, ``answers.html``,
    ``answers.json`` and ``result.json``.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="fusionroute-demo-") as work:  # expert caches: nobody needs them afterwards
        demo = Demo(settings, seed, output, Path(work), console)
        demo.train_models()
        model = demo.save_and_load(demo.train_router(with_experts=True))
        demo.answers(FULL, model)
        fine_tuned = demo.train_router(with_experts=False)
        demo.answers("fine-tuned router", fine_tuned)
    demo.compare(fine_tuned)
    demo.write_answers(model)
    full = demo.systems[FULL]
    result = {
        "seed": seed,
        "settings": asdict(settings),
        "problems_per_kind": settings.test_problems,
        "systems": {name: as_json(found) for name, found in demo.systems.items()},
        "gain_of_fusionroute": {
            name: difference(full, found)._asdict() for name, found in demo.systems.items() if name != FULL
        },
        "notes": demo.notes,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }
    write_json(output / RESULT_NAME, result)
    report(demo, result)
    return result


def report(demo: Demo, result: dict[str, Any]) -> None:
    """The table and what belongs to it."""
    console, output = demo.console, demo.output
    console.print()
    console.print(
        f"Greedy exact match, percent ± standard error, {demo.settings.test_problems} held-out problems of each kind",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    console.print(results_table(demo.systems, bold=FULL), highlight=False)
    for name in ("routing only", "SFT only", "SFT, as many steps", "fine-tuned router"):
        gain = difference(demo.systems[FULL], demo.systems[name])
        console.print(
            f"{FULL} - {name}: {100 * gain.value:+.1f} ± {100 * gain.standard_error:.1f} points in the mean, paired",
            highlight=False,
        )
    notes = demo.notes[FULL]
    console.print(
        f"{notes['pairs_from_mistakes']} of {notes['pairs']} preference pairs of {FULL} reject a mistake of its own, "
        "the others a corrupted answer.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{result['seconds']:.0f} s in all ({result['cpu_seconds']:.0f} CPU seconds), seed {demo.seed}.",
        highlight=False,
    )
    for label, place in (
        ("Answers", output / "answers.html"),
        ("Checkpoint", output / "checkpoint"),
        ("Numbers", output / RESULT_NAME),
    ):
        console.print(f"{label + ':':<12}{place}", markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the options of a command line; ``None`` takes those of this process."""
    parser = argparse.ArgumentParser(
        prog="fusionroute demo",
        description="Three experts and a router from scratch on a CPU: FusionRoute beside its ablations and baselines.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="DIR", default=DEFAULT_DIRECTORY, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of models, data and held-out problems (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models")
    given = parser.parse_args(argv)
    if given.seed < 0:
        raise ValueError(f"seed={given.seed}: expected 0 or more")

    from rich.console import Console

    settings = QUICK if given.quick else FULL_SIZE
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    torch.set_num_threads(min(settings.cpu_threads, os.cpu_count() or 1))
    try:
        run(settings, given.seed, Path(given.output), Console())
    finally:
        torch.set_num_threads(threads)
    return 0
