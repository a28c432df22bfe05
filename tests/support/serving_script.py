"""An answer whose tokens, texts and routing are known, for the tests of what reads it from a server."""

from __future__ import annotations

from fusionroute_traces import byte_tokenizer
from routed_server import RoutedOpenAIServer, scripted

from ebpo_core.fusionroute.traces.trace import RoutingTrace

NAMES = ("math", 'a "quoted\\ one"\n}')
TEXT = "the Größe 🚲\n"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
BYTES = byte_tokenizer()
V = len(BYTES)
END = BYTES.eos_token_id
TOKENS = [*BYTES(TEXT)["input_ids"], END]
EXPERTS = [index // 3 % 2 for index in range(len(TOKENS))]
OVERRULED = [index % 4 == 1 for index in range(len(TOKENS))]
SCRIPT = scripted(BYTES, TOKENS, EXPERTS, OVERRULED)


def script_server() -> RoutedOpenAIServer:
    """A server that gives this answer, whatever it is asked, or as much of it as was asked for."""
    return RoutedOpenAIServer(lambda body: SCRIPT[: body["max_tokens"]], NAMES, V)


def check(trace: RoutingTrace, texts: list[str] | None = None) -> None:
    """That a trace is the script's, with these texts of tokens, by default each its own."""
    assert trace.experts == NAMES
    assert [token.id for token in trace.tokens] == TOKENS
    assert [token.expert for token in trace.tokens] == EXPERTS
    assert [token.overruled for token in trace.tokens] == OVERRULED
    assert [token.text for token in trace.tokens] == (texts or [step.text for step in SCRIPT])
    assert trace.text == TEXT
