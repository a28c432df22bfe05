"""A prototype: router and experts as separate vLLM engines, an expert being fed only when a token selects it.

The design "b" of docs/lazy-serving.md, in lockstep: each step the router's engine reads the newest token of every row,
the driver selects experts, each selected expert's engine reads what its rows have missed, and the driver fuses. Engines
are processes of vLLM 0.32 with a paged cache each; logits come back over the whole vocabulary, in a file mapped by both
sides. An engine gets the reads of all rows in one message: asked one by one, it would begin before the others came,
and pass over its weights twice.

"sessions": a request stays in its engine, which catches up to the token. "calls": a request is over after each answer,
and the next one finds its tokens in the prefix cache, down to whole blocks.

The router's engine is stock, too: its LM head gets the route head's rows as n further columns. So heads are
linear (no soft cap, no scale), as Llama's and Qwen2's, and everything is float32. Greedy decoding only.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ebpo_core.fusionroute.config import FusionRouteConfig
from ebpo_core.kernels import select_add_argmax

ENVIRONMENT = {
    "VLLM_PLUGINS": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in the process that we start, and no other
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Work(NamedTuple):
    """What an engine did."""

    forwards: int
    computed: int  # tokens
    seconds: float


class Generation(NamedTuple):
    """Of each row the new tokens and their experts; the work of each engine, the router's first."""

    tokens: list[list[int]]
    experts: list[list[int]]
    work: list[Work]


