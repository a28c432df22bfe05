"""Sampling with transformers on the machine's own CPU or GPU: batched, every parameter given, one seed a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebpo_core.data.problem import Problem, Prompt
from ebpo_core.evaluation.sampling import Batch, Completion, Request, SamplingOptions, sample_seed

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
        model: Any name that ``ebpo_core.models.resolve_model`` takes, or a loaded model of transformers.
        options: How to sample.
        tokenizer: Of a loaded model; a model by its name brings its own.
        batch_size: Completions drawn at once.
        device: Of a model by its name: "auto" takes a CUDA GPU if there is one, else the CPU; or a torch device.
        dtype: Of a model by its name: "auto" (the checkpoint's), "float32", "bfloat16"...
        generation: Further arguments of the model's ``generate``, such as FusionRoute's routing options.
        model_options: Further options of ``from_pretrained``, such as ``attn_implementation``.

    The weights are loaded at the first call of :meth:`generate`, so that a finished file costs nothing. A loaded model
    stays on its device and is afterwards in training mode if it was.

    Raises:
        ValueError: ``batch_size`` below 1, or an argument that the model, loaded or not, cannot use.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        options: SamplingOptions,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        device: str = "auto",
        dtype: str = "auto",
        generation: Mapping[str, Any] | None = None,
        **model_options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        by_name = isinstance(model, str)
        if by_name != (tokenizer is None):
            raise ValueError(
                f"tokenizer is given and model={model!r} is a name: the model's own is loaded with it; leave it out"
                if by_name
                else f"tokenizer is missing: the {type(model).__name__} is loaded already, give its tokenizer too"
            )
        if not by_name and ((device, dtype) != ("auto", "auto") or model_options):
            raise ValueError("device, dtype and options of from_pretrained are for a model by its name: load it so")
        self.options, self.batch_size, self.generation = options, batch_size, dict(generation or {})
        self.device, self.dtype, self.model_options = device, dtype, model_options
        self.name = model if isinstance(model, str) else type(model).__name__
        self._loaded: Any = None if by_name else (model, tokenizer)
        self._by_name = by_name

    def settings(self) -> dict[str, Any]:
        """The model by the last part of its name and a fingerprint of its weights, the dtype and further arguments.

        Raises:
            ValueError: The model was given loaded: nothing names its weights.
        """
        from ebpo_core.models import resolve_model

        if not self._by_name:
            raise ValueError(f"a loaded {self.name} has no name to be written into a file: save it and give its folder")
        source, gguf_file = resolve_model(self.name)
        local = Path(source).is_dir()
        return {
            "kind": "transformers",
            "model": Path(source).resolve().name if local else source,
            "weights": weights_fingerprint(Path(source), gguf_file) if local else None,
            "dtype": self.dtype,
            **self.model_options,
            **self.generation,
        }

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, loaded once."""
        if self._loaded is None:
            import torch

            from ebpo_core.models import load_model

            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model, tokenizer = load_model(self.name, dtype=self.dtype, **self.model_options)
            self._loaded = model.to(device).eval(), tokenizer  # type: ignore[arg-type]
        loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] = self._loaded
        return loaded

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
        model, tokenizer = self.load()
        config = self._generation_config()
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            encoded = self._encode(tokenizer, batch).to(model.device)
            ids = self._tokens(model, encoded, config, [request.seed for request in batch])
            yield self._decode(tokenizer, batch, ids[:, encoded["input_ids"].shape[1] :], config.eos_token_id or [])

    def _tokens(self, model: PreTrainedModel, encoded: Any, config: Any, seeds: Sequence[int]) -> torch.Tensor:
        """Prompts and answers, ``[rows, columns]`` int64, padded on both sides; the model is left as it was."""
        import torch
        from transformers import GenerationConfig

        further = dict(self.generation)
        processors = list(further.pop("logits_processor", []))
        if self.options.temperature > 0:
            processors.append(SeededChoice(self.options, seeds))
        training = model.training
        # What `config` leaves unset would come from the model's own: penalties, forced and suppressed tokens.
        own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
        try:
            with torch.no_grad():
                ids: torch.Tensor = model.eval().generate(  # type: ignore[no-untyped-call]
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    generation_config=config,
                    logits_processor=processors,
                    **further,
                )
        finally:
            model.generation_config = own
            model.train(training)
        return ids

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
            text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
            kept = tuple(row if end is None else row[: end + 1])
            answers.append((request, Completion(text, "length" if end is None else "stop", len(kept), kept)))
        return answers


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    *,
    batch_size: int = 256,
    on_batch: Callable[[int, int], None] | None = None,
    **generation: Any,
) -> list[Completion]:
    """One answer of a loaded model to each prompt; equal prompts have seeds of their own.

    Args:
        model, tokenizer, batch_size, generation: As for :class:`LocalModel`.
        prompts: Texts, or message lists.
        options: How to sample; temperature 0 is greedy.
        on_batch: Called with the number of answers so far and that of all prompts, after each batch.
    """
    backend = LocalModel(model, options, tokenizer=tokenizer, batch_size=batch_size, generation=generation)
    requests = [
        Request(Problem(str(place), prompt), prompt, 0, sample_seed(options.seed, str(place), 0))
        for place, prompt in enumerate(prompts)
    ]
    answers: list[Completion] = []
    for batch in backend.generate(requests):
        answers += [completion for _, completion in batch]
        if on_batch is not None:
            on_batch(len(answers), len(prompts))
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
