"""Quality of saex's dictionaries beside those of SAELens, dictionary_learning and sparsify.

    python experiments/benchmarks/quality.py

ReLU, Gated, JumpReLU, TopK, BatchTopK and Matryoshka on pocket-lm's residual stream, TopK
transcoders with and without a linear path on an MLP of it: the same rows in the same order, the
same width, steps, batch and age of death, each library in the scale of inputs and with the
initialisation, losses and optimiser that are its own. One numpy evaluator scores them all on
held-out rows in raw units, by thresholds where a method has them.

Methods whose L0 is not fixed are swept: the penalty (or k) is moved until two runs lie close to
the wanted L0 on both sides, and scores are read between them. Every library gets four learning
rates: what it recommends, for runs much longer than these, and that times 4, 16 and 64 (sparsify's
SignSGD: from a 16th to 4 times). The one with the least FVU at that L0 on other held-out rows, of
the first seed, is that of all seeds.

An environment for it is that of ``quality_topk.py`` with, under the same constraint,
``eai-sparsify==1.3.3 schedulefree natsort simple-parsing accelerate``.

Every finished run is a line in ``--cache``; run again after a stop and it goes on. ``--only`` and
``--libraries`` do a part; the table is written of what is there. ``--size=wide`` has 16 times the
latents and tries two rates, those that were best in the full size; ``tiny`` shows that all run.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from measure import where, write
from quality_libraries import (
    EXACT,
    LIBRARIES,
    METHODS,
    TRANSCODERS,
    Data,
    Settings,
    Trained,
    setting,
)
from quality_sweep import around, read, search
from quality_table import table
from quality_topk import Cache
from quality_weights import InPlace, evaluate

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "reproductions"))
import study  # noqa: E402

from saex.evals import Constant, CrossEntropy  # noqa: E402

MLP = "blocks.1.mlp_in", "blocks.1.mlp_out"
FULL = Settings(d=256, n=512, l0=32, steps=300, batch=1024, warmup=6, decay=60, dead_after=30_720)
TINY = Settings(d=256, n=64, l0=8, steps=8, batch=256, warmup=1, decay=2, dead_after=512)
WIDE = Settings(d=256, n=8192, l0=32, steps=200, batch=2048, warmup=4, decay=40, dead_after=61_440)
SIZES = {"full": FULL, "wide": WIDE, "tiny": TINY}
RATES = {"full": slice(None), "wide": slice(1, 3), "tiny": slice(1)}  # of a library's
SAMPLE_ROWS = 8192
SCORES = ("fvu", "cosine", "l0", "dead", "loss_recovered", "ce_increase", "seconds")


class Missing(Exception):
    """A run that is not in the cache and is not asked for."""


def main() -> None:
    args = _arguments()
    os.environ.setdefault("TQDM_DISABLE", "1")  # SAELens' bars
    study.compile_once()
    tiny = args.size == "tiny"
    bench = Bench(SIZES[args.size], tiny, Cache(pathlib.Path(args.cache)))
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        having = [name for name, library in LIBRARIES.items() if method in library.methods]
        for name in having:
            wanted = method in args.only and name in args.libraries
            one = compared(bench.runs(method, name, wanted), method, name, bench.settings, args)
            if one is not None:
                found.setdefault(method, {})[name] = one
    _write(pathlib.Path(args.out), found, bench.facts | where())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", default="full", choices=list(SIZES), help="tiny: no result")
    parser.add_argument("--cache", help="default: runs/quality.jsonl or runs/quality_SIZE.jsonl")
    parser.add_argument("--out", help="default: likewise, in results (tiny: in runs)")
    args = parser.parse_args()
    name = "quality" if args.size == "full" else f"quality_{args.size}"
    args.cache = args.cache or f"runs/{name}.jsonl"
    folder = pathlib.Path("runs") if args.size == "tiny" else HERE / "results"
    args.out = args.out or str(folder / name)
    return args


# ------------------------------------------------------------------------- rates, seeds and sweeps


def compared(
    run: Callable[..., dict[str, Any]], method: str, name: str, s: Settings, args: Any
) -> dict[str, Any] | None:
    """{"rate", "seeds", "why", "runs"} of a method of a library; None without a run.

    ``run(value, lr, seed)`` gives scores or raises ``Missing``.
    """
    rates, tiny = LIBRARIES[name].rates(method, s.n)[RATES[args.size]], args.size == "tiny"
    _, start = setting(method, name, s.l0)
    first, tried = args.seeds[0], {}
    try:
        for lr in rates:
            tried[lr] = _swept(run, method, name, s, lr, first, [start], 1 if tiny else 6)
    except Missing:
        return None
    everything = [r for sweep in tried.values() for r in sweep]
    scored = {lr: _at(sweep, method, s.l0, "choice_") for lr, sweep in tried.items()}
    scored = {lr: scores["choice_fvu"] for lr, scores in scored.items() if scores}
    if not scored:
        return {"rate": None, "seeds": [], "why": _why(everything), "runs": everything}
    best = min(scored, key=scored.__getitem__)
    sweeps = [tried[best]]
    starts = [r["value"] for r in around(tried[best], s.l0) if r is not None]
    for seed in args.seeds[1:]:
        try:
            sweeps.append(_swept(run, method, name, s, best, seed, starts, 5))
        except Missing:
            continue
    seeds = [scores for sweep in sweeps if (scores := _at(sweep, method, s.l0))]
    everything += [r for sweep in sweeps[1:] for r in sweep]
    return {"rate": best, "seeds": seeds, "why": "", "runs": everything}


def _swept(
    run: Callable[..., dict[str, Any]],
    method: str,
    name: str,
    s: Settings,
    lr: float,
    seed: int,
    starts: list[float],
    most: int,
) -> list[Any]:
    """The runs of one seed at one rate."""
    if method in EXACT:
        return [{"value": float(s.l0), **run(float(s.l0), lr, seed)}]
    what, _ = setting(method, name, s.l0)
    return search(lambda value: run(value, lr, seed), starts, s.l0, what, most)


def _at(runs: list[Any], method: str, l0: float, part: str = "") -> dict[str, Any]:
    """Scores at an L0; {} where the runs do not reach it. ``part``: "choice_" or "" (test)."""
    names = [f"{part}fvu"] if part else SCORES
    if method in EXACT:
        return {name: runs[0][name] for name in names} if runs[0]["l0"] is not None else {}
    found = {name: read(runs, name, l0) for name in names}
    return {} if None in found.values() else found


def _why(runs: Iterable[Any]) -> str:
    reached = [r["l0"] for r in runs if r["l0"] is not None]
    said = f"L0 {min(reached):.3g} to {max(reached):.3g}" if reached else "diverged"
    return f"not reached ({said})"


# -------------------------------------------------------------------------------------- single runs


@dataclasses.dataclass(frozen=True)
class Split:
    """Columns x (and y) of raw rows to train on, to choose rates by, to score; held-out text."""

    train: dict[str, np.ndarray]
    choice: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    held: Any


class Bench:
    """Trains, checks and scores runs, each once."""

    def __init__(self, settings: Settings, tiny: bool, cache: Cache):
        self.settings, self.tiny, self.cache = settings, tiny, cache
        self.rows = {"rows": 9000, "heldout": 3000} if tiny else {"rows": 320_000}
        self.facts = {"settings": dataclasses.asdict(settings), **self.rows}
        self.facts |= {"sites": [study.SITE, *MLP]}

    def runs(self, method: str, name: str, train: bool) -> Callable[..., dict[str, Any]]:
        """(value, lr, seed) -> scores, from the cache or, if ``train``, by a run."""
        what, _ = setting(method, name, self.settings.l0)

        def run(value: float, lr: float, seed: int) -> dict[str, Any]:
            done = {"method": method, "library": name, "setting": what, "value": value}
            done |= {"lr": lr, "seed": seed, "version": LIBRARIES[name].version()}
            text = json.dumps([self.facts, done], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            if key not in self.cache.lines:
                if not train:
                    raise Missing
                self.cache.add(key, done | self._scores(method, name, value, lr, seed))
                _say(self.cache.lines[key])
            return self.cache.lines[key]

        return run

    def _scores(self, method: str, name: str, value: float, lr: float, seed: int) -> dict[str, Any]:
        split, clock = self.split(method in TRANSCODERS), Clock()
        data = self._data(split, seed, clock)
        s = dataclasses.replace(self.settings, d=data.sample["x"].shape[1])
        try:
            trained = LIBRARIES[name].train(method, s, data, value, lr, seed)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            return {"l0": None, "choice_l0": None}
        seconds = clock.seconds()
        if not _finite(trained):
            return {"l0": None, "choice_l0": None}
        check(f"{method} of {name}", trained, split.test["x"][:512])
        choice = evaluate(trained.weights, *_xy(split.choice))
        found = evaluate(trained.weights, *_xy(split.test)) | seconds
        found |= {"choice_fvu": choice["fvu"], "choice_l0": choice["l0"]}
        return found | self._downstream(trained, method in TRANSCODERS)

    def _data(self, split: Split, seed: int, clock: "Clock") -> Data:
        rows = np.random.default_rng([seed, 5]).permutation(len(split.train["x"]))[:SAMPLE_ROWS]
        sample = {name: column[np.sort(rows)] for name, column in split.train.items()}
        scales = {name: float(_mean_square(x) ** -0.5) for name, x in sample.items()}
        batches = study.shuffled(split.train, self.settings.batch, seed)
        return Data(clock.around(batches), sample, scales, clock.stop)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (there is one bench)
    def split(self, transcoder: bool) -> Split:
        """The rows of SAEs or of transcoders."""
        sites = MLP if transcoder else (study.SITE,)
        columns = dict(zip("xy", sites, strict=False))
        train, heldout = study.pocket(sites, **self.rows)
        rows = study.read(train, **columns)
        held = study.read(heldout, **columns)
        some = len(held["x"]) // 5
        return Split(
            {k: v[:2000] if self.tiny else v for k, v in rows.items()},
            {k: v[:some] for k, v in held.items()},
            {k: v[some:] for k, v in held.items()},
            study.held_out(heldout, sites[0], sites[1] if transcoder else None),
        )

    @functools.lru_cache(maxsize=2)  # noqa: B019 (there is one bench)
    def _ablated(self, transcoder: bool) -> float:
        """Nats with 0 in place: what loss recovered is measured against."""
        held = self.split(transcoder).held
        zero = Constant(np.zeros(self.settings.d, np.float32))
        return self._entropy.score({"zero": zero}, held)[0]["zero"]

    def _downstream(self, trained: Trained, transcoder: bool) -> dict[str, float]:
        variant = {"it": InPlace(trained.weights)}
        nats, _, _ = self._entropy.score(variant, self.split(transcoder).held)
        zero, increase = self._ablated(transcoder), nats["it"] - nats["clean"]
        recovered = (zero - nats["it"]) / (zero - nats["clean"])
        return {"ce_increase": increase, "loss_recovered": recovered}

    @property
    def _entropy(self) -> CrossEntropy:
        return CrossEntropy(contexts=4 if self.tiny else 64)


class Clock:
    """Seconds of training by when batches are asked for; the first two steps may compile."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.end = 0.0

    def stop(self) -> None:
        """The last step is done."""
        self.end = time.perf_counter()

    def around(self, batches: Callable[[int], Any]) -> Callable[[int], Any]:
        """The same batches, noting the time."""

        def noted(step: int) -> Any:
            self.times.append(time.perf_counter())
            return batches(step)

        return noted

    def seconds(self) -> dict[str, float]:
        """seconds: of all steps, if as fast as those after the second; first_two: of these two."""
        steps = len(self.times)
        later = (self.end - self.times[2]) / (steps - 2)
        return {"seconds": later * steps, "first_two": self.times[2] - self.times[0]}


