"""``compile``: a checkpoint whose experts are adapters of its router, distilled one after the other."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import AutoTokenizer

from ebpo_core.files import read_json, write_json, write_text
from ebpo_core.fusionroute.card import model_card
from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.fusionroute.experts.files import ADAPTER_WEIGHTS, free_folder
from ebpo_core.fusionroute.experts.offload import OF_MODELS, exact_device
from ebpo_core.fusionroute.experts.tokenizers import fingerprint
from ebpo_core.fusionroute.model import FusionRouteForCausalLM
from ebpo_core.fusionroute.training.data import tokenize_samples
from ebpo_core.fusionroute.training.lengths import check_lengths, report_cuts
from ebpo_core.fusionroute.training.sequences import TokenSequences
from ebpo_core.progress import bar

from .distillation import Distillation, Distiller, Shown, selecting
from .files import COMPILED_FOLDER, REPORT, read_adapters, require_peft, router_hash, write_adapter
from .report import compare
from .targets import target_modules

FORM, VERSION = "fusionroute compilation", 1
_STATE = "compiling.json"  # in `compiled/` until everything is there
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")
_ROUTING = ("alpha", "complementary", "hysteresis")  # of the config: which positions count, and what the report sums
_HELD_OUT = 20  # without rows of their own, every 20th row is held out


def compile(  # noqa: A001 -- the word of the documentation; used as a name of this package, not alone
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    data: Iterable[Mapping[str, Any]],
    *,
    eval_data: Iterable[Mapping[str, Any]] | None = None,
    rank: int = Distillation.rank,
    alpha: float | None = None,
    steps: int | Mapping[str, int] = Distillation.steps,
    batch_size: int = Distillation.batch_size,
    learning_rate: float = Distillation.learning_rate,
    other_weight: float = Distillation.other_weight,
    seed: int = Distillation.seed,
    max_length: int | None = None,
    train_on: Literal["completion", "all"] = "completion",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    save_steps: int = 200,
    expert_paths: Mapping[str, Any] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compile the experts of a checkpoint into adapters of its router, and write the compiled checkpoint.

    Each expert, of whatever architecture, is the teacher of one LoRA of the router: on the router's keys and values it
    learns to give the expert's distribution, at the labels of ``data``. A run that was killed goes on when it is
    started again with the same arguments.

    Args:
        checkpoint: folder or hub id of a FusionRoute checkpoint.
        output: folder of the compiled one; new, empty, or of a run that was killed.
        data: rows of SFT data, see :func:`~..training.data.tokenize_samples`.
        eval_data: held-out rows for the report; None holds back every 20th row of ``data`` that has a label.
        rank, alpha, batch_size, learning_rate, other_weight, seed: see :class:`~.distillation.Distillation`.
        steps: optimizer steps, the same for each expert, or a number for each by name: one that computes takes more of
            them than one that rewrites.
        max_length, train_on, chat_template_kwargs: as for :func:`~..training.data.tokenize_samples`.
        save_steps: how often the state of an expert's training is saved, in steps.
        expert_paths, trust_remote_code: as for ``from_pretrained``.
        device: of the models; by default where they load, the CPU.
        console: for bars and lines; None is silent.

    Returns:
        The report on held-out rows, see :func:`~.report.compare`; it is in ``compiled/report.json`` and the card, too.

    Raises:
        FileExistsError, FileNotFoundError, ImportError, TypeError, ValueError: what does not fit, with the remedy,
            before anything is written.
        FloatingPointError: a loss that is not finite. What was saved before stays.
    """
    require_peft()
    if isinstance(save_steps, bool) or not isinstance(save_steps, int) or save_steps < 1:
        raise ValueError(f"save_steps={save_steps!r}: expected a whole number of at least 1")
    counts = dict(steps) if isinstance(steps, Mapping) else None
    same = 1 if isinstance(steps, Mapping) else steps
    settings = Distillation(rank, alpha, same, batch_size, learning_rate, other_weight, seed)
    by_name = None if counts is None else {name: replace(settings, steps=count) for name, count in counts.items()}
    screen = Console(quiet=True) if console is None else console
    if device is not None:
        exact_device(device, OF_MODELS)
    folder = Path(output).expanduser().resolve()
    _remove_unfinished(folder / COMPILED_FOLDER)
    going_on = (folder / COMPILED_FOLDER / _STATE).is_file()
    if not going_on:
        free_folder(folder)
    # 1. The model with its experts, whose router must be of a family that can lend its cache; and the data.
    model = FusionRouteForCausalLM.from_pretrained(
        checkpoint, compiled=False, expert_paths=expert_paths, trust_remote_code=trust_remote_code
    )
    model = (model if device is None else model.to(device)).eval().requires_grad_(False)
    target_modules(model.router)
    _check_names(model.experts.names)
    of_experts = _settings_of(model.experts.names, settings, by_name)
    tokenizer = _tokenizer_of(checkpoint)
    options: dict[str, Any] = {
        "max_length": max_length,
        "train_on": train_on,
        "chat_template_kwargs": chat_template_kwargs,
    }
    train, held_out = _split(data, eval_data, model, tokenizer, options)
    made_from = {
        "settings": {**asdict(settings), "alpha": settings.lora_alpha, "steps": counts or settings.steps},
        "router": model_hash(model),
        # As they are loaded and read: another dtype, or other tokens in the place of one, is another teacher.
        "experts": {
            expert.name: [expert.hash, str(expert.model.dtype), expert.reference.substitutes]
            for expert in model.experts
        },
        "routing": {name: getattr(model.config, name) for name in _ROUTING},
        "tokenizer": fingerprint(tokenizer),
        "data": train.fingerprint,
        "eval_data": held_out.fingerprint,
    }
    _begin(folder, made_from, going_on)
    # 2. The experts, one by one.
    _distil(model, train, of_experts, folder, save_steps, screen)
    # 3. What it cost, on rows that none of them saw.
    names = model.experts.names
    adapters = read_adapters(folder, names, target_modules(model.router), settings.rank, settings.scale)
    report = {"rank": settings.rank, "settings": made_from["settings"], **compare(model, adapters, held_out)}
    # 4. The checkpoint: complete once its config says that it is compiled, and the state is gone.
    model.config.expert_prefill, model.config.expert_cache_budget = "lazy", None  # of caches that there are no more
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / COMPILED_FOLDER / REPORT, report)
    config = FusionRouteConfig.from_pretrained(folder)
    config.compiled = {"rank": settings.rank, "scale": settings.scale, "router": router_hash(folder)}
    config.save_pretrained(folder)
    write_text(folder / "README.md", model_card(config, report=report))
    (folder / COMPILED_FOLDER / _STATE).unlink()
    return report


