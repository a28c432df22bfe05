"""The `fusionroute` command: usage and one-line errors, `show`, and real runs of `generate` and `eval`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

import torch
from fusionroute_saved import DOCUMENTS, save_fused, save_tasks
from fusionroute_tiny import tiny_tokenizer
from fusionroute_traces import example, trace_of

from ebpo_core import __version__
from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import COMMANDS, main
from ebpo_core.fusionroute.cli.generate import shown
from ebpo_core.fusionroute.traces.trace import dump, load

PROMPT = "w10 w20 w30"


def one_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The error, after checking that it is one line that begins with the command's name."""
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    assert error[0].startswith(f"fusionroute {command}: ")
    return error[0]


# ---------------------------------------------------------------------------------------------------------- command


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {command} " in output for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["ebpo-core", __version__]


def test_wrong_usage_has_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["shwo"]) == 2
    assert "'shwo'; choose one of train, generate, show, eval, demo" in capsys.readouterr().err
    for command in ("generate", "show"):
        with pytest.raises(SystemExit) as stop:
            main([command])
        assert stop.value.code == 2


@pytest.mark.parametrize("command", ["generate", "show"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fusionroute {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "module"), [("eval", "lm_eval"), ("show", "rich"), ("train", "trl")])
def test_a_missing_extra_is_named(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks a module as not importable
    assert main([command, "x", *(["--tasks", "t"] if command == "eval" else [])]) == 1
    error = one_line(capsys, command)
    assert f"'{module}'" in error
    assert f'pip install "ebpo-core[{"fusionroute,eval" if command == "eval" else "fusionroute"}]"' in error


@pytest.mark.slow
def test_module_and_entry_point_are_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    command = [sys.executable, "-m", "ebpo_core.fusionroute.cli", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- show


def test_show_prints_the_responses_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = dump(tmp_path / "a.json", example())
    second = dump(tmp_path / "b.jsonl", [trace_of([("x", 0, False)]), trace_of([("y", 1, True)])])
    page = tmp_path / "pages" / "page.html"
    assert main(["show", str(first), str(second), "--html", str(page), "--title", "Mine"]) == 0
    output = capsys.readouterr().out
    assert "[C]The[A] sum{ is}" in output
    assert "Response 3 of 3" in output
    assert output.splitlines()[-1] == str(page)
    content = page.read_text(encoding="utf-8")
    assert content.count('class="response"') == 3
    assert "<title>Mine</title>" in content


def test_show_colours_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(dump(tmp_path / "a.json", example()))
    assert main(["show", file, "--color", "always"]) == 0
    assert "\x1b[" in capsys.readouterr().out
    assert main(["show", file, "--color", "never"]) == 0
    assert "\x1b[" not in capsys.readouterr().out


def test_show_quiet_prints_the_page_s_path_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(dump(tmp_path / "a.json", example()))
    assert main(["show", file, "--quiet", "--html", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.html'}\n"


def test_show_opens_the_page_when_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    file = str(dump(tmp_path / "a.json", example()))
    assert main(["show", file, "--html", str(tmp_path / "p.html")]) == 0
    assert opened == []
    assert main(["show", file, "--html", str(tmp_path / "p.html"), "--open", "yes"]) == 0
    assert opened == [(tmp_path / "p.html").as_uri()]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("{}", [], "format=None"),
        ("", [], "holds no trace"),
        (None, [], "no such file"),
        ("{}", ["--open", "yes"], "--html"),
    ],
)
def test_show_of_garbage_is_one_line(
    content: str | None, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.json"
    if content is not None:
        file.write_text(content)
    assert main(["show", str(file), *more]) == 1
    assert message in one_line(capsys, "show")


def test_a_traceback_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBPO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["show", str(tmp_path / "nowhere.json")])


# ---------------------------------------------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fused(tmp_path_factory.mktemp("models"))


def generate(checkpoint: Path, *more: str) -> int:
    return main(["generate", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "8", "--device", "cpu", *more])


def written(checkpoint: Path, **options: object) -> list[int]:
    model = FusionRouteForCausalLM.from_pretrained(checkpoint)
    encoded = tiny_tokenizer()(PROMPT, return_tensors="pt")
    ids = model.generate(**encoded, max_new_tokens=8, do_sample=False, **options)
    return [int(token) for token in ids[0, encoded["input_ids"].shape[1] :]]


@pytest.mark.slow
def test_generate_prints_the_answer_and_saves_its_routing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_file, page = tmp_path / "routing.json", tmp_path / "page.html"
    assert generate(checkpoint, "--routing", str(trace_file), "--html", str(page)) == 0
    shown_text = capsys.readouterr()
    (trace,) = load(trace_file)
    assert shown_text.out == f"{trace.text}\n"
    assert shown_text.err.splitlines()[-2:] == [str(trace_file), str(page)]
    assert [token.id for token in trace.tokens] == written(checkpoint)
    assert trace.prompt == PROMPT
    assert trace.experts == ("math", "code")
    assert {token.expert for token in trace.tokens} == {0, 1}, "both experts, or the next test shows nothing"
    assert page.read_text(encoding="utf-8").count('class="t ') == len(trace.tokens)
    assert main(["show", str(trace_file)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--forced-expert", "code"], {"forced_expert": "code"}),
        (["--allowed-experts", "math"], {"allowed_experts": ["math"]}),
        (["--alpha", "0.25"], {"alpha": 0.25}),
        (["--routing-only"], {"complementary": False}),
        (["--hysteresis", "5"], {"hysteresis": 5.0}),
        (["--draft-tokens", "3"], {"draft_tokens": 3}),
        (["--draft-tokens", "auto"], {"draft_tokens": "auto"}),
    ],
)
def test_generate_passes_the_routing_flags_on(
    flags: list[str], options: dict[str, object], checkpoint: Path, tmp_path: Path
) -> None:
    assert generate(checkpoint, "--routing", str(tmp_path / "t.json"), *flags) == 0
    (trace,) = load(tmp_path / "t.json")
    assert [token.id for token in trace.tokens] == written(checkpoint, **options)
    if "forced_expert" in options:
        assert trace.counts == {"math": 0, "code": len(trace.tokens)}


@pytest.mark.slow
def test_generate_streams_the_same_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for more in ([], ["--stream"]):
        assert generate(checkpoint, *more) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].split() == outputs[1].split() != []
    assert outputs[1].endswith("\n")


@pytest.mark.slow
def test_generate_samples_by_seed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate(checkpoint, "--temperature", "5", "--top-k", "50", "--top-p", "0.99", "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.slow
def test_generate_reads_the_prompt_and_fills_the_chat_template(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    command = ["generate", str(checkpoint), "--prompt", "-", "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*command, "--show", "--routing", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out.startswith("[")
    (plain,) = load(tmp_path / "a.json")
    assert [token.id for token in plain.tokens] == written(checkpoint)
    assert generate(checkpoint, "--chat", "--routing", str(tmp_path / "b.json")) == 0
    (chat,) = load(tmp_path / "b.json")
    model, tokenizer = FusionRouteForCausalLM.from_pretrained(checkpoint), tiny_tokenizer()
    ids = torch.tensor([tokenizer(f"<bos> <user> {PROMPT} <assistant>", add_special_tokens=False)["input_ids"]])
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert [token.id for token in chat.tokens] == expected
    assert chat.prompt == PROMPT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", "0"], "max-new-tokens=0"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "0.5"], "top-p=0.5: needs --temperature"),
        (["--forced-expert", "maths"], "forced_expert names 'maths'"),
        (["--expert-path", "math"], "expert-path='math'"),
        (["--expert-path", "maths=x"], "['maths']"),
        (["--hysteresis", "-1"], "hysteresis"),
        (["--draft-tokens", "0"], "draft_tokens is 0"),
        (["--draft-tokens", "some"], "draft_tokens is 'some'"),
    ],
)
def test_generate_with_wrong_input_is_one_line(
    more: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert generate(checkpoint, *more) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "tests"])
def test_generate_without_a_checkpoint_is_one_line(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    if path == "tests":
        path = str(Path(__file__).parents[2] / "support")
    assert main(["generate", path, "--prompt", "x"]) == 1
    assert f"path={path!r}" in one_line(capsys, "generate")


def test_answers_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    assert shown("a\x1b[2J\n") == "a\x1b[2J\n", "a file gets the text as it is"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert shown("a\x1b[2J\n") == "a\\x1b[2J\n"


# ---------------------------------------------------------------------------------------------------------- eval


@pytest.mark.slow
def test_eval_prints_a_table_and_writes_the_results(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = save_tasks(tmp_path, ["w5"] * len(DOCUMENTS))
    output = tmp_path / "out" / "results.json"
    command = ["eval", str(checkpoint), "--tasks", "tiny_choices,tiny_answers", "--include-path", str(tasks)]
    command += ["--limit", "4", "--output", str(output), "--device", "cpu", "--batch-size", "2", "--max-gen-toks", "3"]
    assert main([*command, "--forced-expert", "math", "--log-samples"]) == 0
    shown_text = capsys.readouterr().out
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["config"]["fusionroute_options"] == {"forced_expert": "math"}
    accuracy = results["results"]["tiny_choices"]["acc,none"]
    row = next(line for line in shown_text.splitlines() if "tiny_choices" in line)
    assert f"{accuracy:.4f}" in row
    assert row.rstrip(" │").endswith("4")
    assert all(len(sample["resps"][0][0].split()) <= 3 for sample in results["samples"]["tiny_answers"])
    assert shown_text.splitlines()[-1] == str(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "batch-size='0'"),
        (["--include-path", "nowhere"], "include_path='nowhere'"),
        (["--alpha", "nan"], "alpha is nan"),
    ],
)
def test_eval_with_wrong_input_is_one_line(
    more: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = save_tasks(tmp_path, ["w5"] * len(DOCUMENTS))
    command = ["eval", str(checkpoint), "--tasks", "tiny_choices", "--include-path", str(tasks), "--device", "cpu"]
    assert main([*command, *more]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
