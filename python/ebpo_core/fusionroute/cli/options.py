"""Flags that several commands share: the checkpoint and its device, sampling, routing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_flags(parser: ArgumentParser) -> None:
    """``PATH``, ``--device``, ``--dtype``, ``--expert-path``, ``--trust-remote-code``.

    They say which checkpoint :func:`load_model` loads, and how.
    """
    parser.add_argument("path", help="directory or hub id of a FusionRoute checkpoint")
    parser.add_argument("--device", help="e.g. cpu or cuda:1; by default the first GPU, else the CPU")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    add_expert_path_flag(parser)
    add_code_flag(parser)


def add_code_flag(parser: ArgumentParser) -> None:
    """``--trust-remote-code``: the permission to run code that experts bring along."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code of experts whose folders bring their own model class",
    )


def add_expert_path_flag(parser: ArgumentParser) -> None:
    """``--expert-path``, whose values :func:`named_paths` reads."""
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
        "sampling", "of the checkpoint's generation config, the end-of-text token alone is used"
    )
    group.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    group.add_argument("--top-p", type=float, help="sample from the likeliest tokens up to this probability")
    group.add_argument("--top-k", type=int, help="sample from this many of the likeliest tokens")
    group.add_argument("--seed", type=int, help="seed of the sampling")


def check_sampling(arguments: Namespace) -> None:
    """Refuse impossible numbers of tokens and temperatures, and settings of sampling without a temperature.

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
    """The fields of :class:`~ebpo_core.fusionroute.decoding.routing.RoutingOptions` that a person would set by hand."""
    group = parser.add_argument_group("routing", "by default as the checkpoint's config says")
    group.add_argument("--alpha", type=float, help="weight of the expert's logits; 1 in the paper")
    group.add_argument("--routing-only", action="store_true", help="leave the router's own logits out")
    group.add_argument("--forced-expert", metavar="NAME", help="use this expert at every token")
    group.add_argument("--allowed-experts", nargs="+", metavar="NAME", help="the experts to choose among")
    group.add_argument("--hysteresis", type=float, help="keep the expert unless another's weight is larger by this")


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


def named_paths(argument: str, items: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH`` items as a mapping; ``argument`` is what the user calls them.

    Raises:
        ValueError: An item without a name or a path, or a name that is there twice.
    """
    paths: dict[str, str] = {}
    for item in items:
        name, _, path = str(item).partition("=")
        if not name or not path:
            raise ValueError(f"{argument}={item!r}: expected NAME=PATH, e.g. math=models/math")
        if name in paths:
            raise ValueError(f"{argument}={item!r}: {name!r} is there twice; give each name once")
        paths[name] = path
    return paths


def number_or_named(argument: str, items: Sequence[str]) -> int | dict[str, int]:
    """``["N"]`` as a number, ``["NAME=N", ...]`` as numbers by name; ``argument`` is what the user calls them.

    Raises:
        ValueError: Anything else, or a name that is there twice.
    """
    numbers: dict[str, int] = {}
    for item in items:
        name, equals, number = item.rpartition("=")
        if not number.isdecimal() or bool(name) != bool(equals) or (len(items) > 1 and not name):
            raise ValueError(f"{argument}={item!r}: expected one number, or NAME=N for each, e.g. math=4000 code=1000")
        if name in numbers:
            raise ValueError(f"{argument}={item!r}: {name!r} is there twice; give each name once")
        numbers[name] = int(number)
    return numbers.get("") or numbers


def load_tokenizer(arguments: Namespace) -> Any:
    """The checkpoint's tokenizer, which is cheap to load and shows whether there is a checkpoint at all.

    Raises:
        FileNotFoundError: No such folder, or one without a config.
        ValueError: A checkpoint without a tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(arguments.path).expanduser()
    if not folder.exists() and (folder.is_absolute() or arguments.path.startswith(".")):
        raise FileNotFoundError(f"path={arguments.path!r}: no such checkpoint")
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "a PEFT adapter" if (folder / "adapter_config.json").is_file() else "no config.json in it"
        raise FileNotFoundError(f"path={arguments.path!r}: {what}; give the folder of a FusionRoute checkpoint")
    _config(arguments)
    try:
        return AutoTokenizer.from_pretrained(_source(arguments))
    except (OSError, ValueError) as error:
        raise ValueError(f"path={arguments.path!r}: holds no tokenizer; save the router's into it ({error})") from error


def load_model(arguments: Namespace) -> Any:
    """The checkpoint with its experts, in evaluation mode on their device.

    The parser of ``arguments`` has :func:`add_model_flags` and :func:`add_routing_flags`.

    Raises:
        ValueError: Not a FusionRoute checkpoint, or routing flags that do not fit it, before weights are read; what
            ``from_pretrained`` raises.
    """
    import torch

    from ebpo_core.cli.quiet import hide_loading_bars
    from ebpo_core.fusionroute.decoding.routing import permitted_rows
    from ebpo_core.fusionroute.experts.offload import OF_MODELS, exact_device
    from ebpo_core.fusionroute.model import FusionRouteForCausalLM

    source, paths = _source(arguments), named_paths("expert-path", arguments.expert_path)
    config = _config(arguments)
    names = [expert["name"] for expert in config.experts or []]
    permitted_rows(config.options().updated(**routing_options(arguments)), names)
    hide_loading_bars()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    exact_device(device, OF_MODELS)
    model: Any = FusionRouteForCausalLM.from_pretrained(
        source, dtype=arguments.dtype, expert_paths=paths or None, trust_remote_code=arguments.trust_remote_code
    )
    return model.to(device).eval()


def _config(arguments: Namespace) -> Any:
    """The checkpoint's config.

    Raises:
        ValueError: Another model's.
    """
    from transformers import AutoConfig

    import ebpo_core.fusionroute  # noqa: F401 -- transformers learns our type

    config = AutoConfig.from_pretrained(_source(arguments))
    if config.model_type != "fusionroute":
        raise ValueError(
            f"path={arguments.path!r}: a {config.model_type} model, not a FusionRoute checkpoint; make one with "
            "fusionroute train --model_name_or_path ... --experts NAME=PATH ..."
        )
    return config


def _source(arguments: Namespace) -> str:
    """The checkpoint as transformers takes it: a folder with the home folder's name in full, or a hub id."""
    folder = Path(arguments.path).expanduser()
    return str(folder) if folder.exists() else str(arguments.path)
