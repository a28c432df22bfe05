"""``FusionRouteSFTTrainer``, the first phase: language modelling and routing on informative positions (§4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor

from .base import FusionRouteTrainer, Scores
from .batches import MixDataset
from .config import FusionRouteSFTConfig
from .losses import IGNORE
from .metrics import Quotients
from .preparation import fusion_model, prepared_data, prepared_model

Rows = Iterable[Mapping[str, Any]]


class FusionRouteSFTTrainer(FusionRouteTrainer):
    """Trains router and route head with L_SFT = (L_LM + λ L_expert) / N; ``transformers.Trainer`` in everything else.

    N counts the label tokens of the global batch, over ranks and accumulation steps. TRL's ``SFTTrainer`` is not the
    base: its loss is the model's own, and its collator knows nothing of experts.

    ``routing_loss="normalized"`` needs the model's experts loaded; with ``"softmax"`` the model may come from
    ``from_pretrained(..., load_experts=False)``, and an expert is loaded (alone) only while the cache is computed.

    With PEFT, ``route_head`` belongs to ``modules_to_save``: ``peft_config`` is given it, a PEFT model must have it.

    Args:
        model: a :class:`~..model.FusionRouteForCausalLM`, or a PEFT model on one.
        args: a :class:`~.config.FusionRouteSFTConfig`.
        train_dataset, eval_dataset: rows, see :func:`~.data.tokenize_samples`; ``eval_dataset`` may be a dict of them.
        processing_class: the tokenizer.
        peft_config: of an adapter to be made on the router.
        kwargs: to ``Trainer`` (``callbacks``, ``optimizers``, ...).

    Metrics, in evaluation with the prefix ``eval_``: ``loss_lm`` and ``loss_routing`` (both per label token),
    ``routing/accuracy`` (share of informative positions where the selected expert gives the label the highest
    probability of all), ``routing/informative`` (share of label positions that are informative) and
    ``routing/usage/<expert>`` (share of label positions where it is selected).

    Raises:
        TypeError: another model or args.
        ValueError: data that cannot be trained on, experts that are not loaded, a frozen route head, or an expert cache
            of something else.
    """

    def __init__(
        self,
        model: Any,
        args: FusionRouteSFTConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, FusionRouteSFTConfig):
            raise TypeError(f"args is a {type(args).__name__}: pass a FusionRouteSFTConfig")
        fusion = fusion_model(model)
        model = prepared_model(model, args, peft_config, samples=True, trains_head=True)

        def prepared(rows: Any, name: str) -> MixDataset | None:
            return prepared_data(fusion, args, processing_class, name, samples=rows)

        train = prepared(train_dataset, "train")
        evaluation: Any
        if isinstance(eval_dataset, Mapping):
            evaluation = {key: prepared(rows, f"eval-{key}") for key, rows in eval_dataset.items()}
        else:
            evaluation = prepared(eval_dataset, "eval")
        super().__init__(model, args, train, evaluation, processing_class, **kwargs)

    def data_of_rows(self, rows: Any) -> MixDataset:
        data = prepared_data(self.fusion, self.args, self.processing_class, None, samples=rows)
        return cast("MixDataset", data)  # None stands for no rows

    def loss_of_batch(self, scores: Scores, inputs: dict[str, Tensor]) -> tuple[Tensor, Quotients]:  # noqa: ARG002
        lm, tokens = -scores.logprobs, scores.tokens
        losses = lm + self.args.routing_loss_weight * scores.routing
        quotients = {
            "loss": (losses, tokens),
            "loss_lm": (lm, tokens),
            "loss_routing": (scores.routing, tokens),
        }
        return losses.sum(), quotients

    def count_of_batch(self, inputs: dict[str, Tensor]) -> Tensor:
        return (inputs["labels"] != IGNORE).sum()
