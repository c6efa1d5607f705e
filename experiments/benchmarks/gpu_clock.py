"""What the processes of ``gpu.py`` share: shapes, time, arguments, and how results are handed on.

Imports neither JAX nor torch: each process has one of them alone.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

SHAPES = {  # rows, d, n, k
    "A": (4096, 768, 24576, 32),
    "B": (8192, 768, 32768, 32),
    "C": (4096, 2304, 16384, 64),
    "D": (8192, 2304, 65536, 64),
    "E": (8192, 4096, 131072, 64),
    "F": (32768, 768, 32768, 32),
}
TINY = {"tiny": (8, 128, 64, 2)}
PACKAGES = ("saex", "jax", "jaxlib", "torch", "eai-sparsify", "sae-lens", "dictionary-learning")


class Clock:
    """Milliseconds of calls, or the error that they end in: one bad kernel ends no benchmark."""

    def __init__(self, rounds: int, calls: int, wait: Callable[[Any], Any]):
        """Minimum over rounds of the mean over calls; ``wait(out)`` waits for what a call gave."""
        self.rounds, self.calls, self.wait = rounds, calls, wait

    def __call__(self, call: Callable[[], Any]) -> float | str:
        """Milliseconds of one call."""
        return self.made(lambda: call)

    def made(self, make: Callable[[], Callable[[], Any]]) -> float | str:
        """The same of a call that has to be made first: its arrays may be what does not fit."""
        try:
            call = make()
            for _ in range(2):
                self.wait(call())
            return min(self._round(call) for _ in range(self.rounds))
        except Exception as error:
            return told(error)

    def _round(self, call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        for _ in range(self.calls):
            out = call()
        self.wait(out)
        return round(1e3 * (time.perf_counter() - started) / self.calls, 4)


def told(error: Exception) -> str:
    """An error on a line of a table."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def arguments(doc: str) -> argparse.Namespace:
    """What ``gpu.py`` tells the process of a part."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--part", required=True)
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--to", type=pathlib.Path, required=True)
    return parser.parse_args()


def sizes(names: list[str]) -> dict[str, tuple[int, int, int, int]]:
    """The shapes of these names."""
    return {name: (SHAPES | TINY)[name] for name in names}


def hand_on(to: pathlib.Path, device: str, found: dict[str, Any]) -> None:
    """Write what is known so far: it survives what comes."""
    to.write_text(json.dumps({"device": device, "versions": versions(), "found": found}))


def versions() -> dict[str, str]:
    """Of what is installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}
