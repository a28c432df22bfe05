"""``ebpo eval``: avg@k, pass@k and maj@k of a model by sampling, with bootstrap intervals, resumable after a kill.

Samples go to samples.jsonl in the output directory as they are drawn; the same command again draws what is missing. The
numbers go to results.json, a table and plot.png.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLES_NAME, RESULTS_NAME, PLOT_NAME = "samples.jsonl", "results.json", "plot.png"


def build_parser() -> argparse.ArgumentParser:
    from ebpo_core.cli.sampling import add_options

    parser = argparse.ArgumentParser(prog="ebpo eval", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="directory for samples, results and picture")
    parser.add_argument(
        "--samples", type=int, default=16, help="samples of each problem (16); more extend a finished run"
    )
    parser.add_argument(
        "--k", type=int, nargs="+", help="for pass@k and maj@k; powers of two up to --samples by default"
    )
    parser.add_argument(
        "--baseline", metavar="DIR", help="output of another model on the same problems, to compare with"
    )
    parser.add_argument("--resamples", type=int, default=10_000, help="draws of the bootstrap (10000)")
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals (0.95)")
    parser.add_argument("--bootstrap-seed", type=int, default=0, help="seed of the bootstrap (0)")
    parser.add_argument("--no-plot", action="store_true", help="draw no picture; works without matplotlib")
    add_options(parser, split="test")
    return parser


def main(argv: Sequence[str]) -> int:
    """Sample, score, summarize, print."""
    from rich.console import Console
    from rich.text import Text

    from ebpo_core.cli.sampling import Sampling, describe
    from ebpo_core.evaluation.journal import read_journal
    from ebpo_core.evaluation.report import build_difference_table, build_table, plot_summaries
    from ebpo_core.evaluation.sampling import KIND
    from ebpo_core.evaluation.summary import default_ks, paired_differences, summarize, write_results

    given = build_parser().parse_args(argv)
    if not given.no_plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(name="matplotlib")  # now, not after hours of sampling
    if given.k and not 1 <= min(given.k) <= max(given.k) <= given.samples:
        raise ValueError(f"--k {' '.join(map(str, given.k))}: give numbers between 1 and --samples {given.samples}")
    console = Console()
    sampling = Sampling(given)
    output = Path(given.output)
    baseline = None
    if given.baseline is not None:
        baseline = read_journal(Path(given.baseline) / SAMPLES_NAME, KIND)
        if baseline[0].get("problems") != sampling.fingerprint:
            raise ValueError(
                f"--baseline {given.baseline}: it is about other problems; compare on the same task and size"
            )
    records = sampling.draw(output / SAMPLES_NAME, given.samples, "Sampling", console)
    with sampling.scorer() as scorer:
        records = scorer.grouped(records)
        theirs = None if baseline is None else scorer.grouped(baseline[1])
    options = {"resamples": given.resamples, "level": given.confidence, "seed": given.bootstrap_seed}
    ks = given.k or default_ks(given.samples)
    summary = summarize(sampling.problems, records, samples=given.samples, ks=ks, **options)
    model = str(sampling.settings["backend"]["model"])
    difference = None
    if theirs is not None:
        difference = paired_differences(sampling.problems, records, theirs, samples=given.samples, ks=ks, **options)
    results = write_results(
        output / RESULTS_NAME,
        summary,
        sampling.settings,
        task=given.task,
        preset=sampling.settings["preset"],
        skipped={"problems": len(sampling.skipped), "ids": sampling.skipped},
        bootstrap=options,
        difference_to_baseline=None if difference is None else {k: v._asdict() for k, v in difference.items()},
    )
    console.print(Text(describe(sampling.problems, given.samples, model), style="bold"))
    console.print(build_table(summary))
    if difference is not None:
        console.print(Text(f"Difference to {given.baseline}, paired by problem", style="bold"), soft_wrap=True)
        console.print(build_difference_table(difference))
    cut = results["finish"].get("length", 0)
    if cut:
        total = len(sampling.problems) * given.samples
        console.print(Text(f"{cut} of {total} samples reached --max-new-tokens {given.max_new_tokens}", style="dim"))
    if not given.no_plot:
        plot_summaries({model: summary}, output / PLOT_NAME)
    console.print(f"Samples, results and picture: {output}", markup=False, highlight=False, soft_wrap=True)
    return 0
