"""Held-out rows for ``fusionroute eval``: its flags, the run, and the tables."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ebpo_core.fusionroute.cli.options import load_model, load_tokenizer, routing_options

if TYPE_CHECKING:
    from collections.abc import Mapping

_OF_TASKS = ("include_path", "num_fewshot", "max_gen_toks", "chat", "seed", "log_samples")
_OF_ROWS = ("dataset_split", "train_on", "chat_template_kwargs")


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """``--data``, ``--preferences``, and how their rows are read: as ``fusionroute train`` reads them."""
    group = parser.add_argument_group("held-out rows of the training formats")
    group.add_argument("--data", help="SFT rows: a .jsonl, .json, .parquet or .csv file, a saved data set, or a hub id")
    group.add_argument("--preferences", metavar="DATA", help="preference rows; same forms")
    group.add_argument("--dataset-split", default="train", help="of saved and hub data sets (default: %(default)s)")
    add_label_flags(group)


def add_label_flags(parser: argparse._ActionsContainer) -> None:
    """``--train-on`` and ``--chat-template-kwargs`` (see :func:`chat_template`): which tokens of a row have labels."""
    parser.add_argument(
        "--train-on",
        choices=("completion", "all"),
        default="completion",
        help="tokens that have labels (as in training)",
    )
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help="further arguments of the chat template")


def check_rows(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """True for rows, False for tasks, after refusing flags of the other kind with a usage error.

    Raises:
        ValueError: A number or JSON that does not fit.
    """
    rows = arguments.data is not None or arguments.preferences is not None
    if rows == (arguments.tasks is not None):
        parser.error("give either --tasks, or --data and --preferences")
    for name in _OF_TASKS if rows else _OF_ROWS:
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} goes with {'--tasks' if rows else '--data and --preferences'}")
    if not rows:
        return False
    size, limit = arguments.batch_size, arguments.limit
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"batch-size={size!r}: expected a whole number of at least 1")
    if limit is not None and (limit < 1 or limit != int(limit)):
        raise ValueError(f"limit={limit}: expected a whole number of rows, at least 1")
    if arguments.data is None and arguments.train_on != "completion":
        raise ValueError(f"train-on={arguments.train_on!r}: is of --data; in preference rows completions have labels")
    chat_template(arguments)
    return True


def evaluate_rows(arguments: argparse.Namespace) -> int:
    """Evaluate, print tables, and write the results; 0."""
    from ebpo_core.data.rows import load_rows
    from ebpo_core.files import write_text
    from ebpo_core.fusionroute.training import evaluate_pairs, evaluate_samples, tokenize_pairs, tokenize_samples

    # Rows that cannot be read are found out before minutes of loading.
    tokenizer = load_tokenizer(arguments)
    size = None if arguments.limit is None else int(arguments.limit)
    shared: dict[str, Any] = {"max_length": arguments.max_length, "chat_template_kwargs": chat_template(arguments)}
    samples = pairs = None
    if arguments.data is not None:
        rows = load_rows("data", arguments.data, arguments.dataset_split, size)
        samples = tokenize_samples(rows, tokenizer, train_on=arguments.train_on, **shared)
    if arguments.preferences is not None:
        rows = load_rows("preferences", arguments.preferences, arguments.dataset_split, size)
        pairs = tokenize_pairs(rows, tokenizer, **shared)
    options: dict[str, Any] = {"batch_size": int(arguments.batch_size), **routing_options(arguments)}
    model = load_model(arguments)
    console = Console(highlight=False)
    results: dict[str, Any] = {"checkpoint": arguments.path}
    if samples is not None:
        cut = {"truncated": samples.truncated, "dropped": samples.dropped}
        found = evaluate_samples(model, samples, max_length=arguments.max_length, **options)
        results["samples"] = {**found, **cut}
        _print(console, "SFT rows", results["samples"])
    if pairs is not None:
        cut = {"truncated": pairs.sequences.truncated, "dropped": pairs.sequences.dropped}
        results["preferences"] = {**evaluate_pairs(model, pairs, **options), **cut}
        _print(console, "preference rows", results["preferences"])
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        print(arguments.output)
    return 0


def chat_template(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The value of ``--chat-template-kwargs``.

    Raises:
        ValueError: no JSON object.
    """
    text = arguments.chat_template_kwargs
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"chat-template-kwargs={text!r}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"chat-template-kwargs={text!r}: expected a JSON object")
    return value


def _print(console: Console, title: str, found: Mapping[str, Any]) -> None:
    """A row per model, then the counts and the routing."""
    models = found["models"]
    columns = list(models["router"])
    table = Table("model", title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    alone = {f"{name} alone": values for name, values in models["experts"].items()}
    rows = {"fusionroute": models["fusionroute"], "router alone": models["router"], **alone}
    if "selected" in found:
        rows["selected experts"] = found["selected"]
    for name, values in rows.items():
        table.add_row(Text(name), *(_number(values[column]) for column in columns))
    console.print(table)
    counts = {name: value for name, value in found.items() if isinstance(value, int)}
    routing = found["routing"]
    usage = ", ".join(f"{name} {_number(share)}" for name, share in routing["usage"].items())
    for line in (
        ", ".join(f"{name} {value}" for name, value in counts.items()),
        f"routing: accuracy {_number(routing['accuracy'])}, informative {_number(routing['informative'])}",
        f"usage: {usage}",
        ", ".join(f"{name} {_number(value)}" for name, value in found.get("training", {}).items()),
    ):
        if line:
            console.print(line, markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
