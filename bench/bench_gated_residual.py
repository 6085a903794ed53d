"""The fused ops against PyTorch eager and torch.compile, beside a copy of the same hidden states.

python bench/bench_gated_residual.py [--device cuda] [--json FILE]

Every provider runs in turn in one process, several processes one after another; a figure is the median over calls,
then over processes. GB/s counts what the case must move at least, so it compares time, whatever a provider moves.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import measure
import op_cases
import torch
import torch._functorch.config as functorch_config
from op_cases import CASES, DTYPES, PASSES, PROVIDERS, Problem

# Elements; smaller GPU shapes are timed as CUDA graphs. 2^26 of them take 90 us, longer than the host needs to queue.
GRAPH_BELOW = 2**26
SIZES = {  # tokens and hidden size, the most telling first: a time budget cuts the end
    "cuda": [(16384, 4096), (2048, 4096), (512, 4096), (65536, 4096), (16384, 8192), (2048, 2048), (65536, 8192)]
    + [(tokens, hidden) for hidden in (5120, 2560) for tokens in (16384, 2048, 65536)]
    + [(16384, 2048), (2048, 8192), (65536, 2048), (128, 4096)],
    "cpu": [(2048, 4096), (512, 2048)],
}


def main() -> None:
    arguments = parse()
    if arguments.device == "cpu":
        measure.set_allocator(measure.FRESH_MEMORY if arguments.fresh_memory else measure.KEEP_MEMORY)
    content = in_processes(arguments) if arguments.processes > 1 else in_this_process(arguments)
    if not arguments.quiet:
        print_table(content)
    if any(not row["correct"] for row in content["rows"]):
        sys.exit("some results are wrong: no ratio is given for them.")
    if content["broken"]:
        sys.exit(f"{content['broken']} of {content['processes']} processes broke off; their messages are above.")


def in_this_process(arguments: argparse.Namespace) -> dict[str, Any]:
    content: dict[str, Any] = {
        "machine": measure.machine(arguments.device), "memory": memory(arguments),
        "processes": 1, "broken": 1, "cut": [], "rows": [],
    }  # fmt: skip
    if arguments.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured on it, see measure.as_graph
    for rows in all_rows(arguments, content["cut"]):
        content["rows"] += rows
        if arguments.json:
            measure.write(arguments.json, content)
    content["broken"] = 0
    if arguments.json:
        measure.write(arguments.json, content)
    return content


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results here, row by row")
    parser.add_argument("--sizes", help="tokens x hidden, comma separated: 2048x4096,512x2048")
    parser.add_argument("--dtypes", help=f"of {', '.join(DTYPES)}; default: bf16 on a GPU, all on a CPU")
    parser.add_argument("--cases", help=f"of: {'; '.join(CASES)} (separated by ;)")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all; what does not fit is named")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per case, size and pass")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--fresh-memory", action="store_true", help="CPU: let glibc give memory back after every call")
    parser.add_argument("--quiet", action="store_true", help="no table")
    arguments = parser.parse_args()
    try:
        choose(arguments)
    except (KeyError, ValueError) as error:
        parser.error(f"{error}: that is not one of the choices, see --help.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and none is visible.")
    return arguments


def choose(arguments: argparse.Namespace) -> None:
    """Turn the lists of names into what they name."""
    arguments.size_list = list(map(size, arguments.sizes.split(","))) if arguments.sizes else SIZES[arguments.device]
    names = arguments.dtypes or ("bf16" if arguments.device == "cuda" else "fp32,bf16,fp16")
    arguments.dtype_list = [(name, DTYPES[name]) for name in names.split(",")]
    arguments.case_list = [CASES[name.strip()] for name in (arguments.cases or ";".join(CASES)).split(";")]
    arguments.provider_list = [PROVIDERS[PROVIDERS.index(name)] for name in arguments.providers.split(",")]


def size(text: str) -> tuple[int, int]:
    """Tokens and hidden size of "2048x4096"."""
    tokens, _, hidden = text.partition("x")
    if not (tokens.isdigit() and hidden.isdigit() and int(tokens) and int(hidden)):
        raise ValueError(repr(text))
    return int(tokens), int(hidden)


def memory(arguments: argparse.Namespace) -> str:
    if arguments.device == "cuda":
        return "CUDA caching allocator"
    return "fresh in every call" if arguments.fresh_memory else "kept by the allocator"


def in_processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same bench in several processes; what they found so far is merged and written after each."""
    deadline = time.monotonic() + arguments.budget
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.processes):
            file = Path(folder) / f"{number}.json"
            # The first one compiles what the others find in Inductor's cache: it may take half of the time.
            share = 0.5 if number == 0 else 1.0 / (arguments.processes - number)
            again = [*sys.argv, "--processes", "1", "--quiet", "--json", str(file)]
            again += ["--budget", str((deadline - time.monotonic()) * share)]
            subprocess.run([sys.executable, *again], check=False)
            if file.exists():
                runs.append(measure.json.loads(file.read_text()))
            if runs and arguments.json:
                measure.write(arguments.json, merge(runs, number + 1))
    if not runs:
        sys.exit("none of the processes of the bench measured anything; their messages are above.")
    return merge(runs, arguments.processes)


