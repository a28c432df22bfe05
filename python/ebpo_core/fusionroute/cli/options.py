"""Flags that several commands share: which model, on what device, and how it routes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_flags(parser: ArgumentParser) -> None:
    """``PATH``, ``--device``, ``--dtype``, ``--expert-path``."""
    parser.add_argument("path", help="directory or hub id of a FusionRoute checkpoint")
    parser.add_argument("--device", help="e.g. cpu or cuda:1; by default the first GPU, else the CPU")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--expert-path",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where an expert is now, if the checkpoint's reference is out of date; may be repeated",
    )


def add_sampling_flags(parser: ArgumentParser) -> None:
    """``--max-new-tokens`` and how to sample; :func:`check_sampling` checks their values."""
    group = parser.add_argument_group(
        "sampling", "nothing is taken from the checkpoint's generation config but its end"
    )
    group.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily (default)")
    group.add_argument("--top-p", type=float, help="sample from the smallest set of this probability")
    group.add_argument("--top-k", type=int, help="sample from so many tokens")
    group.add_argument("--seed", type=int, help="of sampling")


def check_sampling(arguments: Namespace) -> None:
    """Refuse numbers of tokens and temperatures that are none, and settings of sampling without a temperature.

    Raises:
        ValueError: The flag, its value and what to give.
    """
    if arguments.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens={arguments.max_new_tokens}: expected at least 1")
    if arguments.temperature < 0:
        raise ValueError(f"temperature={arguments.temperature}: expected 0 (greedy) or more")
    for name in ("top_p", "top_k", "seed"):
        if getattr(arguments, name) is not None and arguments.temperature == 0:
            raise ValueError(f"{name.replace('_', '-')}={getattr(arguments, name)}: needs --temperature above 0")


def add_routing_flags(parser: ArgumentParser) -> None:
    """What a person would set by hand of :class:`~ebpo_core.fusionroute.decoding.routing.RoutingOptions`."""
    group = parser.add_argument_group("routing", "by default as the checkpoint's config says")
    group.add_argument("--alpha", type=float, help="weight of the expert's logits; 1 in the paper")
    group.add_argument("--routing-only", action="store_true", help="leave the router's own logits out")
    group.add_argument("--forced-expert", metavar="NAME", help="this expert at every token")
    group.add_argument("--allowed-experts", nargs="+", metavar="NAME", help="the experts to choose among")
    group.add_argument("--hysteresis", type=float, help="switch only where another expert's weight is larger by this")


def routing_options(arguments: Namespace) -> dict[str, Any]:
    """The routing flags that were given, as keywords of ``generate``."""
    options: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("alpha", "forced_expert", "allowed_experts", "hysteresis")
        if getattr(arguments, name) is not None
    }
    if arguments.routing_only:
        options["complementary"] = False
    return options


def expert_paths(arguments: Namespace) -> dict[str, str]:
    """``--expert-path`` as a mapping.

    Raises:
        ValueError: A value without a name or a path.
    """
    paths = {}
    for item in arguments.expert_path:
        name, _, path = item.partition("=")
        if not name or not path:
            raise ValueError(f"expert-path={item!r}: expected NAME=PATH, e.g. math=models/math")
        paths[name] = path
    return paths


def load(arguments: Namespace) -> tuple[Any, Any]:
    """The checkpoint with its experts on their devices, and its tokenizer.

    Raises:
        ValueError: What ``from_pretrained`` raises, or a checkpoint without a tokenizer.
    """
    import torch
    from transformers import AutoTokenizer

    from ebpo_core.fusionroute.model import FusionRouteForCausalLM

    folder = Path(arguments.path).expanduser()
    if not folder.exists() and (folder.is_absolute() or arguments.path.startswith(".")):
        raise FileNotFoundError(f"path={arguments.path!r}: no such checkpoint")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"path={arguments.path!r}: no config.json in it; give the checkpoint's own folder")
    source = str(folder) if folder.exists() else arguments.path
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = FusionRouteForCausalLM.from_pretrained(
        source, dtype=arguments.dtype, expert_paths=expert_paths(arguments) or None
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"path={arguments.path!r}: holds no tokenizer; save the router's into it ({error})") from error
    return model.to(device).eval(), tokenizer
