"""Questions to a server of a FusionRoute checkpoint, for ``fusionroute show --url``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ebpo_core.fusionroute.cli.options import add_sampling_flags, check_sampling
from ebpo_core.fusionroute.traces.show import render_legend, render_prompt, render_response
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace
from ebpo_core.fusionroute.vllm.client import RoutedServer

if TYPE_CHECKING:
    from rich.console import Console

_FLAGS = (
    *("prompt", "completion", "model", "api_key_env", "routing"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "seed"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """``--url``, and the flags that go with it alone."""
    group = parser.add_argument_group("asking a server instead of reading traces")
    group.add_argument("--url", help="address of a vLLM server, such as http://localhost:8000")
    group.add_argument("--prompt", help="the prompt's text; - reads it from standard input")
    group.add_argument("--completion", action="store_true", help="continue the prompt, without the chat template")
    group.add_argument("--model", help="name of the model, if the server has several")
    group.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable of the key (default: OPENAI_API_KEY)"
    )
    group.add_argument("--routing", type=Path, metavar="FILE", help="write the routing trace as JSON")
    add_sampling_flags(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with a usage error unless the flags say one thing: read traces, or ask a server.

    Raises:
        ValueError: A number that is impossible for sampling.
    """
    if bool(arguments.traces) == (arguments.url is not None):
        parser.error("give either traces or --url")
    if arguments.url is None:
        given = [name for name in _FLAGS if getattr(arguments, name) != parser.get_default(name)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} goes with --url, not with traces")
        return
    if arguments.prompt is None:
        parser.error("--url needs --prompt")
    check_sampling(arguments)


def ask(arguments: argparse.Namespace, live: Console | None) -> RoutingTrace:
    """The trace of one answer.

    Args:
        arguments: Of :func:`add_flags`, and ``no_prompt``.
        live: A terminal with colours, on which the tokens are printed as they arrive and their legend after them. None
            prints nothing.

    Raises:
        ServerError: As :class:`RoutedServer` raises it.
        ValueError: No such environment variable, or no prompt.
    """
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise ValueError("prompt='': it is empty; give a text")
    server = RoutedServer(arguments.url, arguments.model, api_key=_key(arguments.api_key_env))
    if live is not None and not arguments.no_prompt:
        for text in render_prompt(prompt, encoding=live.encoding):
            live.print(text)

    # Each token is printed as it arrives.
    def show(token: RoutedToken) -> None:
        if live is not None:
            shown = render_response(RoutingTrace(server.experts, (token,)), encoding=live.encoding)
            live.print(shown, end="", soft_wrap=True)

    try:
        trace = server.trace(
            prompt if arguments.completion else [{"role": "user", "content": prompt}],
            on_token=show,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=1.0 if arguments.top_p is None else arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
    finally:
        if live is not None:  # what comes now, perhaps an error, begins on a line of its own
            live.print()
    if live is not None:
        live.print()
        live.print(render_legend(trace, encoding=live.encoding))
    return trace


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not (key := os.environ.get(name)):
        raise ValueError(f"api-key-env={name!r}: this environment variable is not set or empty; export it")
    return key
