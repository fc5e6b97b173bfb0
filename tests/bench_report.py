"""What the benches share: medians over rounds with their intervals, and tables of them."""

import contextlib
import os
import platform
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike


def median(values: ArrayLike) -> tuple[float, float, float]:
    """Median over the rounds and its 95 % bootstrap interval."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def show(value: tuple[float, float, float], form: str = ".2f") -> str:
    middle, low, high = (format(v, form) for v in value)
    return f"{middle} [{low}, {high}]"


def table(title: str, head: str, rows: list[list[str]], notes: str) -> None:
    columns = head.split("|")
    print(f"\n### {title}\n\n{notes}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


def hardware() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")][0]
    processors = len(os.sched_getaffinity(0))
    return f"{model}, {processors} processors, {platform.system()} {platform.release()}"
