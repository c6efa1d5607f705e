"""What the studies of this folder share: rows, training, scores, figures.

A study is a file with a ``STUDY`` and a ``run(small) -> Found``; ``python FILE`` runs it, writes
``results/NAME.json`` (some draw their figure beside it); ``python figures.py`` draws the others',
and ``python table.py`` makes docs/reproductions.md of all records. ``--small`` is a minute that
shows nothing but that it runs.
"""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import RESULTS
from record import Found as Found
from record import Study as Study
from record import main as main

from saex.data import Stdlib, Store
from saex.data.stream import cast
from saex.evals import Constant, CrossEntropy, HeldOut, OfDictionary, Reconstruction, Rows
from saex.evals.heldout import Contexts
from saex.harvest import Harvest, harvest
from saex.models import PocketLM
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from saex.train.state import init_state
from saex.train.step import hyper_arrays, make_step

STORES = pathlib.Path("runs/reproductions")
SITE = "blocks.1.resid_post"
Columns = Mapping[str, np.ndarray]
Batches = Callable[[int], Columns]


def told(values: Sequence[float], form: str = ".4f") -> str:
    """Mean ± standard deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:{form}}"


def beyond(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether every seed's a is below every seed's b: an effect beyond the spread of seeds."""
    return max(a) < min(b)


def at_l0(points: Sequence[tuple[float, float]], l0: float) -> float:
    """FVU at an L0, between the (l0, fvu) of one method, linear in logarithms.

    Raises:
      ValueError: the points do not reach to that L0.
    """
    x, y = np.log(np.asarray(sorted(points), np.float64)).T
    if not x[0] <= np.log(l0) <= x[-1]:
        raise ValueError(f"L0 {l0} lies outside of {sorted(points)}: sweep the penalty wider")
    return float(np.exp(np.interp(np.log(l0), x, y)))


# ----------------------------------------------------------------------------------------- training


