"""``FusionRouteSFTConfig`` and ``FusionRouteCDPOConfig``: ``TrainingArguments`` with the paper's settings."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

# No `from __future__ import annotations` here: argparse-building parsers (HfArgumentParser, TrlParser) read the
# field types of these dataclasses at run time.


@dataclass
class FusionRouteArguments(TrainingArguments):
    """Arguments of both phases. Use :class:`FusionRouteSFTConfig` or :class:`FusionRouteCDPOConfig`."""

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate (the paper's 1e-5)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs to train (the paper's 1)."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1 a share of all steps."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave False: the trainer makes batches of its own."}
    )
    routing_loss: Literal["normalized", "softmax"] = field(
        default="normalized",
        metadata={
            "help": "Routing loss of a position: 'normalized' is -log softmax(sum_i w_i log pi_i)[y] and needs the "
            "experts loaded; 'softmax' is -sum_i softmax(w)_i log pi_i(y) and needs the expert cache alone."
        },
    )
    routing_loss_weight: float = field(
        default=1 / 3,
        metadata={"help": "lambda in L_SFT = L_LM + lambda * L_expert (the paper's 1/3)."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Cut longer sequences at their end, and count them; None cuts nothing."},
    )
    train_on: Literal["completion", "all"] = field(
        default="completion",
        metadata={"help": "Tokens of SFT samples that have labels: the completion (every reply of a chat), or all."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the tokenizer's chat template, as JSON."}
    )
    expert_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the experts' argmaxes and label log-probabilities; 'expert_cache' in output_dir by "
            "default. Name one to share the cache of the same data between runs. All ranks must see it."
        },
    )
    expert_cache_batch_tokens: int = field(
        default=8192, metadata={"help": "Tokens an expert gets at once while the cache is computed."}
    )
    on_change: Literal["raise", "rebuild"] = field(
        default="raise",
        metadata={
            "help": "What to do when a stored expert cache (or file of reference log-probabilities) is of other "
            "experts, another tokenizer, other data or another router: 'raise', or 'rebuild' it."
        },
    )

    # JSON on a command line; transformers parses the fields that are named here.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True: the trainer makes batches of its own; leave it False")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: FusionRoute's losses have no label smoothing; "
                "leave it 0"
            )
        choices = {
            "routing_loss": ("normalized", "softmax"),
            "train_on": ("completion", "all"),
            "on_change": ("raise", "rebuild"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {allowed}")
        if self.routing_loss_weight < 0:
            raise ValueError(f"routing_loss_weight={self.routing_loss_weight}: must not be negative")


@dataclass
class FusionRouteSFTConfig(FusionRouteArguments):
    """Arguments of :class:`~.sft.FusionRouteSFTTrainer`, the first phase (arXiv 2601.05106 §4.1).

    Every field of ``TrainingArguments`` is there; learning rate and epochs default to the paper's. ``weight_decay``
    would also act on ``route_head``; the paper gives none and transformers' default is 0.

    Raises:
        ValueError: a value that does not fit, named with the remedy.
    """


@dataclass
class FusionRouteCDPOConfig(FusionRouteArguments):
    """Arguments of :class:`~.cdpo.FusionRouteCDPOTrainer`, the second phase: CDPO alone, or mixed with SFT samples.

    Raises:
        ValueError: a value that does not fit, named with the remedy.
    """

    beta: float = field(default=0.1, metadata={"help": "beta of DPO (the paper's 0.1)."})
    sft_loss_weight: float = field(
        default=1 / 3,
        metadata={"help": "Weight of an SFT sample's loss beside a pair's in mix training (the paper's lambda, 1/3)."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Turn the router's dropout off, an adapter's too: the reference has none, so with it policy and "
            "reference differ before the first step, and so do the experts that they select."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta}: must be positive")
        if self.sft_loss_weight < 0:
            raise ValueError(f"sft_loss_weight={self.sft_loss_weight}: must not be negative")
