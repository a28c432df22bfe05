"""``fusionroute generate``: load a checkpoint, answer a prompt, and show or save which expert wrote which token."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpo_core.fusionroute.cli.options import (
    add_model_flags,
    add_routing_flags,
    add_sampling_flags,
    check_sampling,
    load_model,
    load_tokenizer,
    routing_options,
)
from ebpo_core.fusionroute.traces.page import write_page
from ebpo_core.fusionroute.traces.palette import visible
from ebpo_core.fusionroute.traces.show import print_traces
from ebpo_core.fusionroute.traces.trace import RoutingTrace, dump

if TYPE_CHECKING:
    from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionroute generate", description=__doc__, allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, help="the prompt's text; - reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    add_sampling_flags(parser)
    add_routing_flags(parser)
    parser.add_argument(
        "--draft-tokens",
        metavar="N",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="let the router write so many tokens ahead of the experts, or 'auto'; the answer is the same",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--stream", action="store_true", help="print the text as it is generated")
    group.add_argument("--show", action="store_true", help="print the answer with its tokens coloured by expert")
    group.add_argument("--routing", type=Path, metavar="FILE", help="write the routing trace as JSON")
    group.add_argument("--html", type=Path, metavar="FILE", help="write the routing as an HTML page")
    return parser


def main(argv: Sequence[str]) -> int:
    """Answer one prompt as the flags say."""
    arguments = _parser().parse_args(argv)
    check_sampling(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    # A prompt that cannot be encoded is found out before minutes of loading.
    tokenizer = load_tokenizer(arguments)
    encoded = _encode(tokenizer, prompt, chat=arguments.chat)
    trace = answer(load_model(arguments), tokenizer, prompt, encoded, arguments)
    if arguments.show:
        if arguments.stream:
            print()
        print_traces(trace, prompt=False)
    elif not arguments.stream:
        print(shown(trace.text or ""))
    # The answer alone goes to standard output, the paths of what is written to standard error.
    for path, write in ((arguments.routing, dump), (arguments.html, write_page)):
        if path is not None:
            print(write(path, trace), file=sys.stderr)
    return 0


def answer(model: Any, tokenizer: Any, prompt: str, encoded: Any, arguments: argparse.Namespace) -> RoutingTrace:
    """The trace of the answer, with texts; the answer itself is its ``text``.

    Args:
        model: The checkpoint.
        tokenizer: Its tokenizer.
        prompt: The text as the user gave it, for the trace.
        encoded: ``input_ids`` and ``attention_mask`` of the prompt, (1, tokens) int64 each.
        arguments: The flags of sampling and routing.
    """
    import torch

    ids = encoded["input_ids"].to(model.device)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=encoded["attention_mask"].to(model.device),
            generation_config=_generation_config(model, tokenizer, arguments),
            streamer=_streamer(tokenizer) if arguments.stream else None,
            output_routing=True,
            draft_tokens=arguments.draft_tokens,
            **routing_options(arguments),
        )
    trace: RoutingTrace = dataclasses.replace(output.routing[0], prompt=prompt)
    return trace.with_text(tokenizer, ids[0].tolist())


def shown(text: str) -> str:
    """Model text for standard output: as it is for a file, with its control characters written out for a terminal."""
    return visible(text, sys.stdout.encoding or "utf-8") if sys.stdout.isatty() else text


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """``input_ids`` and ``attention_mask`` of the prompt, (1, tokens) int64 each."""
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("chat: the checkpoint's tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # A template brings its own special tokens.
    encoded = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")
    if not encoded["input_ids"].numel():
        raise ValueError(f"prompt={prompt!r}: it has no tokens; give a longer text")
    return encoded


def _generation_config(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    from transformers import GenerationConfig

    # The end of text, by the checkpoint's generation config or else by its tokenizer; padding is never seen.
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    sampling: dict[str, Any] = {}
    if arguments.temperature > 0:
        sampling = {
            "temperature": arguments.temperature,
            "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
            "top_k": 0 if arguments.top_k is None else arguments.top_k,
        }
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=bool(sampling),
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Printer(TextStreamer):
        """transformers' streamer, printing through :func:`shown`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(shown(text), flush=True, end="\n" if stream_end else "")

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
