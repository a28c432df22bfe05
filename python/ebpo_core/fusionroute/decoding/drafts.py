"""Drafts: the router writes some tokens ahead, and each expert verifies them in one chunk instead of one by one.

A round of length k forwards the router k times, on the last token and on k - 1 of its own, which gives k positions and
the expert selected at each. These experts run once each, on all k. The first position's fused token is right in any
case; each further one is, as long as the tokens before it are those that the router went on with. So a round writes 1
to k tokens, and what was read beyond them is taken back from every cache.

Sampling needs no rule of its own: the router's draft and the fused token are drawn with the same noise, a function of
the row's seed, the token's place and its id, as Gumbel-max draws. The tokens are those that are drawn without drafts,
one by one, whatever the router wrote; how often the two draws agree only says how fast it goes.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.router import run_router
from ebpo_core.kernels import select_add_sample

from .cache import FusionRouteCache
from .draftable import DraftTokens, shortest_window
from .history import NewTokens
from .lockstep import Text
from .routing import permitted, select, selected_share

_LONGEST_AUTO = 16
_DECAY = 0.9  # per round, of what "auto" has seen: some 30 rounds of memory


def decode(
    model: Any,
    input_ids: Tensor,
    filters: dict[str, Any],
    criteria: Any,
    config: Any,
    call: Any,
    *,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The loop of ``generate`` with drafts: what ``_sample`` of transformers returns, token for token.

    Args:
        model: the FusionRoute model.
        input_ids: the prompts, ``[B, P]``.
        filters: arguments of :func:`~ebpo_core.kernels.select_add_sample`, for sampling.
        criteria, config, streamer, model_kwargs: as in ``GenerationMixin._sample``.
        call: the call of ``generate``, with its options.
    """
    B, device = len(input_ids), input_ids.device
    seed = torch.randint(2**63 - 1, (B,), device=device) if config.do_sample else None
    outputs = model._prefill(input_ids, config, model_kwargs)
    cache: FusionRouteCache = outputs[CACHE]
    cache.activate_past_recording()
    draws = _Draws(seed, filters)
    text = Text(input_ids, criteria, config, streamer, None if call.recorder is None else (call.recorder, call.past))
    text.add(draws.of(outputs.logits[:, -1:], text.lengths), [1] * B)
    del outputs
    drafter = _Drafter(model, cache, call.options, draws, _Length(call.draft_tokens, model, cache))
    prompt, past = cache.facts, cache.columns - text.prompt
    previous = cache.last_selected(prompt[1])
    own = [cache.columns] * B  # columns of each row: all its tokens but the last, which is yet to be read
    finished = text.show()
    while not finished:
        written = drafter.round(text)
        finished = text.show()
        own = [past + length - 1 for length in text.lengths]
        last = past + text.shown - 1
        if finished and all(last <= end <= last + n for end, n in zip(own, written, strict=True)):
            # What the rows wrote beyond the stop is taken back with the rest.
            written = [n - (end - last) for end, n in zip(own, written, strict=True)]
            own = [last] * B
        drafter.take_back(written, own)
    sequences = text.tokens[:, : text.shown].clone()
    if streamer is not None:
        streamer.end()
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.is_sliding:
            layer.record_past = False  # of a cache that is returned; what it holds is cut already
    returned = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    if returned and (any(end != past + text.shown - 1 for end in own) or min(text.filled) < text.shown):
        _complete(drafter, *prompt, previous, text)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(**{"sequences": sequences, CACHE: cache})  # type: ignore[arg-type]
    return sequences


class _Draws:
    """Tokens from logits, greedy or with the noise of their rows and places."""

    def __init__(self, seed: Tensor | None, filters: dict[str, Any]) -> None:
        self.seed, self.filters = seed, filters

    def of(self, logits: Tensor, places: Sequence[int], first: int = 0) -> Tensor:
        """Tokens ``[B, K]`` for logits ``[B, K, V]``; row b's first one is token ``places[b] + first`` of its row."""
        if self.seed is None:
            return logits.argmax(-1)
        B, K, _ = logits.shape
        flat = logits.flatten(0, 1)
        flat = flat.float() if flat.dtype == torch.float64 else flat
        steps = torch.tensor(places, device=flat.device)[:, None] + torch.arange(first, first + K, device=flat.device)
        nobody = torch.zeros_like(steps).flatten()
        drawn = select_add_sample(
            flat,
            nobody,
            torch.zeros_like(flat),
            seed=self.seed.to(flat.device).repeat_interleave(K),
            step=steps.flatten(),
            **self.filters,
        )
        return drawn.token_ids.view(B, K)


