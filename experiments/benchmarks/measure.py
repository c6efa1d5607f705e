"""How benchmarks here measure, on which rows, against which floor, and where they say it was.

Rows and latents are heavy-tailed: feature i is there with a probability of about 1 / i, as in what
dictionaries are made for. Uniform ones would flatter whatever sums over latents or caches them.
"""

import datetime
import functools
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

REPO = pathlib.Path(__file__).resolve().parent.parent.parent


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call: the minimum over ``rounds`` rounds in which every call runs once.

    Interleaved, so that what else the machine does falls on all alike; a first, unmeasured round
    compiles. A call returns arrays, which are waited for.
    """
    import jax

    best = dict.fromkeys(calls, float("inf"))
    for i in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds = time.perf_counter() - started
            if i:
                best[name] = min(best[name], seconds)
    return best


def saex_step(x: Any, sae: Any) -> Callable[[], Any]:
    """make_step on one batch: the loss with all it keeps count of, tangent gradients, Adam, unit
    rows, checks. A call returns the new state and what came out.
    """
    import jax

    from saex.sharding import MeshConfig, make_mesh
    from saex.train.optim import Optim
    from saex.train.state import init_state
    from saex.train.step import hyper_arrays, make_step

    optim = Optim()
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        batch = {"x": jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))}
        tx = optim.transformation()
        state = [init_state(sae, tx, jax.random.key(0), {"x": x}, mesh, "tp")]
        step, hyper = make_step(sae, optim, 1000), hyper_arrays(sae, optim, 1000)
        key = jax.random.key(0)

    def call():
        with jax.set_mesh(mesh):
            state[0], out = step(state[0], batch, key, hyper)
        return state[0], out

    return call


def write(out: str | pathlib.Path, record: Mapping[str, Any], text: str) -> None:
    """A record as ``out``.json and its table as ``out``.md; the folder is made."""
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)


# -------------------------------------------------------------------------------------------- data


def zipf_rows(b: int, d: int, features: int = 4096, active: int = 24) -> np.ndarray:
    """Rows float32 [b, d] of mean squared norm 1; feature i fires with probability ~ 1 / i."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(features, d)).astype(np.float32)
    frequency = 1 / np.arange(1, features + 1)
    chosen = rng.choice(features, (b, active), p=frequency / frequency.sum())
    size = rng.exponential(size=(b, active, 1)).astype(np.float32)
    x = np.zeros((b, d), np.float32)
    for j in range(active):
        x += size[:, j] * directions[chosen[:, j]]
    return x / np.float32(np.sqrt(np.mean(np.sum(x * x, axis=1))))


def zipf_codes(b: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, indices) [b, k]: latent i fires with probability ~ 1 / (i + 8), in a drawn order.

    A row has k different latents, its values are positive and the largest comes first, as a
    selection hands them out. 1,024 rows are drawn and repeated.
    """
    scores = zipf_scores(min(b, 1024), n)
    chosen = np.argpartition(-scores, k - 1, axis=1)[:, :k].astype(np.int32)
    sizes = np.random.default_rng(2).exponential(size=(b, k)).astype(np.float32)
    return -np.sort(-sizes, axis=1), np.resize(chosen, (b, k))


def zipf_scores(b: int, n: int) -> np.ndarray:
    """Scores float32 [b, n] whose k largest are latents drawn with probability ~ 1 / (i + 8)."""
    scores = np.random.default_rng(0).gumbel(size=(b, n)).astype(np.float32)
    scores -= np.log(np.arange(n, dtype=np.float32) + 8)
    return scores[:, np.random.default_rng(1).permutation(n)]


# ------------------------------------------------------------------------------------------ floors


@functools.cache
def machine() -> Any:
    """What this CPU can do, measured once in a run: ``cost.hardware("cpu")``."""
    from saex import cost

    return cost.hardware("cpu")


def step_floor(sae: Any, b: int, **how: Any) -> float:
    """Milliseconds that a step of b rows takes here at least; ``how``: of ``cost.step``."""
    from saex import cost
    from saex.sharding import MeshConfig

    return 1e3 * cost.step(sae, b, MeshConfig(), machine(), **how).seconds


def op_floor(ops: tuple[str, ...], b: int, d: int, n: int, k: int) -> float:
    """Milliseconds that one op after the other takes here at least: ``cost.op``."""
    from saex import cost

    return 1e3 * sum(cost.op(name, b, d, n, k, machine()) for name in ops)


# ------------------------------------------------------------------------------------------- where


def where() -> dict[str, str]:
    """date, command and machine of this measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python " + shlex.join([os.path.relpath(sys.argv[0], REPO), *sys.argv[1:]]),
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}",
    }


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
