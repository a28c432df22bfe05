"""Sampling with transformers on the machine's own CPU or GPU: batched, every parameter given, one seed a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebpo_core.evaluation.sampling import Batch, Completion, Request, SamplingOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


class SeededChoice:
    """A logits processor that draws each row's token with that row's own random numbers.

    ``generate`` has one random stream for a whole batch. This draws by inverting the distribution function at one
    uniform number a token, and leaves a single finite logit, so that greedy search takes the token drawn.

    Args:
        options: Temperature above 0, top_p and top_k, applied in that order of transformers: temperature, k, p.
        seeds: One a row.
    """

    def __init__(self, options: SamplingOptions, seeds: Sequence[int]) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.warpers: list[Any] = []
        if options.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            self.warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self.warpers.append(TopPLogitsWarper(options.top_p))
        # (tokens, rows): NumPy's streams do not change with the device or the version of torch.
        self.uniforms = np.stack([np.random.default_rng(seed).random(options.max_new_tokens) for seed in seeds], axis=1)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` is (rows, vocabulary) in any float dtype; the distribution is summed in float64."""
        import torch

        for warper in self.warpers:
            scores = warper(input_ids, scores)
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        uniform = torch.from_numpy(self.uniforms[self.step]).to(scores.device)
        # The first token whose cumulative probability exceeds the number has a probability above 0 itself.
        total = cumulative[:, -1]
        below = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(cumulative, below[:, None], right=True)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class LocalModel:
    """A causal language model in this process.

    Args:
        name: Any name that ``ebpo_core.models.resolve_model`` takes.
        options: How to sample.
        batch_size: Completions drawn at once.
        device: "auto" takes a CUDA GPU if there is one, else the CPU; or a torch device.
        dtype: Of the weights: "auto" (the checkpoint's), "float32", "bfloat16"...
        model_options: Further options of ``from_pretrained``, such as ``attn_implementation``.

    The weights are loaded at the first call of :meth:`generate`, so that a finished file costs nothing.
    """

    def __init__(
        self,
        name: str,
        options: SamplingOptions,
        *,
        batch_size: int = 64,
        device: str = "auto",
        dtype: str = "auto",
        **model_options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        self.name, self.options, self.batch_size = name, options, batch_size
        self.device, self.dtype, self.model_options = device, dtype, model_options
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def settings(self) -> dict[str, Any]:
        """The model by the last part of its name and a fingerprint of its weights, and the dtype."""
        from ebpo_core.models import resolve_model

        source, gguf_file = resolve_model(self.name)
        local = Path(source).is_dir()
        return {
            "kind": "transformers",
            "model": Path(source).resolve().name if local else source,
            "weights": weights_fingerprint(Path(source), gguf_file) if local else None,
            "dtype": self.dtype,
            **self.model_options,
        }

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, loaded once, the model in evaluation mode on its device."""
        if self._loaded is None:
            import torch

            from ebpo_core.models import load_model

            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model, tokenizer = load_model(self.name, dtype=self.dtype, **self.model_options)
            self._loaded = model.to(device).eval(), tokenizer  # type: ignore[arg-type]
        return self._loaded

    def _generation_config(self) -> Any:
        """A config in which nothing is left for transformers to fill in from the model's own."""
        from transformers import GenerationConfig

        model, tokenizer = self.load()
        own = model.generation_config
        stops = {tokenizer.eos_token_id}
        if own is not None and own.eos_token_id is not None:  # chat models end a turn with a token of their own
            stops |= set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
        return GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,  # SeededChoice draws
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=self.options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(stop for stop in stops if stop is not None) or None,
            disable_compile=True,
        )

    def generate(self, requests: Sequence[Request]) -> Generator[Batch, None, None]:
        """One list of samples a batch, in the order of ``requests``."""
        import torch
        from transformers import GenerationConfig

        model, tokenizer = self.load()
        config = self._generation_config()
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            encoded = self._encode(tokenizer, batch).to(model.device)
            choice = [] if self.options.temperature == 0 else [SeededChoice(self.options, [row.seed for row in batch])]
            # What `config` leaves unset would come from here: penalties, forced and suppressed tokens.
            own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
            try:
                with torch.inference_mode():
                    ids = model.generate(  # type: ignore[operator]
                        input_ids=encoded["input_ids"],
                        attention_mask=encoded["attention_mask"],
                        generation_config=config,
                        logits_processor=choice,
                    )
            finally:
                model.generation_config = own
            yield self._decode(tokenizer, batch, ids[:, encoded["input_ids"].shape[1] :], config.eos_token_id or [])

    def _encode(self, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Request]) -> Any:
        texts: list[Any] = []
        chats = 0
        for request in batch:
            if isinstance(request.prompt, str):
                texts.append(request.prompt)
                continue
            chats += 1
            try:
                texts.append(tokenizer.apply_chat_template(request.prompt, add_generation_prompt=True, tokenize=False))
            except ValueError as error:
                raise ValueError(
                    f"problem {request.problem.id!r} is a chat, and the tokenizer of {self.name!r} has no chat "
                    f"template that takes it ({error}): give a chat model, or prompts as text"
                ) from error
        if 0 < chats < len(texts):
            raise ValueError("some prompts are text and some are chats: give one kind")
        # A chat template writes its special tokens itself.
        return tokenizer(texts, add_special_tokens=not chats, padding=True, padding_side="left", return_tensors="pt")

    @staticmethod
    def _decode(
        tokenizer: PreTrainedTokenizerBase, batch: Sequence[Request], ids: torch.Tensor, stops: Sequence[int]
    ) -> Batch:
        answers: Batch = []
        for request, row in zip(batch, ids.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in stops), None)
            kept = row if end is None else row[:end]
            text = str(tokenizer.decode(kept, skip_special_tokens=True))
            reason = "length" if end is None else "stop"
            answers.append((request, Completion(text, reason, len(row) if end is None else end + 1)))
        return answers


def weights_fingerprint(folder: Path, gguf_file: str | None = None) -> str:
    """16 hex digits over a local model: its config, its weight files' sizes, and 16 blocks of 64 KiB of each.

    Training changes nearly every weight, so samples of the file tell two checkpoints apart without reading gigabytes.
    """
    digest = hashlib.blake2b(digest_size=8)
    names = [gguf_file] if gguf_file else ["config.json", *sorted(file.name for file in folder.glob("*.safetensors"))]
    for name in names:
        file = folder / name
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as content:
            for block in range(_BLOCKS):
                content.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK_BYTES))
    return digest.hexdigest()