def _split(
    data: Iterable[Mapping[str, Any]],
    eval_data: Iterable[Mapping[str, Any]] | None,
    model: Any,
    tokenizer: Any,
    options: Mapping[str, Any],
) -> tuple[TokenSequences, TokenSequences]:
    """The rows to train on, and the held-out ones, tokenized."""
    train = _tokenized("data", data, model, tokenizer, options)
    if eval_data is not None:
        return train, _tokenized("eval_data", eval_data, model, tokenizer, options)
    if len(train) < 2:
        raise ValueError("data has one row with a label, which is held out for the report: give more, or eval_data")
    parts = ([i for i in range(len(train)) if (i % _HELD_OUT == 0) == held_out] for held_out in (False, True))
    kept, held_out = (TokenSequences.of(train[i] for i in part) for part in parts)
    return kept, held_out


def _tokenized(
    name: str, rows: Iterable[Mapping[str, Any]], model: Any, tokenizer: Any, options: Mapping[str, Any]
) -> TokenSequences:
    """The rows of the argument ``name`` as sequences, at least one, which all models can read.

    Raises:
        TypeError, ValueError: with the argument's name.
    """
    try:
        sequences = tokenize_samples(rows, tokenizer, **options)
        sequences.check(int(model.config.vocab_size))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
    report_cuts(name, sequences, options["max_length"])
    if not len(sequences):
        raise ValueError(
            f"{name} has no row with a label ({sequences.dropped} lost theirs to max_length): give more rows"
        )
    check_lengths(name, sequences, model)
    return sequences


