"""``fusionroute convert``: a copy of a checkpoint in which all experts are plain folders, as vLLM needs them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ebpo_core.cli.quiet import hide_loading_bars
from ebpo_core.fusionroute.cli.options import add_code_flag, add_expert_path_flag, named_paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpo_core.fusionroute.conversion import ConvertedExpert

_DESCRIPTION = """\
Write a checkpoint with the same router whose experts are plain safetensors folders. GGUF experts are dequantised,
adapters merged into a copy of their base, and experts quantised while loading are written unquantised; the others
stay references. vLLM serves only such checkpoints.
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
        help="write these alone, needed or not; by default all that need conversion",
    )
    which.add_argument("--all", action="store_true", help="write all; those that need no conversion are copied")
    add_expert_path_flag(parser)
    add_code_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the experts that are written (default: that of each reference, else the router's)",
    )
    parser.add_argument(
        "--no-verify-experts",
        action="store_true",
        help="accept experts whose weights are no longer those of the checkpoint",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert, and print a line per expert and the output's path."""
    arguments = _parser().parse_args(argv)
    paths = named_paths("expert-path", arguments.expert_path)

    from ebpo_core.fusionroute.conversion import convert_checkpoint

    hide_loading_bars()

    convert_checkpoint(
        arguments.checkpoint,
        arguments.output,
        experts=arguments.expert,
        copy_all=arguments.all,
        expert_paths=paths or None,
        dtype=arguments.dtype,
        verify_experts=not arguments.no_verify_experts,
        trust_remote_code=arguments.trust_remote_code,
        report=_print,
    )
    print(arguments.output)
    return 0


def _print(expert: ConvertedExpert) -> None:
    size = "size unknown" if expert.size is None else f"{expert.size / 1e6:,.1f} MB"
    print(f"{expert.name}: {expert.done}, {expert.path}, {size}", flush=True)
