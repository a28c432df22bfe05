"""TRL's argument parser as both training commands use it: a YAML file and flags, no name of either passed over."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any


def read_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Flags with ``--config=FILE`` written as TrlParser knows it, and the content of that file ({} without a file).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not YAML, or not a mapping.
    """
    import yaml

    flags: list[str] = []
    for argument in argv:
        is_config = argument.startswith("--config=")
        flags.extend(["--config", argument.removeprefix("--config=")] if is_config else [argument])
    if "--config" not in flags:
        return flags, {}
    path = (flags[flags.index("--config") + 1 :] or [""])[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"config={path!r}: no such YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config={path!r}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r}: expected a mapping of options to values")
    return flags, content


def has_flag(name: str, flags: Sequence[str]) -> bool:
    """True if ``--name`` is among ``flags``, with its value behind a space or an equals sign."""
    return any(flag.partition("=")[0] == f"--{name}" for flag in flags)


def early_value(name: str, flags: Sequence[str], in_file: dict[str, Any], default: str) -> str:
    """Value of an option on which the parser of all others depends; flags win over the file, the last flag over all."""
    value = str(in_file.get(name, default))
    for flag, following in pairwise([*flags, ""]):
        if flag == f"--{name}":
            value = following
        elif flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
    return value


def parse_with_trl(
    types: Sequence[Any],
    flags: Sequence[str],
    *,
    prog: str,
    defaults: dict[str, Any] | None = None,
    foreign: Callable[[str], bool] = lambda name: False,  # noqa: ARG005
    hint: str = "",
) -> list[Any]:
    """One instance of each dataclass of ``types`` from ``flags``, as :func:`read_flags` returns them.

    Args:
        types: Dataclasses whose fields are the options.
        flags: With ``--config FILE`` among them or not.
        prog: The command's name in its help.
        defaults: What stands where neither file nor flag says otherwise.
        foreign: True for the ``--name`` of an option that only another choice of ``types`` knows. In a file it is
            ignored, so that one file serves every choice; as a flag it is refused.
        hint: Which choice such a flag needs.

    Raises:
        ValueError: A name that is no option, in the file or among the flags, or a value that does not fit.
    """
    from trl import TrlParser  # type: ignore[attr-defined]

    parser = TrlParser(types, prog=prog, allow_abbrev=False)
    unknown = parser.set_defaults_with_config(**(defaults or {}))
    *parsed, in_file, rest = parser.parse_args_and_config(
        flags, return_remaining_strings=True, separate_remaining_strings=True
    )
    # Each unknown option of the file comes as a name and a value, those of the command line as they were typed.
    names = [name for name in (unknown + in_file)[::2] if not foreign(name)]
    given = [flag.partition("=")[0] for flag in rest if flag.startswith("--")] or rest
    if names or given:
        why = f" ({hint})" if any(foreign(flag) for flag in given) else ""
        raise ValueError(f"no such option: {', '.join([*names, *given])}{why}; see {prog} --help")
    return parsed


def check_at_least(options: Any, least: int, *names: str) -> None:
    """Refuse numbers below ``least`` among the named fields of ``options``; a field that is None was not given.

    Raises:
        ValueError: The field, its value and the smallest that it may have.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")


def check_model_config(model: Any, *, quantisation: str | None = None) -> None:
    """See that no option of TRL's ``ModelConfig`` is given that another one leaves without effect.

    Args:
        model: The parsed ModelConfig.
        quantisation: Why the command loads no quantised model; None if it does.

    Raises:
        ValueError: The option, its value and what it needs; or a package that is not installed.
    """
    given = {one.name: getattr(model, one.name) for one in fields(model) if getattr(model, one.name) != one.default}
    for name in ("load_in_4bit", "load_in_8bit"):
        if name not in given:
            continue
        if quantisation is not None:
            raise ValueError(f"{name}={given[name]}: {quantisation}; leave it out")
        if not model.use_peft:
            raise ValueError(f"{name}={given[name]}: quantised weights do not train, an adapter does; add use_peft")
        if model.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={model.dtype!r} with {name}: name a dtype to compute in, such as bfloat16")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"{name}={given[name]} needs the package bitsandbytes: pip install bitsandbytes")
    if "lora_task_type" in given and model.use_peft:
        raise ValueError(f"lora_task_type={model.lora_task_type!r}: a language model is trained; leave it CAUSAL_LM")
    for name, value in given.items():
        if name.startswith(("bnb_4bit_", "use_bnb_")) and not model.load_in_4bit:
            raise ValueError(f"{name}={value!r}: is of load_in_4bit, which is not set; set it, or leave {name} out")
        if name.startswith(("lora_", "use_rslora", "use_dora")) and not model.use_peft:
            raise ValueError(f"{name}={value!r}: is of use_peft, which is not set; set it, or leave {name} out")