def _settings_of(
    names: list[str], settings: Distillation, by_name: dict[str, Distillation] | None
) -> dict[str, Distillation]:
    """The settings of each expert, by name: ``settings`` for all, unless some are given by name.

    Raises:
        ValueError: steps of other experts than these.
    """
    if by_name is None:
        return dict.fromkeys(names, settings)
    if by_name.keys() != set(names):
        raise ValueError(
            f"steps names {list(by_name)}, the experts are {names}: give one number, or one for each of them"
        )
    return by_name


def _check_names(names: list[str]) -> None:
    """Raise a ValueError for experts whose folders would be files of a compilation."""
    files = {_STATE, REPORT, *(_state_of(name) for name in names)}
    for name in names:
        if name in files:
            raise ValueError(f"expert {name!r}: a file of compiled checkpoints has this name; give the expert another")


def _state_of(name: str) -> str:
    """The file of an expert's training state in ``compiled/``."""
    return f"{name}.state.safetensors"


def _tokenizer_of(checkpoint: str | os.PathLike[str]) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: one without.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint={os.fspath(checkpoint)!r} holds no tokenizer: save the router's into it ({error})"
        ) from error


def model_hash(model: Any) -> str:
    """The hash of the model's own weights in memory, by which a run that goes on knows its router."""
    from ebpo_core.fusionroute.experts.hashes import tensors_hash

    return tensors_hash(model.state_dict())


def _remove_unfinished(folder: Path) -> None:
    """Remove what :mod:`ebpo_core.files` left in ``compiled/`` when a run was killed, and the folder if it was new."""
    if not (folder / _STATE).is_file() and any(not _UNFINISHED.fullmatch(file.name) for file in folder.glob("*")):
        return  # no folder of a compilation
    for file in [*folder.glob("*"), *folder.glob("*/*")]:
        if _UNFINISHED.fullmatch(file.name) and file.is_file():
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _begin(folder: Path, made_from: Mapping[str, Any], going_on: bool) -> None:
    """Note what the run is made from, or compare it with what a killed one was.

    Raises:
        ValueError: the folder is of a run with other settings, data or models.
    """
    state = folder / COMPILED_FOLDER / _STATE
    if not going_on:
        state.parent.mkdir(parents=True, exist_ok=True)
        write_json(state, {"format": FORM, "version": VERSION, **made_from})
        return
    then = read_json(state, form=FORM, version=VERSION, what="state of a compilation")
    changed = [name for name, value in made_from.items() if then.get(name) != value]
    shown = [name for name in changed if name not in ("settings", "routing")]
    for name in set(changed).difference(shown):
        old, new = then.get(name) or {}, made_from[name]
        shown += [f"{key} ({old.get(key)}, now {new[key]})" for key in new if old.get(key) != new[key]]
    if shown:
        raise ValueError(
            f"output={str(folder)!r} is of a run that was killed, and this one differs in {', '.join(shown)}: start "
            "it as it was, or give another folder"
        )


def _distil(
    model: Any,
    train: TokenSequences,
    settings: Mapping[str, Distillation],
    folder: Path,
    save_steps: int,
    console: Console,
) -> None:
    """Train what is missing of the adapters."""
    missing = []
    for index, name in enumerate(model.experts.names):
        if (folder / COMPILED_FOLDER / name / ADAPTER_WEIGHTS).is_file():
            (folder / COMPILED_FOLDER / _state_of(name)).unlink(missing_ok=True)  # of a run killed in between
        else:
            missing.append((index, name))
    if not missing:
        return
    selects = selecting(model, train)
    for index, name in missing:
        state = folder / COMPILED_FOLDER / _state_of(name)
        own = settings[name]
        distiller = Distiller(model, index, train, own, selects[:, index], state)
        with bar(console, f"Expert {name}", own.steps, distiller.step) as shown:
            distiller.run(_shown_on(shown), save_steps)
        place = folder / COMPILED_FOLDER / name
        write_adapter(place, distiller.down, distiller.up, own.lora_alpha)
        state.unlink(missing_ok=True)


def _shown_on(shown: Any) -> Callable[[int, Shown], None]:
    def on_step(step: int, now: Shown) -> None:
        shown.update(step, f"KL {now.kl:.4f}  agreement {now.agreement:.1%}")

    return on_step