def shuffled(columns: Columns, batch: int, seed: int) -> Batches:
    """Batches of rows in memory, in another random order each epoch."""
    count = len(next(iter(columns.values())))

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, 3, epoch]).permutation(count)

    def batches(step: int) -> Columns:
        epoch, i = divmod(step, count // batch)
        rows = np.sort(order(epoch)[i * batch : (i + 1) * batch])
        return {name: column[rows] for name, column in columns.items()}

    return batches


def trained(
    sae: Any,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    seed: int,
    sample: Columns | None = None,
    clip: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[Any, list[dict[str, float]]]:
    """(params, metrics of each step) of saex's own training step on one device.

    ``sample`` (by default the batch that would come after the last) initialises the dictionary;
    ``clip``: as in ``Optim``. ``betas``: Adam's.
    """
    optim = Optim(lr=lr, b1=betas[0], b2=betas[1], clip=clip)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        first = {k: jnp.asarray(v) for k, v in (sample or batches(steps)).items()}
        key = jax.random.fold_in(jax.random.key(seed), 1)
        state = init_state(sae, optim.transformation(), key, first, mesh, "tp")
        step_fn, hyper = make_step(sae, optim, steps), hyper_arrays(sae, optim, steps)
        place, history = jax.NamedSharding(mesh, jax.P("data")), []
        for step in range(steps):
            batch = {k: jax.device_put(v, place) for k, v in batches(step).items()}
            state, metrics = step_fn(state, batch, jax.random.key(seed), hyper)
            history.append(metrics)
    history = [{k: float(v) for k, v in m.items()} for m in history]
    if not history[-1]["finite"]:
        raise RuntimeError(f"{sae}, seed {seed}: not finite")
    return jax.device_get(state.params), history


def codes_of(sae: Any, params: Any, x: np.ndarray, batch: int = 4096) -> np.ndarray:
    """Dense codes [rows, n] as inference gives them, float32."""
    encode = jax.jit(lambda p, x: sae.encode(p, x).dense(sae.n))
    blocks = [np.asarray(encode(params, x[i : i + batch])) for i in range(0, len(x), batch)]
    return np.concatenate(blocks)


def scores(
    sae: Any, params: Any, x: np.ndarray, y: np.ndarray | None = None, batch: int = 4096
) -> dict[str, float]:
    """Held-out scores in raw units, in inference mode, with x as ``decode``'s context.

    fvu: sum ||y - y'||^2 / sum ||y - mean||^2 (y: what shall be reconstructed, by default x).
    l0: mean of active latents. dead: share of latents that never fire in these rows.
    relative_bias: sum ||y'||^2 / sum y.y'; below 1: shrunk.
    """
    y = x if y is None else y

    @jax.jit
    def reconstruct(params, x):
        codes = sae.encode(params, x)
        return sae.decode(params, codes, x), codes.dense(sae.n) != 0

    residual = active = size = overlap = 0.0
    fired = np.zeros(sae.n, bool)
    for i in range(0, len(x), batch):
        got, on = map(np.asarray, reconstruct(params, x[i : i + batch]))
        want = y[i : i + batch]
        residual += np.sum(np.square(want - got), dtype=np.float64)
        size += np.sum(np.square(got), dtype=np.float64)
        overlap += np.sum(want * got, dtype=np.float64)
        active += on.sum()
        fired |= on.any(0)
    centred = np.sum(np.square(y - y.mean(0, dtype=np.float64)), dtype=np.float64)
    return {
        "fvu": float(residual / centred),
        "l0": float(active / len(x)),
        "dead": 1 - float(fired.mean()),
        "relative_bias": float(size / overlap),
    }


def compile_once() -> None:
    """Let runs that differ in nothing but seed or rate share their compiled programs."""
    folder = tempfile.mkdtemp(prefix="saex-studies-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def tried(
    name: str,
    sae: Any,
    train: np.ndarray,
    test: np.ndarray,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 1024,
    clip: float | None = None,
    finish: Callable[[Any], Any] = lambda params: params,
    **settings: Any,
) -> dict[str, Any]:
    """One run for ``Found.runs``: trained on the rows of one array, scored on those of another.

    ``finish``: what is done to the params in between. ``settings`` are noted in the run.
    """
    batches = shuffled({"x": train}, batch, seed)
    params, _ = trained(sae, batches, steps=steps, lr=lr, seed=seed, clip=clip)
    params = finish(params)
    return {"method": name, **settings, "lr": lr, "seed": seed, **scores(sae, params, test)}


def of(runs: Sequence[Mapping[str, Any]], score: str, **which: Any) -> list[float]:
    """A score of the runs with these settings, in their order."""
    return [run[score] for run in runs if all(run.get(k) == v for k, v in which.items())]


# ------------------------------------------------------------------------ activations of pocket-lm


def pocket(
    sites: Sequence[str] = (SITE,), rows: int = 200_000, heldout: int = 50_000, **how: Any
) -> tuple[Store, Store]:
    """(training, held-out) stores of pocket-lm on the standard library, harvested once.

    ``how``: further fields of ``Harvest``, for instance ``gradients``.
    """
    cfg = Harvest(sites=tuple(sites), rows=rows, heldout_rows=heldout, **how)
    extra = [f"{k}-{v}" for k, v in how.items()]
    folder = STORES / "-".join([*sites, *extra, str(rows)]).replace("/", "_")
    model, params = PocketLM().load()
    train, held = (
        harvest(model, params, Stdlib(), split, folder / split, cfg)
        for split in ("train", "heldout")
    )
    return train, held


def read(store: Store, **columns: str) -> dict[str, np.ndarray]:
    """Whole columns in memory, activations float32, without position 0: name in a batch -> array.

    ``read(store, x=SITE)``
    """
    kept = store.read("position") > 0
    found = {name: store.read(column)[kept] for name, column in columns.items()}
    floats = {k: v for k, v in found.items() if v.dtype.kind not in "iub"}
    return {**found, **{k: cast(v, np.dtype(np.float32)) for k, v in floats.items()}}


def pocket_rows(small: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the default site: for training, for choosing among settings, and for scores."""
    train, held = pocket(rows=20_000, heldout=6000) if small else pocket()
    x, held_out = read(train, x=SITE)["x"], read(held, x=SITE)["x"]
    some = len(held_out) // 5
    return x, held_out[:some], held_out[some:]


def held_out(heldout: Store, site: str = SITE, target: str | None = None) -> HeldOut:
    """Rows, text and pocket-lm for ``saex.evals``; ``target``: what a transcoder predicts."""
    rows = Rows(heldout, site, skip_positions=(0,), target=target)
    return HeldOut(rows, *PocketLM().load())


def parted(held: HeldOut, share: int = 5) -> tuple[HeldOut, HeldOut]:
    """The same rows with the first of ``share`` parts of the text, to choose by, and the rest."""
    text = held.text
    assert text is not None
    cut = len(text.tokens) // share
    parts = (slice(cut), slice(cut, None))
    seen = [None if text.seen is None else text.seen[part] for part in parts]
    texts = [Contexts(text.tokens[p], text.lengths[p], s) for p, s in zip(parts, seen)]
    return tuple(dataclasses.replace(held, contexts=one) for one in texts)


def reconstructed(sae: Any, params: Any, held: HeldOut, rows: int = 32_768) -> dict[str, float]:
    """FVU, L0 and relative bias, with the inputs as ``decode``'s context (skip paths, norms)."""
    found = Reconstruction(rows).run(sae, params, held)
    return {name: found[name] for name in ("fvu", "l0", "relative_bias")}


def in_place(
    dictionaries: Mapping[Any, tuple[Any, Any]], held: HeldOut, contexts: int = 64
) -> dict[Any, float]:
    """Nats per token that each (sae, params) costs in place of the site or target.

    All read the same contexts, so differences are paired; "mean" is what the mean there costs.
    """
    variants = {name: OfDictionary(*one) for name, one in dictionaries.items()}
    variants["mean"] = Constant(held.mean)
    nats, _, _ = CrossEntropy(contexts).score(variants, held)
    return {name: nats[name] - nats["clean"] for name in variants}


# ------------------------------------------------------------------------------------------ figures


def axes(title: str, x: str, y: str, columns: int = 1) -> Any:
    """(figure, axes) in the one style of these studies; ``save`` writes it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "saex", "font.size": 9, "axes.grid": True,
                            "grid.alpha": 0.3, "axes.spines.top": False,
                            "axes.spines.right": False, "svg.fonttype": "none"}  # fmt: skip
    import matplotlib.pyplot as plt

    figure, found = plt.subplots(1, columns, figsize=(4.2 * columns, 3.2), layout="constrained")
    for axis in np.atleast_1d(found):
        axis.set(xlabel=x, ylabel=y)
    figure.suptitle(title, fontsize=10)
    return figure, found


def save(figure: Any, name: str) -> None:
    """Write ``results/NAME.svg``."""
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
