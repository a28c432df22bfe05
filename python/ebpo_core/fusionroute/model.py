"""``FusionRouteForCausalLM``: a router LM that picks one frozen expert LM per token and adds its own logits to it."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .checkpoint import CheckpointMixin
from .compat import CACHE
from .compiled.experts import CompiledExperts, check_options
from .compiled.lending import LendingCache
from .config import FusionRouteConfig
from .context import check_length
from .decoding.cache import FusionRouteCache
from .decoding.fusing import ExpertLogits, full_logits, lazy_logits
from .decoding.history import NewTokens, new_tokens
from .decoding.routing import OPTION_NAMES, RoutingOptions, permitted, select, selected_share
from .experts.experts import Experts
from .families import check_cached, check_router, keeps_cache
from .generation import FusionRouteGenerationMixin, current_call
from .keywords import check_forward
from .router import at, kept, run_router

if TYPE_CHECKING:
    from typing import Any as PreTrainedModel
else:
    from transformers import PreTrainedModel


_OWN = ("fuse", "router_only", "active_rows", "logits_to_keep")  # of the forward's keywords, those that are ours alone


@dataclass
class FusionRouteOutput(CausalLMOutputWithPast):
    """transformers' output, with the routing of the K positions whose logits were asked for.

    Attributes:
        logits: ``[B, K, V]``, float32 (float64 for float64 models): ``z_router + alpha z_expert``, not normalised;
            their log-softmax is the policy. With ``router_only`` the router's own, in its dtype. None if not ``fuse``.
        routing_weights: ``W h_t``, ``[B, K, n]`` float32.
        expert_ids: the selected experts, ``[B, K]`` int64; -1 at padding, whose logits are the router's.
        router_logits: with ``fuse=False``, ``[B, K, V_router]``.
        expert_logits: with ``fuse=False``, the experts' own, and where each of them lies.
    """

    routing_weights: Tensor | None = None
    expert_ids: Tensor | None = None
    router_logits: Tensor | None = None
    expert_logits: ExpertLogits | None = None


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
    _tied_weights_keys: ClassVar[dict[str, str]] = {}  # none but the router's, which PEFT finds where this is a dict

    def __init__(self, config: FusionRouteConfig) -> None:
        check_router(config.router_config)
        super().__init__(config)
        self.router = AutoModelForCausalLM.from_config(config.router_config)
        # W reads what the LM head reads, which some families project to another width (OPT-350m, RemBERT).
        text = config.router_config.get_text_config()  # type: ignore[union-attr]
        width = getattr(self.router.get_output_embeddings(), "in_features", text.hidden_size)
        self.route_head = nn.Linear(width, config.num_experts, bias=False, dtype=torch.float32)
        object.__setattr__(self, "_experts", Experts())
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers may initialise the router as it does its own models.

        In custom code it passes over modules whose own parameters are all loaded, and with them over buffers that are
        not saved and that a router computes from its config (Falcon-H1's multipliers).
        """
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True: the setting is the router's, whose own class sees to it; one without a mixture of experts has none."""
        return True

    @property
    def experts(self) -> Experts:
        """The loaded experts; empty after ``load_experts=False``."""
        experts: Experts = self._experts
        return experts

    @property
    def compiled(self) -> CompiledExperts | None:
        """The experts, where they are compiled; else None."""
        experts = self.experts
        return experts if isinstance(experts, CompiledExperts) else None

    def train(self, mode: bool = True) -> Any:
        """``nn.Module.train``.

        Raises:
            ValueError: training a router whose experts are compiled, and belong to it as it is.
        """
        if mode and self.compiled is not None:
            raise ValueError(
                "the experts are compiled for this router, which must stay as it is: to train it, load the checkpoint "
                "with compiled=False, and compile again afterwards"
            )
        return super().train(mode)

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
        """transformers' own, for the router; V stays, unless the router becomes narrower than it.

        Raises:
            ValueError: a router whose experts are compiled, and belong to it as it is.
        """
        if self.compiled is not None:
            raise ValueError(
                "resize_token_embeddings, and the experts are compiled for this router, which must stay as it is: load "
                "the checkpoint with compiled=False to resize it, and compile again afterwards"
            )
        embeddings: Any = super().resize_token_embeddings(*args, **kwargs)
        text = self.router.config.get_text_config()
        text.vocab_size = embeddings.weight.shape[0]
        self.config.vocab_size = min(self.config.vocab_size, text.vocab_size)
        return embeddings

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.to``; experts without a device of their own follow to the device (their dtypes stay)."""
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
            router_only: run no expert: ``logits`` are the router's own (cut to V) and ``expert_ids`` the argmax of the
                routing weights, for training and routing statistics.
            fuse: False leaves the sum to the caller's kernels.
            active_rows: ``[B]`` bool; rows that are False run no expert (their sequences are finished).
            kwargs: alpha, complementary, route, hysteresis, allowed_experts, forced_expert, expert_prefill and
                expert_cache_budget, see :class:`~.decoding.routing.RoutingOptions`; by default those of the call of
                ``generate``, then the config's. Others that the router's forward knows go there.

        Raises:
            TypeError: a keyword that neither knows.
            ValueError: no input_ids, an attention mask that is not 2-D, a cache of another kind, arguments that do not
                go with a cache, a text that one of the models has no positions for, or no experts loaded. The cache is
                as it was then.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            what = "input_ids is None" if input_ids is None else "inputs_embeds is given"
            raise ValueError(f"{what}: pass token ids alone; embeddings of one model mean nothing to the others")
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}: pass [B, S], at least one token a row")
        if labels is not None and (router_only or not fuse):
            name = "router_only=True" if router_only else "fuse=False"
            raise ValueError(f"labels with {name}: the loss is that of the fused logits; leave one of the two out")
        call = current_call(self)
        options = self.config.options() if call is None else call.options
        options = options.updated(**{name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs})
        kwargs.pop("tokenizer", None)  # of `stop_strings`: transformers' generate hands it to every forward
        check_forward(type(self.router), kwargs, (*OPTION_NAMES, *_OWN), fused=not router_only)
        state = cache if cache is not None else past_key_values
        if use_cache is None:  # as stock models: a loop that feeds the output's cache back works without asking for it
            one_pass = self.training or router_only or labels is not None or isinstance(logits_to_keep, Tensor)
            models = [self.router, *(expert.model for expert in self.experts)]
            use_cache = not one_pass and all(map(keeps_cache, models))
        if use_cache and state is None:
            check_cached(self.router, self.experts)
            state = FusionRouteCache(DynamicCache(config=self.config.get_text_config()), self._with_caches)
        self._check_mode(state, router_only, logits_to_keep)
        # Before the router runs: a bad argument must leave the cache as it was.
        B, V = len(input_ids), int(self.config.vocab_size or 0)
        if state is not None:
            state.check_rows(B)
            state.check_experts(self._with_caches)
        allowed = None if router_only else permitted(options, self.experts.names, B, self.route_head.weight.device)
        if not router_only and input_ids.shape[1] != 1:
            self.experts.check_readable(input_ids, self.router.config.get_text_config().vocab_size)
        new = new_tokens(input_ids, attention_mask, position_ids, state)
        given = position_ids if call is None else None  # `generate` counts them
        asked = () if router_only else self.experts
        eager = options.expert_prefill == "eager"  # which runs all of them
        if self.compiled is not None and not router_only:
            check_options(options)
        check_length(self, new.mask.shape[1], given, asked, None if eager else allowed)

        # 1. The router: logits at the K positions asked for, [B, K, V_router], hidden states at all, [B, S, D].
        keep = kept(logits_to_keep, input_ids.shape[1])
        router_cache = None if state is None else state.router
        router_cache = router_cache if router_only else self._lent(router_cache)
        router_logits, hidden, out = run_router(
            self.router,
            keep,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=new.positions,
            use_cache=bool(use_cache) or isinstance(router_cache, LendingCache),
            **{CACHE: router_cache},
            **kwargs,
        )
        # Collected first: an output's items, `output[0]` among them, have the order in which they were set.
        result: dict[str, Any] = {CACHE: state if use_cache else None, "routing_weights": None}
        result |= {name: getattr(out, name, None) for name in ("hidden_states", "attentions")}
        if router_only:
            weights = self._routing_weights(at(keep, hidden))
            result |= {"routing_weights": weights, "logits": router_logits[..., :V]}
            return FusionRouteOutput(**result, expert_ids=weights.detach().argmax(-1))

        # 2. The route: an expert for each of the K positions, [B, K].
        weights, selected, ids = self._select(hidden, new, keep, state, options, allowed, active_rows)
        result |= {"routing_weights": weights, "expert_ids": ids}

        # 3. The experts, each for the rows and positions that selected it.
        if state is None and not isinstance(router_cache, LendingCache):
            expert_logits = full_logits(self.experts, ids, new, attention_mask, logits_to_keep)
        else:
            expert_logits = self._run_experts(state, new, selected, ids, options, router_cache, logits_to_keep)
        if call is not None and call.recorder is not None:
            share = selected_share(weights, ids.clamp(min=0), allowed)
            call.recorder.add(new.mask.shape[1], ids, share, expert_logits.argmax(ids, V))

        # 4. The sum, [B, K, V].
        if not fuse:
            return FusionRouteOutput(**result, router_logits=router_logits, expert_logits=expert_logits)
        logits = expert_logits.added_to(router_logits[..., :V], options.alpha, options.complementary)
        if labels is not None:
            result["loss"] = self.loss_function(logits=logits, labels=labels, vocab_size=V, **kwargs)
        return FusionRouteOutput(**result, logits=logits)

    def _check_mode(self, state: Any, router_only: bool, logits_to_keep: int | Tensor) -> None:
        """Refuse a cache of another kind, what does not go with one, and a model without experts."""
        if state is not None and not isinstance(state, FusionRouteCache):
            raise ValueError(
                f"{CACHE} is a {type(state).__name__}: pass the FusionRouteCache of an earlier call, or None"
            )
        if state is not None and router_only:
            raise ValueError("router_only=True with a cache: the experts could not follow; leave the cache out")
        if state is not None and isinstance(logits_to_keep, Tensor):
            raise ValueError("logits_to_keep is a tensor: with a cache pass an int, the number of last positions")
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}: pass a number of last positions, or 0 for all")
        if not router_only and not len(self.experts):
            raise ValueError(
                "no experts are loaded (load_experts=False): load the model with its experts, or pass router_only=True"
            )

    def _select(
        self,
        hidden: Tensor,
        new: NewTokens,
        keep: slice | Tensor | None,
        state: FusionRouteCache | None,
        options: RoutingOptions,
        allowed: Tensor | None,
        active_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The route from the hidden states ``[B, S, D]`` of new columns.

        Returns:
            The routing weights at the positions ``keep``, ``[B, K, n]``. The experts selected there, ``[B, K]``; with
            hysteresis, where each depends on those before it, at all positions, ``[B, S]``. Those that run at the
            positions ``keep``, ``[B, K]``, -1 at padding and in rows that are not active.
        """
        routed = None if options.hysteresis else keep
        previous = state.last_selected(new.seen) if options.hysteresis and state is not None else None
        weights = self._routing_weights(at(routed, hidden))
        selected = select(weights, options, allowed, previous, at(routed, new.real))
        ids, runs = selected, at(keep, new.real)
        if routed is not keep:
            weights, ids = at(keep, weights), at(keep, selected)
        if active_rows is not None:
            runs = runs & active_rows[:, None].to(runs.device)
        return weights, selected, torch.where(runs, ids, -1)

    @property
    def _with_caches(self) -> Any:
        """The experts that keep caches of their own: none of the compiled ones."""
        return self.experts if self.compiled is None else ()

    def _lent(self, cache: Any) -> Any:
        """The cache for the router's forward: where experts are compiled, one that lends them what the router saw."""
        return cache if self.compiled is None else self.compiled.lend(cache)

    def _run_experts(
        self,
        state: Any,
        new: NewTokens,
        selected: Tensor,
        ids: Tensor,
        options: RoutingOptions,
        router_cache: Any,
        logits_to_keep: int | Tensor = 0,
    ) -> ExpertLogits:
        """The experts ``ids`` of the last K columns, through the cache, which takes the new columns in.

        Compiled ones read what ``router_cache``, of :meth:`_lent`, has seen; then ``state`` may be None.
        """
        wanted = [] if state is None else state.append(new, selected, ids)
        if self.compiled is not None:
            return self.compiled.selected_logits(router_cache, new, ids, logits_to_keep)
        state.budget = options.expert_cache_budget
        if options.expert_prefill == "eager" and not new.seen.shape[1]:
            state.read_with_the_others(wanted)
        return lazy_logits(self.experts, state, wanted, ids.device)

    def _routing_weights(self, hidden: Tensor) -> Tensor:
        """``W h_t``, ``[B, K, n]`` in the dtype of W, for ``[B, K, D]``; under autocast too."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            weights: Tensor = self.route_head(hidden.to(self.route_head.weight.dtype))
        return weights


AutoModelForCausalLM.register(FusionRouteConfig, FusionRouteForCausalLM, exist_ok=True)
