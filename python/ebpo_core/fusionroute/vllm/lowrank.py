"""The low-rank terms of compiled experts: ``B_e (A_e x)``, e another expert for each row, the scale within B.

All experts' A are stacked, and so are their B. A row is multiplied by all of them, and the products of the experts that
it did not select are set to zero between the two: two plain matrix products a layer, without a gather or a wait for the
device. On one core of an AMD EPYC this is faster than gathering A and B row by row for 1 to 64 rows, 3 and 7 experts,
ranks 8 and 64. One product for each expert is faster where n r is near the layer's own width and a batch has more than
a few rows, but its shapes depend on the selection, which compiled code and CUDA graphs cannot have.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear


class Selection(nn.Module):
    """The experts that the rows of the running step selected, as a mask over the stacked products.

    Attributes:
        mask: ``[rows, n r]`` bool: true in the columns of the row's expert. One piece of memory for all layers and
            steps, so that compiled code (and a CUDA graph) finds it.
    """

    mask: Tensor

    def __init__(self, rows: int, num_experts: int, rank: int) -> None:
        super().__init__()
        self.num_experts, self.rank = num_experts, rank
        # One row more than a step can have: compilation must not find that they are as many.
        self.register_buffer("mask", torch.zeros(rows + 1, num_experts * rank, dtype=torch.bool), persistent=False)

    def choose(self, ids: Tensor) -> None:
        """Set the mask's first rows for ``ids``, ``[rows]`` int64."""
        experts = torch.arange(self.num_experts, device=ids.device).repeat_interleave(self.rank)
        self.mask[: len(ids)] = ids[:, None] == experts


class Shard(NamedTuple):
    """This rank's part of one side of a weight matrix."""

    start: int
    size: int

    @property
    def cut(self) -> slice:
        return slice(self.start, self.start + self.size)


class LowRankTerms(nn.Module):
    """The stacked adapters of one linear layer, or of several that are one layer in vLLM (gate and up; q of q, k, v).

    Args:
        selection: of the step.
        inputs: of the layer.
        outputs: of the adapted pieces of the layer's output, which stand at its beginning.

    Attributes:
        lora_A: ``[pieces n r, inputs]``, pieces outside, experts inside.
        lora_B: ``[sum of outputs, n r]``.
    """

    def __init__(self, selection: Selection, inputs: Shard, outputs: Sequence[Shard]) -> None:
        super().__init__()
        self.selection = selection
        self.inputs, self.outputs = inputs, list(outputs)
        self.widths = [shard.size for shard in outputs]
        k = selection.mask.shape[1]
        self.lora_A = nn.Parameter(torch.zeros(len(self.outputs) * k, inputs.size), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(sum(self.widths), k), requires_grad=False)

    def load(self, piece: int, down: Tensor, up: Tensor) -> None:
        """Put the adapters of one piece into their places, cut to this rank.

        Args:
            piece: of the outputs.
            down, up: of all experts, ``[n, r, in]`` and, with the scale in it, ``[n, r, out]``.
        """
        k, shard, start = self.selection.mask.shape[1], self.outputs[piece], sum(self.widths[:piece])
        with torch.no_grad():
            self.lora_A[piece * k : (piece + 1) * k] = down.flatten(0, 1)[:, self.inputs.cut]
            self.lora_B[start : start + shard.size] = up.flatten(0, 1)[:, shard.cut].T

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the terms of ``x``, ``[rows, inputs]``, to the beginning of ``out``, ``[rows, outputs or more]``.

        On ranks that hold parts of an input, this adds parts of the terms: they are summed with the layer's own.
        """
        mask = self.selection.mask[: x.shape[0]]
        products = nn.functional.linear(x, self.lora_A)
        k, start = mask.shape[1], 0
        for piece, width in enumerate(self.widths):
            # Chosen, not multiplied by 0: where another expert's product overflows, that would be NaN in this row.
            kept = products[:, piece * k : (piece + 1) * k].where(mask, 0)
            out[:, start : start + width].addmm_(kept, self.lora_B[start : start + width].t())
            start += width


class AdaptedMethod(LinearMethodBase):  # type: ignore[misc]
    """vLLM's linear method of a layer that has another one's weights, whatever their method, and low-rank terms.

    A layer calls its method before it sums over ranks, so the terms go through the sum that there is already.
    """

    supports_pre_processed_weights = True

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an adapted layer has no weights of its own: see adapted()")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = layer.base.quant_method.apply(layer.base, x, bias)
        layer.terms.add_to(out, x)
        return out


def adapted(layer: Any, base: Any, selection: Selection) -> None:
    """Have ``layer``, which was made without memory for weights, compute with those of ``base`` and low-rank terms.

    k and v of a layer of q, k and v are computed with q, and not used: vLLM may have packed the three as one.

    Args:
        layer: of the same class and sizes as ``base``.
        base: the router's.
        selection: of the step.
    """
    rank, width = layer.tp_rank, layer.input_size_per_partition
    pieces = list(layer.output_partition_sizes)
    if isinstance(layer, QKVParallelLinear):
        pieces = pieces[:1]
    if isinstance(layer, RowParallelLinear):
        inputs, outputs = Shard(rank * width, width), [Shard(0, piece) for piece in pieces]
    else:
        inputs, outputs = Shard(0, width), [Shard(rank * piece, piece) for piece in pieces]
    layer.terms = LowRankTerms(selection, inputs, outputs)
    bias = layer._parameters.pop("bias", None)
    layer._parameters.clear()
    layer.register_parameter("bias", None if bias is None else base.bias)
    layer.base = base
    layer.quant_method = AdaptedMethod()


class _HeadMethod(AdaptedMethod):
    """Of the router's rows and, behind them, as many of the adapted stream, which alone get the terms."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = layer.base.quant_method.apply(layer.base, x, bias)
        rows = len(x) // 2
        layer.terms.add_to(out[rows:], x[rows:])
        return out


class AdaptedHead(nn.Module):
    """An LM head for both streams at once, which vLLM's ``LogitsProcessor`` takes in the place of the router's.

    Its rows are the router's, then those of the adapted stream, so that the weights are read once.
    """

    def __init__(self, base: Any, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.tp_size = base.tp_size
        own, width = base.shard_indices, base.embedding_dim
        vocabulary = Shard(own.org_vocab_start_index, own.num_org_elements)  # without padding
        self.terms = LowRankTerms(selection, Shard(0, width), [vocabulary])
        self.quant_method = _HeadMethod()
