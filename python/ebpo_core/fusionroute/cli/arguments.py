"""The options of ``fusionroute train``: TRL's own parser over the trainers' configs, plus what to train on what."""

# No `from __future__ import annotations` here: TrlParser reads the field types of this dataclass at run time.
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Stage = Literal["sft", "mix", "cdpo"]


@dataclass
class TrainArguments:
    """What ``fusionroute train`` adds to the trainer's arguments and to TRL's ``ModelConfig``."""

    stage: Stage = field(
        default="sft",
        metadata={
            "help": "sft (first phase), mix (SFT samples and preference pairs shuffled together), or cdpo alone."
        },
    )
    experts: list[str] | None = field(
        default=None,
        metadata={
            "help": "NAME=PATH of each frozen expert, to start from a plain router; in YAML also a mapping of names to "
            "paths or to fields of an expert's reference. A FusionRoute checkpoint knows its own."
        },
    )
    expert_paths: list[str] | None = field(
        default=None, metadata={"help": "NAME=PATH of experts that a checkpoint refers to elsewhere."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the expert's logits; 1 in the paper, else the checkpoint's."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "SFT rows, for sft and mix: a .jsonl/.parquet/.csv file, a saved data set, or a hub id."},
    )
    preferences: str | None = field(default=None, metadata={"help": "Preference rows, for mix and cdpo; same forms."})
    eval_data: str | None = field(default=None, metadata={"help": "SFT rows to evaluate on; see --eval_strategy."})
    eval_preferences: str | None = field(default=None, metadata={"help": "Preference rows to evaluate on."})
    dataset_split: str = field(default="train", metadata={"help": "Split of saved and hub data sets."})
    train_size: int | None = field(
        default=None, metadata={"help": "Rows to keep of each training set; all by default."}
    )
    cpu_threads: int | None = field(default=None, metadata={"help": "Threads of torch on a CPU."})

    def __post_init__(self) -> None:
        if self.train_size is not None and self.train_size < 1:
            raise ValueError(f"train_size={self.train_size}: expected at least 1")
        needed = {"sft": ("data",), "mix": ("data", "preferences"), "cdpo": ("preferences",)}[self.stage]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: stage {self.stage} needs it; give a file, a folder or a hub id")
        for name in ("data", "preferences"):
            for given in (name, f"eval_{name}"):
                if name not in needed and getattr(self, given) is not None:
                    raise ValueError(f"{given}={getattr(self, given)!r}: stage {self.stage} does not use it")

    def named_experts(self) -> dict[str, Any] | None:
        """``experts`` as :meth:`FusionRouteForCausalLM.from_experts` takes them."""
        return _named("experts", self.experts)

    def moved_experts(self) -> dict[str, Any] | None:
        """``expert_paths`` as ``from_pretrained`` takes them."""
        return _named("expert_paths", self.expert_paths)


def _named(argument: str, value: Any) -> dict[str, Any] | None:
    if value is None or isinstance(value, dict):
        return value
    named = {}
    for item in [value] if isinstance(value, str) else value:
        name, _, path = str(item).partition("=")
        if not name or not path:
            raise ValueError(f"{argument}={item!r}: expected NAME=PATH, e.g. math=models/math")
        if name in named:
            raise ValueError(f"{argument}={value!r}: {name!r} is there twice")
        named[name] = path
    return named


def parse(argv: Sequence[str], prog: str = "fusionroute train") -> tuple[Any, Any, Any]:
    """Parse a YAML file and flags into (TrainArguments, the stage's trainer config, TRL's ModelConfig); flags win.

    Raises:
        ValueError: A value that does not fit, or a name that is no option. What only the second phase knows (``beta``,
            ``sft_loss_weight``) may stand in a file for stage sft, so that one file serves all stages; as a flag it is
            refused.
    """
    from trl import ModelConfig, TrlParser  # type: ignore[attr-defined]

    from ebpo_core.fusionroute.training import FusionRouteCDPOConfig, FusionRouteSFTConfig

    arguments, in_file = _with_file(argv)
    stage = _stage_of(arguments, in_file)
    config_type: Any = FusionRouteSFTConfig if stage == "sft" else FusionRouteCDPOConfig
    types: list[Any] = [TrainArguments, config_type, ModelConfig]
    parser = TrlParser(types, prog=prog, allow_abbrev=False)
    *parsed, unknown, flags = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    second = {f"--{one.name}" for one in fields(FusionRouteCDPOConfig)} if stage == "sft" else set()
    # Each unknown option of the file comes as a name and a value.
    names = [name for name in unknown[::2] if name not in second]
    if names or flags:
        hint = f" (stage {stage})" if set(flags) & second else ""
        raise ValueError(f"no such option: {', '.join([*names, *flags])}{hint}; see {prog} --help")
    train, config, model = parsed
    if model.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is missing: give a FusionRoute checkpoint, or a router (a causal LM's directory, hub "
            "id, .gguf file or package:<installed package>) together with experts"
        )
    return train, config, model


def _with_file(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The flags with ``--config=FILE`` written as TrlParser knows it, and what the file says."""
    import yaml

    arguments: list[str] = []
    for argument in argv:
        arguments.extend(["--config", argument[9:]] if argument.startswith("--config=") else [argument])
    if "--config" not in arguments:
        return arguments, {}
    path = (arguments[arguments.index("--config") + 1 :] or [""])[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"config={path!r}: no such YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config={path!r}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r}: expected a mapping of options to values")
    return arguments, content


def _stage_of(arguments: Sequence[str], in_file: dict[str, Any]) -> str:
    """The stage, known before the rest is parsed, since it decides which of the two configs parses the rest."""
    stage = str(in_file.get("stage", "sft"))
    for index, argument in enumerate(arguments):
        if argument == "--stage":
            stage = (list(arguments[index + 1 :]) or [""])[0]
        elif argument.startswith("--stage="):
            stage = argument[8:]
    return stage