def merge(runs: list[dict[str, Any]], started: int) -> dict[str, Any]:
    """Medians over the processes that reached a row; what none of them reached is named as cut."""
    key = ("case", "tokens", "hidden", "dtype", "pass", "provider")
    found: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault(tuple(row[k] for k in key), []).append(row)
    rows = []
    for same in found.values():
        merged = dict(same[0])
        for figure in ("median_ms", "p20_ms", "p80_ms", "gb_per_s", "of_copy", "of_datasheet"):
            values = [row[figure] for row in same]
            merged[figure] = None if None in values else median(values)
        merged["processes_ms"] = [row["median_ms"] for row in same]
        merged["correct"] = all(row["correct"] for row in same)
        rows.append(merged)
    reached = {problem_name(row["case"], row["tokens"], row["hidden"], row["dtype"]) for row in rows}
    cut = sorted({name for run in runs for name in run["cut"]} - reached)
    broken = sum(run["broken"] for run in runs) + started - len(runs)
    return {**runs[0], "processes": started, "broken": broken, "cut": cut, "rows": rows}


def problem_name(case: str, tokens: int, hidden: int, dtype: str) -> str:
    return f"{case}, {tokens} x {hidden} {dtype}"


def all_rows(arguments: argparse.Namespace, cut: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows of one case, size and dtype at a time, until the budget is spent."""
    # Inductor gives a compiled backward's inputs away unless told that it will run again.
    functorch_config.donated_buffer = False
    deadline = time.monotonic() + arguments.budget
    longest = 0.0
    for tokens, hidden in arguments.size_list:
        for dtype_name, dtype in arguments.dtype_list:
            for case in arguments.case_list:
                name = problem_name(case.name, tokens, hidden, dtype_name)
                start = time.monotonic()
                if start + longest > deadline:
                    cut.append(name)
                    continue
                problem = Problem.make(case, tokens, hidden, dtype, arguments.device)
                about = {"case": case.name, "tokens": tokens, "hidden": hidden, "dtype": dtype_name}
                yield [about | row for row in rows_of(problem, arguments)]
                longest = max(longest, time.monotonic() - start)


def rows_of(problem: Problem, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per pass and provider; the copy is a provider of its own."""
    device, inputs = arguments.device, (problem.x, problem.out, problem.gate)
    providers = {name: op_cases.call(name, problem.case) for name in arguments.provider_list}
    outputs = {name: function(*inputs) for name, function in providers.items()}
    slack = {"compile": op_cases.SLACK}
    wrong = {name: op_cases.check(problem, given, sum_ulps=slack.get(name, 2)) for name, given in outputs.items()}
    for name, message in wrong.items():
        if message:
            print(f"{problem.case.name}: {name}: {message}", file=sys.stderr)
    about = {
        name: {
            "correct": wrong[name] is None,
            "peak_bytes": measure.peak_bytes(lambda f=function: problem.backward(f(*inputs)), device),
            "saved_bytes": measure.saved_bytes(lambda f=function: f(*inputs), list(inputs)),
        }
        for name, function in providers.items()
    }
    copied = torch.empty_like(problem.x)
    source = problem.x.detach()
    nbytes = source.numel() * source.element_size()
    for which in PASSES:
        functions: dict[str, Callable[[], Any]] = {
            name: one_pass(problem, which, providers[name], outputs[name]) for name in providers
        }
        functions["copy"] = lambda: copied.copy_(source)
        graphs = device == "cuda" and source.numel() < GRAPH_BELOW
        if graphs:
            functions = {name: measure.as_graph(function) for name, function in functions.items()}
        timings = measure.interleaved(functions, device, arguments.seconds)
        rates = {name: nbytes * problem.case.moves(which) / t.median for name, t in timings.items()}
        rates["copy"] = 2 * nbytes / timings["copy"].median
        rated = measure.datasheet(device)
        for name, timing in timings.items():
            yield {
                "pass": which,
                "provider": name,
                "median_ms": timing.median * 1e3,
                "p20_ms": timing.p20 * 1e3,
                "p80_ms": timing.p80 * 1e3,
                "calls": timing.calls,
                "graph": graphs,
                "gb_per_s": rates[name] / 1e9,
                "of_copy": rates[name] / rates["copy"],
                "of_datasheet": rates[name] / rated if rated else None,
                **about.get(name, {"correct": True, "peak_bytes": 0, "saved_bytes": 0}),
            }


def one_pass(problem: Problem, which: str, function: Callable, outputs: tuple) -> Callable[[], Any]:
    inputs = (problem.x, problem.out, problem.gate)
    if which == "forward":
        return lambda: function(*inputs)
    if which == "backward":
        return lambda: problem.backward(outputs, again=True)
    return lambda: problem.backward(function(*inputs))


def print_table(content: dict[str, Any]) -> None:
    """One line per case, size, dtype and pass: milliseconds of each provider, and how ours compares."""
    facts = content["machine"]
    print(f"\n{facts['device']}, torch {facts['torch']}, {facts['date']}, memory {content['memory']}")
    head = f"{'case':33} {'tokens x hidden':>15} {'dtype':5} {'pass':8}"
    print(head, *(f"{name + ' ms':>10}" for name in PROVIDERS), "vs eager", "vs comp.", "   GB/s", "of copy")
    groups: dict[tuple, dict[str, Any]] = {}
    for row in content["rows"]:
        key = (row["case"], row["tokens"], row["hidden"], row["dtype"], row["pass"])
        groups.setdefault(key, {})[row["provider"]] = row
    for (case, tokens, hidden, dtype, which), rows in groups.items():
        ours = rows.get("ours")
        line = f"{case:33} {f'{tokens} x {hidden}':>15} {dtype:5} {which:8}"
        times = [f"{rows[name]['median_ms']:10.4f}" if name in rows else " " * 10 for name in PROVIDERS]
        ratios = [ratio(ours, rows.get(name)) for name in ("eager", "compile")]
        rates = [f"{ours['gb_per_s']:7.1f}", f"{ours['of_copy']:7.2f}"] if ours else []
        print(line, *times, *ratios, *rates)
    if content["cut"]:
        print(f"\nnot measured, the time budget was spent: {len(content['cut'])} cases")
        for name in content["cut"]:
            print(f"  {name}")


def ratio(ours: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """How many times faster we are; nothing where one of the two computes something else."""
    if not (ours and other):
        return " " * 8
    if not (ours["correct"] and other["correct"]):
        return "   wrong"
    return f"{other['median_ms'] / ours['median_ms']:8.2f}"


if __name__ == "__main__":
    main()
