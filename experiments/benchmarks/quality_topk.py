"""TopK quality: saex against dictionary_learning and SAELens on one store.

    python experiments/benchmarks/quality_topk.py --store=runs/quickstart/store

Same rows in the same order, same scale of the inputs (mean squared norm 1), same n, k, steps,
batch, learning rate, warm-up, decay and age of death, three seeds each; everything else is each
library's own. One numpy evaluator scores all of them on the held-out store, in raw units. Settings
are those of ``--config``, by default the quickstart's, whose run makes the store.

An environment for it (Python 3.11; the constraint keeps the peers from pulling a CUDA build, and
their torchvision does not fit a CPU build of torch and breaks their import):

    python3.11 -m venv peers
    echo torch==2.13.0 > constraints.txt
    peers/bin/pip install -c constraints.txt torch sae-lens==6.54.12 dictionary-learning==0.1.0
    peers/bin/pip uninstall -y torchvision
    peers/bin/pip install -c constraints.txt -e .

Every finished (library, seed) is a line in ``--cache``; run again after a stop and it goes on.
``--only`` and ``--seeds`` do a part; the table is written of what is there.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from measure import where, write
from topk_trainers import LIBRARIES, Settings, Trained, version

from saex.config import load
from saex.data.store import Store
from saex.data.stream import cast

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE_ROWS = 32_768


def main() -> None:
    args = _arguments()
    config = load(args.config, [("steps", str(args.steps))] if args.steps else [])
    train, heldout = (Store.open(pathlib.Path(args.store) / s) for s in ("train", "heldout"))
    settings = _settings(config)
    facts = {
        "settings": dataclasses.asdict(settings),
        "site": config.site,
        "stores": {"train": train.digest, "heldout": heldout.digest},
    }
    cache = Cache(pathlib.Path(args.cache))
    for seed in args.seeds:
        for library in args.only:
            key = _key(facts, library, seed)
            if key not in cache.lines:
                print(f"{library}, seed {seed}: training", flush=True)
                cache.add(key, _run(library, seed, settings, config, train, heldout))
    found = {}
    for library in LIBRARIES:
        keys = [_key(facts, library, seed) for seed in args.seeds]
        found[library] = [cache.lines[key] for key in keys if key in cache.lines]
    _write(pathlib.Path(args.out), found, facts | _record(train, heldout))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="a folder with train and heldout")
    parser.add_argument("--config", default=str(HERE.parent / "quickstart.py"))
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--cache", default="runs/quality_topk.jsonl")
    parser.add_argument("--out", default=str(HERE / "results" / "quality_topk"))
    return parser.parse_args()


def _settings(config: Any) -> Settings:
    sae, steps = config.sae, config.n_steps
    return Settings(
        d=sae.d_in,
        n=sae.n,
        k=sae.k,
        steps=steps,
        batch=config.stream.batch,
        lr=config.optim.learning_rate(sae.n),
        warmup=max(round(config.optim.warmup * steps), 1),
        decay=max(round(config.optim.decay * steps), 1),
        dead_after=sae.dead_after_tokens,
    )


def _key(facts: dict[str, Any], library: str, seed: int) -> str:
    text = json.dumps([facts, library, seed, version(library)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Cache:
    """Results by key, one JSON line each: what was done before a stop stays done."""

    def __init__(self, path: pathlib.Path):
        self.path, self.lines = path, {}
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            self.lines = {line.pop("key"): line for line in lines}

    def add(self, key: str, line: dict[str, Any]) -> None:
        """Remember a result, here and in the file."""
        self.lines[key] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **line}) + "\n")


def _run(
    library: str, seed: int, settings: Settings, config: Any, train: Any, heldout: Any
) -> dict[str, Any]:
    """Train and score one (library, seed)."""
    stream = config.stream.open(train, {"x": config.site}, seed, dtype="float32")
    sample = stream.sample(SAMPLE_ROWS)["x"]
    scale = np.float32(_mean_square(sample) ** -0.5)

    def batches(step: int) -> np.ndarray:
        start = step * settings.batch
        return stream.gather(start, start + settings.batch)["x"] * scale

    trained = LIBRARIES[library](settings, batches, sample * scale, seed)
    _check_layout(library, trained, batches(0)[:512], settings.k)
    stream.close()
    scores = evaluate(trained.weights, scale, _rows(heldout, config), settings.k)
    print(f"{library}, seed {seed}: fvu {scores['fvu']:.5f}", flush=True)
    return {"library": library, "seed": seed, "version": version(library), **scores}


def _mean_square(x: np.ndarray) -> float:
    return float(np.mean(np.sum(np.square(x, dtype=np.float64), axis=1)))


def _rows(store: Any, config: Any, batch: int = 4096) -> Iterator[np.ndarray]:
    """Held-out rows float32 [<= batch, d] in raw units, without the positions not trained on."""
    for start in range(0, store.rows, batch):
        stop = min(start + batch, store.rows)
        x = cast(store.read(config.site, start, stop), np.dtype(np.float32))
        if "position" in store.columns:
            x = x[~np.isin(store.read("position", start, stop), config.stream.exclude_positions)]
        yield x


# ------------------------------------------------------------------------------------ the evaluator


def evaluate(
    weights: dict[str, np.ndarray], scale: float, rows: Iterator[np.ndarray], k: int
) -> dict[str, float]:
    """Scores of one dictionary, in numpy alone, sums in float64.

    fvu: sum ||x - y||^2 / sum ||x - mean||^2, pooled over all rows, mean of these rows.
    l0: mean of values above 0. dead: share of latents that fired in none of the rows.
    """
    residual = squares = active = count = 0.0
    total, fired = np.zeros(weights["b_dec"].shape), np.zeros(len(weights["b_enc"]), bool)
    for x in rows:
        y, codes = reconstruct(weights, x * np.float32(scale), k)
        residual += np.sum(np.square(x - y / np.float32(scale), dtype=np.float64))
        squares += np.sum(np.square(x, dtype=np.float64))
        total += x.sum(axis=0, dtype=np.float64)
        active += np.count_nonzero(codes)
        fired |= codes.any(axis=0)
        count += len(x)
    centred = squares - np.sum(total**2) / count
    return {
        "fvu": residual / centred,
        "mse": residual / count / len(total),
        "l0": active / count,
        "dead": 1 - float(fired.mean()),
        "rows": count,
    }


def reconstruct(
    weights: dict[str, np.ndarray], x: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(y [b, d], codes [b, n]) of rows in the units of the weights."""
    p = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    best = np.argpartition(p, -k, axis=1)[:, -k:]
    codes = np.zeros_like(p)
    np.put_along_axis(codes, best, np.maximum(np.take_along_axis(p, best, axis=1), 0), axis=1)
    return codes @ weights["W_dec"] + weights["b_dec"], codes