class SeparateEngines:
    """Engines for the models of a checkpoint whose experts are folders; ``close`` ends their processes.

    Args:
        checkpoint: of FusionRoute; its router's LM head is linear, and all weights are float32.
        folder: an empty one, for the router's model and the logits; beside them it takes ``(n + 1) * rows * V`` floats.
        rows: the most that are decoded together.
        sessions: keep requests in their engines; otherwise each read is a call of its own.
        together: ask all selected experts' engines at once; otherwise one after another, each on all the cores.
        settings: of every engine, as ``vllm.EngineArgs`` names them.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        rows: int,
        *,
        sessions: bool = True,
        together: bool = False,
        **settings: Any,
    ) -> None:
        config = FusionRouteConfig.from_pretrained(checkpoint)
        self._vocab_size, self._alpha, n = config.vocab_size, float(config.alpha), len(config.experts)
        self._sessions, self._together, self._requests = sessions, together, 0
        models = [save_router(checkpoint, folder / "router"), *(Path(expert["path"]) for expert in config.experts)]
        settings = {"dtype": "float32", "max_num_seqs": rows, "enforce_eager": True} | settings
        self._engines: list[_Engine] = []
        try:
            for index, model in enumerate(models):
                width = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
                file = np.memmap(folder / f"logits-{index}", np.float32, "w+", shape=(rows, width))
                self._engines.append(_Engine(str(model), file, {"sessions": sessions, "settings": settings}))
            for engine in self._engines:
                engine.receive()
        except BaseException:
            self.close()
            raise
        self._routing = slice(self._engines[0].logits.shape[1] - n, None)

    def generate(self, prompts: list[list[int]], new: int, plan: list[list[int]] | None = None) -> Generation:
        """``new`` tokens for each prompt, greedily; ``plan[row][step]`` takes the route head's place."""
        router, *experts = self._engines
        for engine in self._engines:
            engine.work = Work(0, 0, 0.0)
        texts = [list(prompt) for prompt in prompts]
        names = [str(self._requests + row) for row in range(len(prompts))]
        self._requests += len(prompts)
        selected: list[list[int]] = [[] for _ in prompts]
        held = [[0] * len(prompts) for _ in self._engines]
        for step in range(new):
            self._read(router, range(len(prompts)), texts, names, held[0])
            router.wait()
            weights = router.logits[: len(prompts), self._routing]
            ids = weights.argmax(-1).tolist() if plan is None else [row[step] for row in plan]
            asked = []
            for index, engine in enumerate(experts):
                rows = [row for row, expert in enumerate(ids) if expert == index]
                if rows:
                    self._read(engine, rows, texts, names, held[1 + index])
                    asked.append(engine)
                    if not self._together:
                        engine.wait()
            if self._together:
                for engine in asked:
                    engine.wait()
            logits = [engine.logits[: len(prompts)] for engine in self._engines]  # of a row, its expert's are new
            best = select_add_argmax(
                logits[0], torch.tensor(ids), logits[1:], alpha=self._alpha, vocab_size=self._vocab_size
            )
            for row, token in enumerate(best.token_ids.tolist()):
                texts[row].append(token)
                selected[row].append(ids[row])
        for engine in self._engines if self._sessions else ():
            engine.ask([], names)
            engine.wait()
        tokens = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        return Generation(tokens, selected, [engine.work for engine in self._engines])

    def _read(
        self, engine: _Engine, rows: Sequence[int], texts: list[list[int]], names: list[str], held: list[int]
    ) -> None:
        reads = []
        for row in rows:
            text = texts[row]
            name = names[row] if self._sessions else f"{names[row]}-{len(text)}"
            reads.append((name, row, text[held[row] :] if self._sessions else text))
            held[row] = len(text)
        engine.ask(reads)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> SeparateEngines:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Child:
    """A process that answers messages, one after another.

    Args:
        start: called in the process, with ``arguments``; it returns what answers a message. A module's own function.
    """

    def __init__(self, start: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, start, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends `receive`

    def send(self, *message: Any) -> None:
        self._pipe.send(message)

    def receive(self) -> Any:
        """The next answer; the first one, None, says that the process has started.

        Raises:
            EOFError: it has ended.
        """
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(60)
        self._process.kill()


def _answer(pipe: Connection, start: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
    answer = start(*arguments)
    pipe.send(None)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(*message))


class _Engine(Child):
    """This side of an engine's process."""

    def __init__(self, model: str, file: np.memmap[Any, Any], options: dict[str, Any]) -> None:
        self.logits = torch.from_numpy(file)
        self.work = Work(0, 0, 0.0)
        super().__init__(_start_engine, model, {"path": str(file.filename), "shape": file.shape}, options)

    def ask(self, reads: list[tuple[str, int, list[int]]], over: Sequence[str] = ()) -> None:
        """Reads of a step: request, row of the logits, tokens; and the sessions that are over."""
        self.send(reads, over)

    def wait(self) -> None:
        """Until the logits of the last reads are there."""
        self.work = Work(*(a + b for a, b in zip(self.work, self.receive(), strict=True)))


def _start_engine(model: str, logits: dict[str, Any], options: dict[str, Any]) -> Callable[..., Any]:
    os.environ.update(ENVIRONMENT)
    from serving.engine import Engine  # vLLM, which reads the environment as it is imported

    engine = Engine(model, logits, **options)

    def answer(reads: list[tuple[str, int, list[int]]], over: Sequence[str]) -> tuple[int, int, float]:
        engine.end(over)
        return engine.read(reads)

    return answer


def save_router(checkpoint: Path, folder: Path) -> Path:
    """The router as a model of its own whose last n logits are the routing weights."""
    config = FusionRouteConfig.from_pretrained(checkpoint).router_config.to_dict()
    tensors = load_file(checkpoint / "model.safetensors")
    router = {name.removeprefix("router."): t for name, t in tensors.items() if name.startswith("router.")}
    route = tensors["route_head.weight"]
    embeddings = router["model.embed_tokens.weight"]
    head = router.get("lm_head.weight", embeddings)
    router["lm_head.weight"] = torch.cat([head, route.to(head.dtype)])
    router["model.embed_tokens.weight"] = torch.cat([embeddings, embeddings.new_zeros(route.shape)])
    config |= {"vocab_size": len(router["lm_head.weight"]), "tie_word_embeddings": False}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(router, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