def check(what: str, trained: Trained, x: np.ndarray) -> None:
    """The evaluator's reconstruction is the library's own: the export loses nothing.

    Raises:
      RuntimeError: more than 2% of the rows differ by more than 0.1%. Few may: rounding moves a
        latent over its threshold, which then counts as a whole.
    """
    own = trained.forward(x)
    ours = trained.weights.decoded(x, trained.weights.codes(x))
    errors = np.linalg.norm(own - ours, axis=1) / np.linalg.norm(own, axis=1)
    if not np.quantile(errors, 0.98) < 1e-3:
        raise RuntimeError(f"{what}: evaluator and library differ by {np.median(errors):.1e}")


def _xy(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return columns["x"], columns.get("y", columns["x"])


def _finite(trained: Trained) -> bool:
    values = dataclasses.asdict(trained.weights).values()
    return all(np.isfinite(v).all() for v in values if isinstance(v, np.ndarray))


def _mean_square(x: np.ndarray) -> float:
    return float(np.mean(np.sum(np.square(x, dtype=np.float64), axis=1)))


def _say(line: dict[str, Any]) -> None:
    told = "{method} of {library}, {setting} {value:.4g}, rate {lr:.3g}, seed {seed}: ".format
    scores = "diverged"
    if line["l0"] is not None:
        scores = "fvu {fvu:.5f}, L0 {l0:.2f}, {seconds:.1f} s".format(**line)
    print(told(**line) + scores, flush=True)


def _write(out: pathlib.Path, found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    text = table(found, facts)
    write(out, {**facts, "found": found}, text)
    print(text)


if __name__ == "__main__":
    main()
