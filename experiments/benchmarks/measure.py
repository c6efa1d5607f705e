"""How benchmarks here measure, and what they say about where: machine, command, date."""

import datetime
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

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
