"""``FusionRouteForCausalLM``: a router LM that picks one frozen expert LM per token and adds its own logits to it."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .checkpoint import CheckpointMixin
from .compat import CACHE
from .config import FusionRouteConfig
from .decoding.cache import FusionRouteCache
from .decoding.fusing import full_parts, fuse_parts, lazy_parts
from .decoding.routing import OPTION_NAMES, permitted, select, selected_share
from .experts.experts import Experts
from .generation import FusionRouteGenerationMixin, current_call

if TYPE_CHECKING:
    from typing import Any as PreTrainedModel
else:
    from transformers import PreTrainedModel

# What the router's LM head was given, while `_run_router` listens. Per thread, so that calls may run side by side.
_heard: ContextVar[list[Tensor] | None] = ContextVar("fusionroute_lm_head_input", default=None)
_listening = Lock()  # threads that run a model's first forward side by side must not register the hook twice


def _listen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    box = _heard.get()
    if box is not None:
        box.append(inputs[0])


@dataclass
class FusionRouteOutput(CausalLMOutputWithPast):
    """transformers' output, with the routing of the K positions whose logits were asked for.

    Attributes:
        logits: ``[B, K, V]``, float32 (float64 for float64 models): ``z_router + alpha z_expert``, not normalised;
            their log-softmax is the policy. With ``router_only`` the router's own, in its dtype. None if not ``fuse``.
        routing_weights: ``W h_t``, ``[B, K, n]`` float32.
        expert_ids: the selected experts, ``[B, K]`` int64; -1 at padding, whose logits are the router's.
        router_logits: with ``fuse=False``, ``[B, 1, V_router]``.
        expert_logits: with ``fuse=False``, per expert ``[rows that selected it, V_expert]``, in batch order.
    """

    routing_weights: Tensor | None = None
    expert_ids: Tensor | None = None
    router_logits: Tensor | None = None
    expert_logits: tuple[Tensor, ...] | None = None


class FusionRouteForCausalLM(CheckpointMixin, FusionRouteGenerationMixin, PreTrainedModel):  # type: ignore[misc]
    """FusionRoute (arXiv 2601.05106): ``log pi(y) ~ log pi_router(y) + alpha log pi_expert(y)``, expert = argmax W h_t.

    The router is a submodule like any other. The experts are not: they are frozen, loaded from references, and stay out
    of ``state_dict``, ``parameters``, optimizers, FSDP and PEFT. An expert runs only for the rows and steps that select
    it and catches up on what it missed (see :mod:`.decoding.lazy`).

    Use :meth:`from_experts` to begin, ``from_pretrained`` to load, ``generate`` as with any transformers model.
    """

    config: FusionRouteConfig
    config_class = FusionRouteConfig
    base_model_prefix = "router"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["route_head"]  # noqa: RUF012 -- transformers declares it so

    def __init__(self, config: FusionRouteConfig) -> None:
        super().__init__(config)
        text = config.router_config.get_text_config()  # type: ignore[union-attr]
        self.router = AutoModelForCausalLM.from_config(config.router_config)
        self.route_head = nn.Linear(text.hidden_size, config.num_experts, bias=False, dtype=torch.float32)
        object.__setattr__(self, "_experts", Experts())
        self.post_init()

    @property
    def experts(self) -> Experts:
        """The loaded experts; empty after ``load_experts=False``."""
        experts: Experts = self._experts
        return experts

    @property
    def base_model(self) -> nn.Module:
        """The router's backbone (what feeds its LM head)."""
        backbone: nn.Module = self.router.base_model
        return backbone

    def get_decoder(self) -> nn.Module:
        decoder: nn.Module = self.router.get_decoder()
        return decoder

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.router.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.router.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.router.get_output_embeddings()
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.router.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, for the router; V stays, unless the router becomes narrower than it."""
        embeddings: Any = super().resize_token_embeddings(*args, **kwargs)
        text = self.router.config.get_text_config()
        text.vocab_size = embeddings.weight.shape[0]
        self.config.vocab_size = min(self.config.vocab_size, text.vocab_size)
        return embeddings

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.to``; experts without a device of their own follow to the device (their dtypes stay)."""
        moved = super().to(*args, **kwargs)
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None:
            self.experts.to(device)
        return moved

    def cuda(self, device: Any = None) -> Any:
        return self.to(torch.device("cuda") if device is None else torch.device("cuda", device))

    def cpu(self) -> Any:
        return self.to("cpu")

    # -------------------------------------------------------------------------------------------------------- forward

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: FusionRouteCache | None = None,
        past_key_values: FusionRouteCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        router_only: bool = False,
        fuse: bool = True,
        active_rows: Tensor | None = None,
        alpha: float | None = None,
        complementary: bool | None = None,
        route: str | None = None,
        hysteresis: float | None = None,
        allowed_experts: Any = None,
        forced_expert: Any = None,
        expert_prefill: str | None = None,
        expert_cache_budget: int | None = None,
        **kwargs: Any,
    ) -> FusionRouteOutput:
        """Fused logits of the last ``logits_to_keep`` positions (0: all).

        Args:
            input_ids: ``[B, S]`` int64; required, since each model has embeddings of its own.
            attention_mask: ``[B, T]``, 0 at padding; T counts what the cache holds. What it holds may become padding.
                None: no padding.
            position_ids: ``[B, S]``; by default counted over the mask.
            cache, past_key_values: one argument under transformers' two names for it: the state of earlier calls.
            labels: ``[B, S]``, -100 to ignore: adds the cross-entropy of the fused policy as ``loss``.
            use_cache: keep a cache and return it; by default True, but not in training, with labels, router_only or a
                tensor in logits_to_keep.
            logits_to_keep: int, or without a cache a 1-D tensor of positions.
            router_only: run no expert: ``logits`` are the router's own (cut to V), for training and routing statistics.
            fuse: False leaves the sum to the caller's kernels, for one position per row.
            active_rows: ``[B]`` bool; rows that are False run no expert (their sequences are finished).
            alpha, complementary, route, hysteresis, allowed_experts, forced_expert, expert_prefill,
            expert_cache_budget: see :class:`~.decoding.routing.RoutingOptions`; by default those of the call of
                ``generate``, then the config's.
            kwargs: to the router's forward.

        Raises:
            ValueError: no input_ids, an attention mask that is not 2-D, a cache of another kind, arguments that do not
                go with a cache, or no experts loaded. The cache is as it was then.
        """
        state = cache if cache is not None else past_key_values
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("input_ids is None: pass token ids; embeddings of one model mean nothing to the others")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions: pass [B, T] with 0 at padding")
        call = current_call(self)
        given = (alpha, complementary, route, hysteresis, allowed_experts, forced_expert, expert_prefill)
        options = call.options if call is not None else self.config.options()
        options = options.updated(**dict(zip(OPTION_NAMES, (*given, expert_cache_budget), strict=True)))
        if use_cache is None:  # as stock models: a loop that feeds the output's cache back works without asking for it
            one_pass = self.training or router_only or labels is not None or isinstance(logits_to_keep, Tensor)
            use_cache = not one_pass
        if use_cache and state is None:
            state = FusionRouteCache(DynamicCache(config=self.config.get_text_config()), self.experts)
        if state is not None and not isinstance(state, FusionRouteCache):
            raise ValueError(
                f"{CACHE} is a {type(state).__name__}: pass the FusionRouteCache of an earlier call, or None"
            )

        if state is not None and router_only:
            raise ValueError("router_only=True with a cache: the experts could not follow; leave the cache out")
        if state is not None and isinstance(logits_to_keep, Tensor):
            raise ValueError("logits_to_keep is a tensor: with a cache pass an int, the number of last positions")
        if not router_only and not len(self.experts):
            raise ValueError(
                "no experts are loaded (load_experts=False): load the model with its experts, or pass router_only=True"
            )

        B, S = input_ids.shape
        if state is not None:
            state.check_rows(B)
        # Before the router runs: a bad option must leave the cache as it was.
        allowed = None if router_only else permitted(options, self.experts.names, B, self.route_head.weight.device)
        past = 0 if state is None or state.history is None else state.history.columns
        if attention_mask is None:
            whole = torch.ones_like(input_ids, dtype=torch.bool)
            if past:
                whole = torch.cat([state.history.mask, whole], dim=1)  # type: ignore[union-attr]
        else:
            if attention_mask.shape != (B, past + S):
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}: pass [{B}, {past + S}], "
                    f"{past} columns of the cache and {S} of input_ids"
                )
            whole = attention_mask.bool()
        mask = whole[:, past:]
        if position_ids is None:
            position_ids = (whole.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        position_ids = position_ids.expand(B, S)

        router_logits, hidden, out = self._run_router(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep,
            **{CACHE: None if state is None else state.router},
            **kwargs,
        )
        K = router_logits.shape[1]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            weights = self.route_head(hidden.to(self.route_head.weight.dtype))
        V = self.config.vocab_size
        # Collected first: an output's items, `output[0]` among them, have the order in which they were set.
        result: dict[str, Any] = {CACHE: state if use_cache else None, "routing_weights": weights}
        result |= {"hidden_states": out.hidden_states, "attentions": out.attentions}
        if router_only:
            result |= {"logits": router_logits[..., :V], "expert_ids": weights.detach().argmax(-1)}
            return FusionRouteOutput(**result)
        kept = mask[:, -K:] if isinstance(logits_to_keep, int) else mask[:, logits_to_keep]
        ids = select(weights, options, allowed, None if state is None else state.previous, kept)
        runs = kept if active_rows is None else kept & active_rows[:, None].to(kept.device)
        ids = torch.where(runs, ids, -1)
        if state is not None:
            # The one wait for the device in a step: which experts run is decided on the host.
            seen = whole[:, :past]
            facts = torch.stack([mask.sum(1), state.differs(seen)], dim=1)
            *columns, counts, remasked = torch.cat([ids, facts], dim=1).T.tolist()
            if any(remasked):
                state.remask(seen)
            chosen = [list(row) for row in zip(*columns, strict=True)]
            state.budget = options.expert_cache_budget
            history = state.append(input_ids, position_ids, mask, counts)
            if options.hysteresis:
                state.remember(ids, kept)
            if options.expert_prefill == "eager" and past == 0:
                for expert in range(len(self.experts)):
                    rows = [row for row, length in enumerate(history.lengths) if length and expert not in chosen[row]]
                    if rows:
                        state.run(expert, rows, [history.lengths[row] for row in rows], 1)
            parts = lazy_parts(self.experts, state, chosen)
        else:
            parts = full_parts(self.experts, ids, input_ids, attention_mask, position_ids, logits_to_keep)
        parts = [part._replace(logits=part.logits.to(router_logits.device)) for part in parts]
        result["expert_ids"] = ids
        if call is not None and call.recorder is not None:
            share = selected_share(weights, ids.clamp(min=0), allowed)
            own = torch.full_like(ids, -1)
            for part in parts:
                own[part.rows, part.positions] = part.logits[:, :V].argmax(-1)
            call.recorder.add(past + S, ids, share, own)
        if not fuse:
            result |= {"router_logits": router_logits, "expert_logits": tuple(part.logits for part in parts)}
            return FusionRouteOutput(**result)
        logits = fuse_parts(router_logits[..., :V], parts, options.alpha, options.complementary)
        if labels is not None:
            result["loss"] = self.loss_function(logits=logits, labels=labels, vocab_size=V, **kwargs)
        return FusionRouteOutput(**result, logits=logits)

    def _run_router(self, **inputs: Any) -> tuple[Tensor, Tensor, Any]:
        """The router's logits ``[B, K, V_router]``, the input of its LM head ``[B, K, D]``, and its output object."""
        head = self.router.get_output_embeddings()
        with _listening:
            if _listen not in head._forward_pre_hooks.values():
                head.register_forward_pre_hook(_listen)
        box: list[Tensor] = []
        token = _heard.set(box)
        try:
            out = self.router(**inputs, return_dict=True)
        finally:
            _heard.reset(token)
        if len(box) != 1:
            raise ValueError(
                f"the router {type(self.router).__name__} called its LM head {len(box)} times in one forward: "
                "FusionRoute needs a causal LM that calls the module get_output_embeddings() returns once"
            )
        return out.logits, box[0], out


AutoModelForCausalLM.register(FusionRouteConfig, FusionRouteForCausalLM, exist_ok=True)