class _Drafter:
    """The rounds: the router's tokens, the experts' verdict on them, and the caches cut back to it."""

    def __init__(self, model: Any, cache: FusionRouteCache, options: Any, draws: _Draws, length: Any) -> None:
        self.model, self.cache, self.options, self.draws, self.length = model, cache, options, draws, length
        _, mask = cache.facts
        self._masked = not bool(mask.all())
        self._allowed = permitted(options, model.experts.names, len(mask), model.route_head.weight.device)

    def round(self, text: Text) -> list[int]:
        """Let each row write up to as many tokens as it has room for; returns how many there are."""
        model, cache, V = self.model, self.cache, self.model.config.vocab_size
        room = text.room()
        k = min(self.length.next(), max(room))
        (_, positions, _), seen = cache.facts
        device = seen.device  # the model's; prompts, and so texts, may be on the CPU
        # Columns beyond a row's room are padding: no model may read further than the longest text allowed.
        real = torch.arange(k, device=device) < torch.tensor([max(1, n) for n in room], device=device)[:, None]
        positions = positions[:, -1:] + real.cumsum(1)
        mask = torch.cat([seen, real], dim=1)
        masked = self._masked or min(room) < k
        token = text.last().to(device)
        running = torch.tensor(room, device=device) > 0
        drafts, logits, hidden, over = [], [], [], ~running
        router_cache = model._lent(cache.router)
        for step in range(k):
            drafts.append(token)
            out, state, _ = run_router(
                model.router,
                None,
                input_ids=token,
                attention_mask=mask[:, : seen.shape[1] + step + 1].long() if masked else None,
                position_ids=positions[:, step : step + 1],
                use_cache=True,
                **{CACHE: router_cache},
            )
            logits.append(out[..., :V])
            hidden.append(state)
            if step + 1 < k or self.length.adapts:
                token = self.draws.of(logits[-1], text.lengths, step).to(device)
                over = over | text.ends_at(token)[:, 0]
                if text.may_end and bool(over.all()):  # what comes after an end token is not wanted
                    break
        k = len(drafts)
        positions, mask, real = positions[:, :k], mask[:, : seen.shape[1] + k], real[:, :k]
        new = NewTokens(torch.cat(drafts, dim=1), positions, mask, seen, real)
        weights, selected, ids = model._select(
            torch.cat(hidden, dim=1), new, None, cache, self.options, self._allowed, running
        )
        experts = model._run_experts(cache, new, selected, ids, self.options, router_cache)
        fused = experts.added_to(torch.cat(logits, dim=1), self.options.alpha, self.options.complementary)
        tokens = self.draws.of(fused, text.lengths).to(device)
        guesses = torch.cat([*drafts[1:], token], dim=1) if self.length.adapts else new.ids[:, 1:]
        agreed = (tokens[:, : guesses.shape[1]] == guesses).long().cumprod(1).sum(1)
        counts = torch.minimum(torch.minimum(agreed + 1, real.sum(1)), text.up_to_the_end(tokens))
        written, agreements = torch.stack([counts * running, agreed], dim=0).tolist()
        routing = [ids]
        if text.records:
            routing += [selected_share(weights, ids.clamp(min=0), self._allowed), experts.argmax(ids, V)]
        text.add(tokens, written, *routing)
        if self.length.adapts:
            agreements = [n for n, one in zip(agreements, room, strict=True) if one]
            self.length.learn(agreements, k, [i for i, part in enumerate(experts.parts) if len(part.rows)])
        self._read = k
        return list(written)

    def routes(self, hidden: Tensor, known: Tensor, previous: Tensor | None) -> Tensor:
        """The experts selected at hidden states ``[B, N, D]``, ``[B, N]`` int64.

        Args:
            hidden: of columns without padding.
            known: those selected already, ``[B, N]``; -1 where the selection is still to be made.
            previous: those of the position before the first, ``[B]``.
        """
        weights = self.model._routing_weights(hidden)
        others = torch.arange(weights.shape[-1], device=known.device) != known[..., None]
        weights = weights.masked_fill((others & (known >= 0)[..., None]).to(weights.device), -math.inf)
        return select(weights, self.options, self._allowed, previous).to(known.device)

    def take_back(self, written: Sequence[int], own: Sequence[int]) -> None:
        """Cut the caches to the columns that the tokens written rest on; ``own[b]`` are row b's then."""
        self._masked = self._masked or len(set(written)) > 1
        self.cache.realign([self._read - count for count in written], max(own))


