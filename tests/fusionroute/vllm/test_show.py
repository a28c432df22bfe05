"""``fusionroute show --url`` against a real HTTP server: files, flags, a terminal, and errors."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from routed_server import RoutedOpenAIServer, refusing_url, scripted
from serving_script import BYTES, END, TEXT, TOKENS, check

from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.traces.trace import load


def show(served: RoutedOpenAIServer, *more: str) -> int:
    return main(["show", "--url", served.root, "--prompt", "What?\x1b[2J", *more])


def test_show_asks_and_writes_trace_and_page(
    served: RoutedOpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "out" / "trace.json", tmp_path / "page.html"
    assert show(served, "--routing", str(file), "--html", str(page)) == 0
    output = capsys.readouterr().out
    assert output.startswith("Prompt\nWhat?\\x1b[2J\n")
    assert "[A]the{ }G[B]" in output
    assert output.splitlines()[-2:] == [str(file), str(page)]
    (trace,) = load(file)
    check(trace)
    assert trace.prompt == "What?\x1b[2J"
    assert page.read_text(encoding="utf-8").count('class="t ') == len(TOKENS)
    assert served.requests[0]["messages"] == [{"role": "user", "content": "What?\x1b[2J"}]
    assert served.requests[0]["temperature"] == 0
    assert main(["show", str(file)]) == 0
    assert output.startswith(capsys.readouterr().out)


def test_show_passes_its_flags_on(
    served: RoutedOpenAIServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served.key = "secret"
    monkeypatch.setenv("MY_KEY", "secret")
    flags = "--completion --model fused --max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3"
    assert show(served, *flags.split(), "--api-key-env", "MY_KEY", "--no-prompt") == 0
    assert capsys.readouterr().out.startswith("[A]the{ }G[B]")
    (request,) = served.requests
    assert request["prompt"] == "What?\x1b[2J"
    wanted = {"model": "fused", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3}
    assert request | wanted == request


def test_show_reads_the_prompt(served: RoutedOpenAIServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("from a file")
    with (tmp_path / "prompt.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["show", "--url", served.root, "--prompt", "-", "--quiet"]) == 0
    assert served.requests[0]["messages"] == [{"role": "user", "content": "from a file"}]


def test_show_prints_tokens_as_they_arrive_on_a_terminal(served: RoutedOpenAIServer, tmp_path: Path) -> None:
    """On a real pseudo-terminal, with a server that goes on when the first token was seen there."""
    steering = scripted(BYTES, [*BYTES("the\x1b[2J\ttab\n")["input_ids"], END], [0] * 11, [False] * 11)
    served.answer = lambda _: steering
    served.gate = threading.Event()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ebpo_core.fusionroute.cli", "show", "--url", served.root, "--prompt", "What?"]
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    output = b""
    with ExitStack() as stack:
        stack.callback(os.close, ours)
        process = stack.enter_context(
            subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment)
        )
        os.close(theirs)
        stack.callback(process.kill)
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the terminal's other end is closed
                break
            if not piece:
                break
            output += piece
            if b"the" in output:
                served.gate.set()
        assert process.wait(60) == 0
    text = output.decode()
    assert "\x1b[30;48;2;119;170;221mthe\x1b[0m" in text
    assert text.index("What?") < text.index("mthe")
    assert "\x1b[2J" not in text
    assert "\\x1b" in text
    assert text.count("the") == 2  # once, and in "the expert's own first choice" of the legend
    assert "11 tokens, 0 switches" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either traces or --url"),
        (["t.json", "--url", "http://x"], "give either traces or --url"),
        (["--url", "http://x"], "--url needs --prompt"),
        (["t.json", "--prompt", "x"], "--prompt goes with --url"),
        (["t.json", "--max-new-tokens", "3"], "--max-new-tokens goes with --url"),
        (["t.json", "--routing", "x"], "--routing goes with --url"),
    ],
)
def test_wrong_usage_of_show(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["show", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt=''"),
        (["--model", "x"], "model='x': the server offers"),
        (["--max-new-tokens", "0"], "max-new-tokens=0"),
        (["--seed", "1"], "seed=1: needs --temperature"),
        (["--api-key-env", "NOWHERE_KEY"], "api-key-env='NOWHERE_KEY'"),
    ],
)
def test_errors_of_show_are_one_line(
    served: RoutedOpenAIServer, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(served, *flags) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("fusionroute show: ")
    assert message in error[0]


def test_show_without_a_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with refusing_url() as url:
        assert main(["show", "--url", url, "--prompt", "x"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"fusionroute show: {url}/metrics: not to be reached")


def test_an_answer_cut_while_it_is_shown(served: RoutedOpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    served.ending = "cut"
    assert show(served, "--color", "always") == 1
    captured = capsys.readouterr()
    assert re.sub(r"\x1b\[[0-9;]*m", "", captured.out).endswith(f"{TEXT}\n")
    assert "ended in the middle" in captured.err
