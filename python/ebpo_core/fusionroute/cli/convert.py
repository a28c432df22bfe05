"""``fusionroute convert``: a checkpoint whose experts are plain folders, as vLLM needs it, from one whose are not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ebpo_core.fusionroute.cli.options import expert_paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpo_core.fusionroute.conversion import ConvertedExpert

_DESCRIPTION = """\
Write a checkpoint with the same router whose experts are plain safetensors folders. GGUF experts are dequantised,
adapters merged into a copy of their base, and experts quantised while loading are written unquantised; the others
stay references. vLLM serves such a checkpoint only.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionroute convert", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or hub id of a FusionRoute checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="a folder that does not exist, or is empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--expert",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="write these only, whether they need it or not; by default those that need it",
    )
    which.add_argument("--all", action="store_true", help="write all: those that need no conversion are copied")
    parser.add_argument(
        "--expert-path",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where an expert is now, if the checkpoint's reference is out of date; may be repeated",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the experts that are written (default: of each reference, then the router's)",
    )
    parser.add_argument(
        "--no-verify-experts",
        action="store_true",
        help="accept experts whose weights are no longer those of the checkpoint",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert, print a line per expert and the output's path."""
    arguments = _parser().parse_args(argv)
    from ebpo_core.fusionroute.conversion import convert_checkpoint

    convert_checkpoint(
        arguments.checkpoint,
        arguments.output,
        experts=arguments.expert,
        copy_all=arguments.all,
        expert_paths=expert_paths(arguments) or None,
        dtype=arguments.dtype,
        verify_experts=not arguments.no_verify_experts,
        report=_print,
    )
    print(arguments.output)
    return 0


def _print(expert: ConvertedExpert) -> None:
    size = "size unknown" if expert.size is None else f"{expert.size / 1e6:,.1f} MB"
    print(f"{expert.name}: {expert.done}, {expert.path}, {size}", flush=True)
