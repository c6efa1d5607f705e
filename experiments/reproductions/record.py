"""A study, what it found, and the record of its verdict."""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "benchmarks"))
from measure import where  # noqa: E402

RESULTS = HERE / "results"


@dataclasses.dataclass(frozen=True)
class Study:
    """What is claimed and how it is judged, written before it is run.

    Fields:
      methods: rows of ``saex.sae.SAES``. claim: one sentence. source: the paper.
      paper: its figure. own_text: whether the method's description here comes from the paper's
        own text; if not the verdict is "our reading".
      baseline: what it is compared with, and how both were tuned.
      says_no_if: the condition under which the claim does not hold.
    """

    name: str
    methods: tuple[str, ...]
    claim: str
    source: str
    paper: str
    own_text: bool
    baseline: str
    says_no_if: str


Control = tuple[bool, str]  # whether the method did what it must there, and what came out


@dataclasses.dataclass(frozen=True)
class Found:
    """What came out.

    Fields:
      holds: whether ``says_no_if`` did not come true.
      ours: our figure, one line, with spreads. why: one or two sentences.
      runs: every run's settings, seed and scores.
      control: what the method does where it must win, or how to find out: asked after a "no".
      rates: how each learning rate was found, as ``rates.best_rate`` says it.
    """

    holds: bool | None
    ours: str
    why: str
    runs: list[dict[str, Any]]
    control: Control | Callable[[], Control] | str = ""
    rates: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def main(study: Study, run: Callable[[bool], Found]) -> None:
    """Run a study and write its record; a small run writes nothing."""
    parser = argparse.ArgumentParser(description=study.claim)
    parser.add_argument("--small", action="store_true", help="a minute, to see that it runs")
    small = parser.parse_args().small
    started, at = time.perf_counter(), commit()
    found = run(small)
    if small:
        print(f"a small run: {found.ours}")
        return
    record = dataclasses.asdict(study) | settled(study, found) | where() | {"commit": at}
    record |= {"jax": jax.__version__, "seconds": round(time.perf_counter() - started)}
    record["cpu_seconds"] = round(time.process_time())  # less than seconds where others work too
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{study.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['verdict']} ({record['seconds']} s): {found.ours}\n{found.why}")
    print(record["control"])


def settled(study: Study, found: Found) -> dict[str, Any]:
    """What a record says of a finding: a "no" without a passed control is "not settled"."""
    holds = None if found.holds is None else bool(found.holds)
    passed, text = (None, "") if holds else asked(found)
    holds = None if holds is False and not passed else holds
    return {
        "holds": holds,
        "ours": found.ours,
        "why": found.why,
        "runs": found.runs,
        "control": text,
        "control_passed": passed,
        "rates": found.rates,
        "verdict": verdict(study, holds),
    }


def asked(found: Found) -> Control:
    """The control of what is not a yes; words alone stand for a study that judged it itself."""
    if isinstance(found.control, str):
        return bool(found.control) and found.holds is not None, found.control
    passed, text = found.control() if callable(found.control) else found.control
    return bool(passed), text


def verdict(study: Study, holds: bool | None) -> str:
    said = {True: "holds", False: "does not hold", None: "not settled"}[holds]
    return said if study.own_text else f"our reading: {said}"


def commit() -> str:
    """The commit that runs, with a + where files of the library or the studies differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(("git", "-C", HERE, *words), capture_output=True, text=True)
        return done.stdout.strip()

    watched = (":/saex", ":/experiments/reproductions/*.py")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *watched)
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
