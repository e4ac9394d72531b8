"""Training steps of two versions of the library, timed in turns.

Each version runs in a process of its own, under the Python that it is installed in:
``python -m armed_pyro.analysis.benchmarks.step_versions PYTHON_BEFORE PYTHON_AFTER``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule
from armed_pyro.analysis.benchmarks.growth import BATCH, many_clusters
from armed_pyro.analysis.benchmarks.training_steps import RATE, Step, Task, program_step
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.families.simulate import mixed_model

__all__ = ["PROGRAMS", "main", "serve", "turns"]

PROGRAMS = (
    "sleepstudy",
    "spirals 64 32",
    "spirals 64 512",
    "clusters 100 2",
    "clusters 100000 2",
    "clusters 1000000 2",
)
MODES: tuple[CompileMode, ...] = ("never", "always")
# Turns of each version, and seconds of one turn.
TURNS, SECONDS = 40, 0.15


def step_of(program: str, mode: CompileMode) -> Step:
    """The step of one of `PROGRAMS`: kind, then width and batch, or clusters and terms."""
    kind, *sizes = program.split()
    torch.manual_seed(0)
    if kind == "spirals":
        task = Task(*map(int, sizes))
        schedule = Schedule(batch_size=task.batch, net_learning_rate=RATE)
        return program_step(task.program(), task.data(), schedule, mode)
    if kind == "clusters":
        model, data = many_clusters(int(sizes[0]), BATCH, int(sizes[1]))
        return program_step(model, data, Schedule(batch_size=BATCH), mode)
    return program_step(*_sleepstudy(), Schedule(), mode)


def _sleepstudy() -> tuple[MixedEffects, ClusteredData]:
    """A simulated table of the size of sleepstudy, with its program."""
    data, _ = mixed_model("gaussian", 18, 10, sd=(25.0, 6.0), coefficients=(250.0, 10.0), seed=0)
    return MixedEffects(nn.Linear(1, 1), "(1 + x0 | site)", bayesian_head=True), data


def serve(program: str, mode: CompileMode) -> None:
    """Take steps for as many seconds as each line of the standard input says; print their median.

    The first line that is printed is the CPU time of the second step, in which it is compiled.
    """
    step = step_of(program, mode)
    step()
    before = _cpu_seconds()
    step()
    print(_cpu_seconds() - before, flush=True)
    for line in sys.stdin:
        start, times = time.perf_counter(), list[float]()
        while time.perf_counter() - start < float(line):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        print(statistics.median(times), flush=True)


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def turns(
    pythons: Mapping[str, str], program: str, mode: CompileMode, count: int = TURNS
) -> dict[str, list[float]]:
    """CPU seconds of compiling, and median seconds of a step, of each version.

    Parameters
    ----------
    pythons : mapping of str to str
        Interpreter of each version, by its name.
    program, mode : str
        One of `PROGRAMS`, and one of `MODES`.
    count : int
        Turns of each version.
    """
    code = "from armed_pyro.analysis.benchmarks.step_versions import serve; serve({!r}, {!r})"
    workers, compiling = {}, {}
    for name, python in pythons.items():
        command = [python, "-W", "ignore", "-c", code.format(program, mode)]
        workers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        compiling[name] = float(_ask(workers[name], ""))  # one after the other
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(count):
        for name, worker in workers.items():
            times[name].append(float(_ask(worker, f"{SECONDS}\n")))
    for worker in workers.values():
        worker.communicate()
    return {name: [compiling[name], statistics.median(times[name])] for name in workers}


def _ask(worker: subprocess.Popen[str], line: str) -> str:
    if worker.stdin is None or worker.stdout is None:
        raise ValueError("the worker has no pipes")
    worker.stdin.write(line)
    worker.stdin.flush()
    return worker.stdout.readline()


def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table of the steps of both versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    this = sys.executable
    parser.add_argument("before", nargs="?", default=this, help="Python of the version before")
    parser.add_argument("after", nargs="?", default=this, help="Python of the version after")
    parser.add_argument("--smoke", action="store_true", help="one program, eager, two turns")
    parser.add_argument("--programs", nargs="*", default=PROGRAMS, help="kind and sizes")
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES, help="compile or not")
    options = parser.parse_args(argv)
    count = 2 if options.smoke else TURNS
    programs, modes = options.programs, options.modes
    if options.smoke:
        programs, modes = PROGRAMS[:1], MODES[:1]
    print("| program | steps | ms before | ms after | ratio | compiling, CPU s | after |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for program in programs:
        for mode in modes:
            pythons = {"before": options.before, "after": options.after}
            taken = turns(pythons, program, cast(CompileMode, mode), count)
            (compiling, before), (compiling_after, after) = taken["before"], taken["after"]
            kind = "compiled" if mode == "always" else "eager"
            seconds = f"{compiling:.0f} | {compiling_after:.0f}" if mode == "always" else "|"
            print(
                f"| {program} | {kind} | {1e3 * before:.2f} | {1e3 * after:.2f} "
                f"| {after / before:.2f} | {seconds} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