def _check_layout(library: str, trained: Trained, x: np.ndarray, k: int) -> None:
    """The evaluator's reconstruction is the library's own: the export loses nothing."""
    own, ours = trained.forward(x), reconstruct(trained.weights, x, k)[0]
    error = float(np.linalg.norm(own - ours) / np.linalg.norm(own))
    if error > 1e-3:  # a near tie at the cut may fall otherwise in a row or two
        raise RuntimeError(f"{library}: evaluator and library differ by {error:.1e} (relative)")


# ---------------------------------------------------------------------------------------- the table


def _record(train: Any, heldout: Any) -> dict[str, Any]:
    return where() | {"rows": {"train": train.rows, "heldout": heldout.rows}}


def _write(out: pathlib.Path, found: dict[str, list[dict]], facts: dict[str, Any]) -> None:
    text = table(found, facts)
    write(out, {**facts, "runs": found}, text)
    print(text)


def table(found: dict[str, list[dict]], facts: dict[str, Any]) -> str:
    """The results as markdown: mean and sample standard deviation over seeds, and FVU ratios."""
    s = facts["settings"]
    lines = [
        "# TopK quality: held-out FVU",
        "",
        f"d {s['d']}, n {s['n']}, k {s['k']}, {s['steps']} steps of {s['batch']} rows, Adam at "
        f"{s['lr']:.3g} with {s['warmup']} steps of warm-up and {s['decay']} of decay, dead after "
        f"{s['dead_after']:,} rows; {facts['rows']['train']:,} training rows, "
        f"{facts['rows']['heldout']:,} held-out rows of {facts['site']}.",
        "",
        f"`{facts['command']}`  ",
        f"{facts['date']}, {facts['machine']}",
        "",
        "| library | seeds | FVU (mean ± sd) | per seed | L0 | dead | saex / this |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {r["seed"]: r["fvu"] for r in found["saex"]}
    for library, runs in found.items():
        if runs:
            lines.append(_line(library, runs, ours))
    versions = sorted({part for runs in found.values() for r in runs for part in [r["version"]]})
    return "\n".join([*lines, "", "Versions: " + "; ".join(versions) + ".", ""])


def _line(library: str, runs: list[dict], ours: dict[int, float]) -> str:
    fvu = np.array([r["fvu"] for r in runs])
    sd = fvu.std(ddof=1) if len(fvu) > 1 else float("nan")
    paired = [(ours[r["seed"]], r["fvu"]) for r in runs if r["seed"] in ours]
    ratio = np.mean([a for a, _ in paired]) / np.mean([b for _, b in paired]) if paired else np.nan
    mean = {k: np.mean([r[k] for r in runs]) for k in ("l0", "dead")}
    return (
        f"| {library} | {len(runs)} | {fvu.mean():.5f} ± {sd:.5f} | "
        f"{' '.join(f'{v:.5f}' for v in fvu)} | {mean['l0']:.2f} | {100 * mean['dead']:.2f}% | "
        f"{ratio:.4f} |"
    )


if __name__ == "__main__":
    main()
