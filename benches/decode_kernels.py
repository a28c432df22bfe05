"""Times of the FusionRoute decode step: ours beside what people write, on a GPU in CUDA graphs, on a CPU the reference.

    python benches/decode_kernels.py                     # the whole table for the machine at hand
    python benches/decode_kernels.py --smoke             # tiny sizes, seconds
    python benches/decode_kernels.py --json out.json --markdown out.md

Method, on a GPU: every variant is captured in a graph of many calls and replayed. "cold" calls go round over copies of
the inputs that together exceed the L2 cache several times, "warm" calls use one copy. Variants are interleaved, round
by round, and the median over rounds is reported, in microseconds per call. GB/s counts the logits a perfect kernel
reads, ``2 B V`` elements, for every variant alike; the last column divides by the cold device copy that moves as many
bytes (read and written) in the same harness and run. Nothing is timed before our tokens were checked.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ebpo_core.kernels import select_add, select_add_argmax, select_add_sample

NUM_EXPERTS = 3
GPU_SIZES = [(B, V) for V in (128256, 151936, 256000) for B in (1, 8, 64, 256, 512)]
CPU_SIZES = [(B, 128256) for B in (1, 8)]
SMOKE_SIZES = [(2, 1000)]


class Inputs(NamedTuple):
    """One decode step; ``stacked`` is ``[n, B, V]``, its slices serve as the list."""

    router: Tensor
    weights: Tensor
    stacked: Tensor
    seed: Tensor

    @property
    def listed(self) -> list[Tensor]:
        return list(self.stacked.unbind(0))

    @property
    def gathered(self) -> Tensor:
        return self.stacked[self.weights.argmax(-1), torch.arange(len(self.router), device=self.router.device)]


def make_inputs(B: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    stacked = torch.empty(NUM_EXPERTS, B, V, dtype=dtype, device=device)
    for expert in stacked:
        expert.copy_(make(B, V))
    return Inputs(make(B, V).to(dtype), make(B, NUM_EXPERTS), stacked, torch.arange(B, device=device))


# ----------------------------------------------------------------------------------------------------------- variants


def eager(x: Inputs) -> Tensor:
    return (x.router + x.gathered).argmax(-1)


def paper_literal(x: Inputs) -> Tensor:
    return (x.router.float().log_softmax(-1) + x.gathered.float().log_softmax(-1)).argmax(-1)


def flashinfer_sampling(x: Inputs) -> Tensor:
    import flashinfer

    tokens: Tensor = flashinfer.sampling.sampling_from_logits((x.router + x.gathered).float())
    return tokens


def vllm_sampling(x: Inputs) -> Tensor:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rows = torch.arange(len(x.router), device=x.router.device, dtype=torch.int32)
    tokens: Tensor = gumbel_sample(
        x.router + x.gathered,
        expanded_idx_mapping=rows,
        temperature=torch.ones(len(rows), device=rows.device),
        seed=x.seed,
        pos=rows.long(),
        apply_temperature=True,
    )
    return tokens


Variant = Callable[[Inputs], object]


def variants(device: str) -> dict[str, Variant]:
    """Name to call. "reference" on a CPU is the same public function as "ours" on a GPU."""
    rows: dict[str, Variant] = {"eager gather + add + argmax": eager, "paper-literal fp32 log-softmax": paper_literal}
    name = "ours" if device == "cuda" else "reference"
    if device == "cuda":
        rows["torch.compile of eager"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
        rows["FlashInfer sampling, eager sum"] = flashinfer_sampling
        rows["vLLM Gumbel sampling, eager sum"] = vllm_sampling
        rows["gather, then ours"] = lambda x: select_add_argmax(x.router, None, x.gathered).token_ids
    rows[name] = lambda x: select_add_argmax(x.router, x.weights, x.listed).token_ids
    rows[f"{name}, stacked"] = lambda x: select_add_argmax(x.router, x.weights, x.stacked).token_ids
    rows[f"{name}, with log-probabilities"] = lambda x: select_add_argmax(
        x.router, x.weights, x.listed, return_logprobs=True
    )
    rows[f"{name}, sampled"] = lambda x: select_add_sample(x.router, x.weights, x.listed, seed=x.seed, temperature=0.8)
    rows[f"{name}, sampled top-k top-p"] = lambda x: select_add_sample(
        x.router, x.weights, x.listed, seed=x.seed, temperature=0.8, top_k=50, top_p=0.9
    )
    rows[f"{name}, fused logits"] = lambda x: select_add(x.router, x.weights, x.listed)
    return rows


def check(device: str) -> None:
    """Nothing is timed before its tokens are right: ours against the float32 sum, written out."""
    x = make_inputs(4, 5003, torch.bfloat16, device)
    expected = (x.router.float() + x.gathered.float()).argmax(-1)
    name = "ours" if device == "cuda" else "reference"
    rows = variants(device)
    for variant in (name, f"{name}, stacked"):
        assert torch.equal(rows[variant](x), expected), variant
    logprobs = rows[f"{name}, with log-probabilities"](x)
    assert torch.equal(logprobs[0], expected)


# ------------------------------------------------------------------------------------------------------------- timing


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls in order."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()  # compiles, before the capture
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a collected kernel would unload its module during the capture
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        gc.enable()
    return graph


def replay_microseconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / calls


def gpu_size(B: int, V: int, rounds: int) -> list[dict[str, object]]:
    torch.compiler.reset()  # or the sizes together would pass its limit of recompilations, and run eagerly
    dtype, moved = torch.bfloat16, 2 * B * V * 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, math.ceil(4 * cache / moved))
    inputs = [make_inputs(B, V, dtype, "cuda") for _ in range(copies)]
    halves = [(torch.empty(B * V, dtype=dtype, device="cuda"), x.router.view(-1)) for x in inputs]
    calls = max(copies, 20)
    graphs: dict[tuple[str, str], torch.cuda.CUDAGraph] = {}
    failed: dict[str, str] = {}
    for name, variant in variants("cuda").items():
        try:
            graphs[name, "cold"] = captured([lambda i=i, v=variant: v(inputs[i % copies]) for i in range(calls)])
            graphs[name, "warm"] = captured([lambda v=variant: v(inputs[0])] * calls)
        except Exception as error:  # noqa: PERF203 - a peer that is not installed, or changed its interface
            if name.startswith("ours"):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.synchronize()
    copy = [lambda i=i: halves[i % copies][0].copy_(halves[i % copies][1]) for i in range(calls)]
    graphs["device copy", "cold"] = captured(copy)
    graphs["device copy", "warm"] = captured(copy[:1] * calls)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    for round_ in range(rounds + 3):
        for key, graph in graphs.items():
            microseconds = replay_microseconds(graph, calls)
            if round_ >= 3:
                times[key].append(microseconds)
    copy_rate = moved / statistics.median(times["device copy", "cold"])
    rows = []
    for name in dict.fromkeys(name for name, _ in graphs):
        cold, warm = (sorted(times[name, cache_]) for cache_ in ("cold", "warm"))
        rate = moved / statistics.median(cold)
        rows.append(
            {
                "variant": name,
                "B": B,
                "V": V,
                "cold_us": statistics.median(cold),
                "cold_p10_p90_us": [cold[len(cold) // 10], cold[-1 - len(cold) // 10]],
                "warm_us": statistics.median(warm),
                "GB_per_s": rate / 1e3,
                "of_copy": rate / copy_rate,
            }
        )
    return rows + [{"variant": name, "B": B, "V": V, "failed": reason} for name, reason in failed.items()]


def cpu_size(B: int, V: int, rounds: int) -> list[dict[str, object]]:
    x, rows = make_inputs(B, V, torch.bfloat16, "cpu"), []
    for name, variant in variants("cpu").items():
        variant(x)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            variant(x)
            times.append((time.perf_counter() - start) * 1e6)
        median = statistics.median(times)
        rows.append({"variant": name, "B": B, "V": V, "cold_us": None, "warm_us": median})
        rows[-1]["GB_per_s"] = 2 * B * V * 2 / median / 1e3
    return rows


# ------------------------------------------------------------------------------------------------------------- report


def environment(device: str) -> dict[str, object]:
    found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "L2_MB": properties.L2_cache_size / 2**20,
            "triton": triton.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    else:
        found |= {"threads": torch.get_num_threads(), "machine": platform.machine()}
    return found


def markdown(found: dict[str, object], rows: list[dict[str, object]]) -> str:
    cell = lambda value, digits=1: "" if value is None else f"{value:.{digits}f}"  # noqa: E731
    lines = [
        ", ".join(f"{key} {value}" for key, value in found.items()) + f"; bf16, {NUM_EXPERTS} experts",
        "",
        "| B | V | variant | cold µs | warm µs | GB/s | of copy |",
        "|--:|--:|:--|--:|--:|--:|--:|",
    ]
    for row in rows:
        head = f"| {row['B']} | {row['V']} | {row['variant']} |"
        if "failed" in row:
            lines.append(f"{head} not run: {row['failed']} | | | |")
        else:
            cells = [cell(row[key]) for key in ("cold_us", "warm_us", "GB_per_s")] + [cell(row.get("of_copy"), 2)]
            lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--rounds", type=int, help="timed rounds per variant (30 on a GPU, 10 on a CPU)")
    parser.add_argument("--json", type=Path, help="write environment and rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    check(device)
    sizes = SMOKE_SIZES if options.smoke else GPU_SIZES if device == "cuda" else CPU_SIZES
    rounds = options.rounds or (2 if options.smoke else 30 if device == "cuda" else 10)
    rows: list[dict[str, object]] = []
    for B, V in sizes:
        rows += (gpu_size if device == "cuda" else cpu_size)(B, V, rounds)
        if device == "cuda":
            torch.cuda.empty_cache()
    found = environment(device)
    table = markdown(found, rows)
    sys.stdout.write(table)
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps({"environment": found, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