def _complete(drafter: _Drafter, facts: Tensor, mask: Tensor, previous: Tensor | None, text: Text) -> None:
    """Bring a cache that is returned to the columns of the sequences, as without drafts.

    Rows that ended early, or ran ahead of a stop, hold fewer or more tokens: the router then reads the sequences anew;
    the experts go on from what they have of them.

    Args:
        drafter: with the cache as the last round left it.
        facts, mask, previous: the columns before the first new token, and the expert selected at each row's last one.
        text: what was written.
    """
    model, cache = drafter.model, drafter.cache
    new = text.tokens[:, text.prompt : text.shown - 1].to(facts.device)
    N = new.shape[1]
    positions = facts[1, :, -1:] + torch.arange(1, N + 1, device=new.device)
    ids, positions = torch.cat([facts[:2], torch.stack([new, positions])], dim=2)
    real = pad(mask, (0, N), value=True)
    cache.router = DynamicCache(config=model.config.get_text_config())
    _, hidden, _ = run_router(
        model.router,
        slice(-1, None),
        input_ids=ids,
        attention_mask=real.long(),
        position_ids=positions,
        use_cache=True,
        **{CACHE: cache.router},
    )
    # A row that ended selected nothing since; a later call with hysteresis goes on from what it would have.
    routes = text.routes[:, text.prompt + 1 : text.shown].to(facts.device)
    routes = drafter.routes(hidden[:, hidden.shape[1] - N :], routes, previous)
    selected = torch.cat([facts[2], routes], dim=1)
    # Row b's tokens that the experts may have read and that stand: not those beyond its end.
    ends = [min(n - 1, filled, text.shown - 1) for n, filled in zip(text.lengths, text.filled, strict=True)]
    held = [n + end - text.prompt for n, end in zip(mask.sum(1).tolist(), ends, strict=True)]
    cache.rewrite(NewTokens(ids, positions, real, real[:, :0], real), selected, held)


class _Length:
    """The length of a round: as asked for, or the one that costs least per token by what was seen so far.

    With acceptance a and experts of c routers' parameters run in a round, that is ``(k + c) (1 - a) / (1 - a^k)``.
    """

    def __init__(self, draft_tokens: DraftTokens, model: Any, cache: FusionRouteCache) -> None:
        self._fixed = None if draft_tokens == "auto" else draft_tokens
        self.adapts = self._fixed is None
        self._longest = min(_LONGEST_AUTO, shortest_window(cache.router) or _LONGEST_AUTO)
        router, *experts = (
            sum(weight.numel() for weight in part.parameters())
            for part in (model.router, *(expert.model for expert in model.experts))
        )
        self._costs = [expert / router for expert in experts]
        self._accepted, self._tried = 3.0, 4.0  # where nothing is known yet, as if 3 of 4 had been
        self._cost, self._rounds = sum(self._costs) / len(self._costs), 1.0

    def next(self) -> int:
        if self._fixed is not None:
            return self._fixed
        a, c = self._accepted / self._tried, self._cost / self._rounds
        return min(range(1, self._longest + 1), key=lambda k: (k + c) / sum(a**i for i in range(k)))

    def learn(self, agreed: Sequence[int], k: int, ran: Sequence[int]) -> None:
        """Take in a round of length k: how many guesses of each row were right, and which experts ran."""
        self._accepted = _DECAY * self._accepted + sum(agreed)
        self._tried = _DECAY * self._tried + sum(min(n + 1, k) for n in agreed)
        self._cost = _DECAY * self._cost + sum(self._costs[i] for i in ran)
        self._rounds = _DECAY * self._rounds + 1
