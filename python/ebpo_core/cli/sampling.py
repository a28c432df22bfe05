"""Options of task, model and sampling, and the resumable drawing, shared by ``ebpo eval`` and ``ebpo curriculum``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ebpo_core.cli.quiet import hide_loading_bars
from ebpo_core.data import Problem
from ebpo_core.evaluation.journal import Journal
from ebpo_core.evaluation.local_model import LocalModel
from ebpo_core.evaluation.problems import PromptFormat, fingerprint, load_problems
from ebpo_core.evaluation.sampling import KEY, KIND, Backend, SamplingOptions, collect, missing_requests, run_settings
from ebpo_core.evaluation.scoring import Scorer, load_scorer, unscorable_rows
from ebpo_core.evaluation.server import Server, ServerModel
from ebpo_core.progress import bar
from ebpo_core.tasks.loading import BUILT_IN

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from rich.console import Console


def add_options(parser: argparse.ArgumentParser, *, split: str) -> None:
    """The options shared by both commands; ``split`` is the built-in tasks' one by default."""
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task", default="countdown", help="countdown, arithmetic, a .jsonl/.parquet/.csv file, or a name"
    )
    task.add_argument("--format", help="format of the file, as ebpo_core.data names it; by default it is recognised")
    task.add_argument("--size", type=int, help="problems of a built-in task (600), or the first ones of a file (all)")
    task.add_argument("--split", help=f"of a built-in task ({split}), or of a data set with several")
    parser.set_defaults(built_in_split=split)
    task.add_argument("--data-seed", type=int, default=0, help="seed of a built-in task's problems (0)")
    task.add_argument("--topics", nargs="+", help="topics of a built-in task; all by default")
    task.add_argument("--levels", nargs="+", type=int, help="levels of a built-in task; all by default")
    task.add_argument("--scorer", help="math, exact, integer, or package.module:function in TRL's signature")
    task.add_argument("--preset", choices=("strict", "lenient"), help="what the math scorer accepts (strict)")
    task.add_argument(
        "--refuse-unscorable", action="store_true", help="end with an error where a row cannot be scored, not skip it"
    )
    task.add_argument("--extract", help="answers that vote in maj@k: text, integer, boxed, or package.module:function")
    task.add_argument("--template", default="{prompt}", help="text around each prompt, {prompt} in it")
    task.add_argument("--system", help="system message; makes a chat of each prompt")
    task.add_argument("--chat", action="store_true", help="send each prompt as a user's message")

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="directory, hub id, .gguf file or package:<name>; with --server its name there")
    model.add_argument("--server", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    model.add_argument("--concurrency", type=int, default=32, help="requests under way at once (32)")
    model.add_argument("--timeout", type=float, default=600, help="seconds a request may take (600)")
    model.add_argument("--retries", type=int, default=6, help="tries after a failure that may pass (6)")
    model.add_argument("--extra-body", type=json_object, metavar="JSON", help="further fields of every request")
    model.add_argument("--batch-size", type=int, default=64, help="completions drawn at once without a server (64)")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1...; a GPU if there is one (auto)")
    model.add_argument("--dtype", default="auto", help="float32, bfloat16...; the checkpoint's (auto)")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=1024, help="longest completion (1024)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1.0)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="smallest likeliest set of tokens (1.0)")
    sampling.add_argument("--top-k", type=int, default=0, help="likeliest tokens to keep; 0 keeps all (0)")
    sampling.add_argument("--seed", type=int, default=0, help="seed of the samples (0)")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object given on the command line."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return content


class Sampling:
    """The parsed shared options, made into problems, a back end and a scorer."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        if arguments.model is None and arguments.server is None:
            raise ValueError("--model or --server is missing: say which model to sample from")
        self.options = SamplingOptions(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
        self.format = PromptFormat(arguments.template, arguments.system, arguments.chat)
        self.problems = load_problems(
            arguments.task,
            size=arguments.size,
            seed=arguments.data_seed,
            split=arguments.split or (arguments.built_in_split if arguments.task in BUILT_IN else None),
            topics=arguments.topics,
            levels=arguments.levels,
            format=arguments.format,
            instruction=arguments.template == PromptFormat.template,  # a template takes its place
        )
        self.fingerprint = fingerprint(self.problems)
        self.settings: dict[str, Any] = {}
        self.skipped: list[str] = []

    def server(self, url: str) -> Server:
        """A server at ``url`` with the options of time-outs and tries."""
        return Server(url, timeout=self.arguments.timeout, retries=self.arguments.retries)

    def backend(self) -> Backend:
        """The model that draws the samples; a local one is loaded when the first is drawn."""
        given = self.arguments
        if given.server is None:
            hide_loading_bars()
            return LocalModel(
                given.model, self.options, batch_size=given.batch_size, device=given.device, dtype=given.dtype
            )
        return ServerModel(
            self.server(given.server),
            given.model,
            self.options,
            concurrency=given.concurrency,
            extra_body=given.extra_body,
        )

    def scorer(self) -> Scorer:
        """The scorer of the samples."""
        given = self.arguments
        return load_scorer(given.scorer, given.task, given.extract, given.preset)

    def draw(self, path: Path, samples: int, name: str, console: Console) -> list[dict[str, Any]]:
        """Complete the journal at ``path`` to ``samples`` of each problem and return its records.

        Problems that cannot be scored go from ``problems`` to ``skipped``, by their ids.
        """
        backend = self.backend()
        with self.scorer() as scorer:
            self._skip(scorer, console)
            self.settings = run_settings(backend, self.options, scorer, self.fingerprint, self.format)
            with Journal(path, KIND, self.settings, KEY) as journal:
                missing = missing_requests(self.problems, samples, journal, self.options, self.format)
                total = len(self.problems) * samples
                done = total - len(missing)
                if done:
                    console.print(f"{done} of {total} samples were there already", markup=False, highlight=False)
                if missing:
                    with bar(console, name, total, done) as shown:
                        collect(missing, backend, scorer, journal, lambda count: shown.update(done + count))
                records = list(journal.records.values())
            self._warn(scorer, console)
        return records

    def _skip(self, scorer: Scorer, console: Console) -> None:
        """Leave out what cannot be scored, and say how many problems that are and which."""
        self.skipped = scorer.unscorable(self.problems)
        if not self.skipped:
            return
        if self.arguments.refuse_unscorable or len(self.skipped) == len(self.problems):
            raise ValueError(unscorable_rows(self.skipped))
        names = set(self.skipped)
        self.problems = [problem for problem in self.problems if problem.id not in names]
        shown = f"{', '.join(self.skipped[:5])}{', ...' if len(names) > 5 else ''}"
        text = f"{len(names)} problems skipped, whose answers cannot be read: {shown}"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    @staticmethod
    def _warn(scorer: Scorer, console: Console) -> None:
        """Say how often a verifier gave up, since such a sample counts as wrong."""
        failed = {
            name: value
            for name, value in scorer.metrics.items()
            if value and name.split("/")[-1] in ("timeouts", "errors")
        }
        for name, value in failed.items():
            console.print(f"{name}: {value:g}; these samples were scored as wrong", style="yellow", markup=False)


def describe(problems: list[Problem], samples: int, model: str) -> str:
    """One line over a table."""
    return f"{model}: {len(problems)} problems, {samples} samples each"
