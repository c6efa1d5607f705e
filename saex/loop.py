"""The training loop, top to bottom: stores, state, steps, checkpoints, evaluation, report.

Every stage is resumable: a second call goes on where a killed one stopped, a finished run says so.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import signal
import threading
import time
from typing import Any

import jax

from saex import distributed, evals, live, metrics, stores
from saex.checkpoint import versions
from saex.config import Config, differences, recorded_identity, run_hash, to_json
from saex.data.store_remote import absolute, is_remote
from saex.evaluate import evaluate_run, norm_limits, report_run, site_rows
from saex.member import Member, members_of
from saex.registry import ConfigError, identity
from saex.sharding import make_mesh
from saex.train import stack
from saex.train.step import hyper_arrays

EXIT_PREEMPTED = 42  # a checkpoint was saved; whoever launched this may start it again
EXIT_NAN = 3  # not a code that restarts: the same numbers would come again
SAMPLE_ROWS = 32_768  # rows that initial means, medians and norms are taken from

log = logging.getLogger("saex")


class Preempted(Exception):
    """SIGTERM came; what can be saved has been."""


class NotFinite(RuntimeError):
    """The loss or a parameter is not finite; the message names the last good step."""


def train(
    config: Config, workdir: str | pathlib.Path, extend: bool = False, allow_change: bool = False
) -> Any:
    """Run ``config`` in ``workdir`` to its end, from wherever an earlier call left it.

    Args:
      config: a resolved configuration.
      workdir: made if it is not there; holds all that the run writes.
      extend: allow a larger budget than the workdir's earlier configuration has.
      allow_change: allow any other change of identity fields.

    Returns:
      The content of ``eval.json``; of a stack {"members": {name: that of each}}.

    Raises:
      ConfigError: the workdir is of another configuration.
      Preempted: SIGTERM; the state is saved. NotFinite: the run cannot go on.
    """
    if is_remote(workdir):
        raise ConfigError(
            f"--workdir={workdir}: a workdir is a folder on a disk. Its rows may be on an object "
            "store: write them there (saex harvest --config=FILE --store=s3://..., or saex store "
            "copy), then give --config.store=s3://bucket/name"
        )
    if config.store is not None:  # a run may be looked at from another folder
        config = dataclasses.replace(config, store=absolute(config.store))
    folder = _claim(config, pathlib.Path(workdir), extend, allow_change)
    done, evaluation = folder / "DONE.json", folder / "eval.json"
    if done.exists() and json.loads(done.read_text()).get("steps") == config.n_steps:
        if evaluation.exists():
            log.info("%s is done (%s); nothing to do", folder, done)
            return json.loads(evaluation.read_text())
    started = time.time()
    with _Sigterm() as stop:
        log.info(_plan(config, folder))
        mesh = make_mesh(config.mesh)
        store, heldout = stores.of_run(config, folder, mesh, stop.check)
        with live.finishing(store):
            _fit(config, folder, store, heldout, mesh, stop)
        # Every process evaluates (a restore needs all of them); the first one writes.
        result = evaluate_run(folder)
        stop.check()
        if config.report.enabled:
            report_run(folder)
    if distributed.is_main():
        record = {"steps": config.n_steps, "seconds": round(time.time() - started, 1)}
        metrics.write_json(done, {**record, "versions": versions()})
    distributed.barrier("done")
    log.info("done in %.0f s: %s", time.time() - started, folder)
    return result


def harvest(config: Config, place: str | pathlib.Path) -> list[Any]:
    """Write the stores of ``config``, `train` and `heldout`, to a place of their own.

    Args:
      config: a resolved configuration; its subject, text, site, columns, harvest and seed count.
      place: a folder, or a place on an object store. A call that was killed is gone on with.

    Raises:
      ConfigError: no subject model. Preempted: SIGTERM; what was committed is kept.
    """
    with _Sigterm() as stop:
        return stores.harvested(config, place, stop.check)


# --------------------------------------------------------------------------------------- the steps


def _fit(
    config: Config, folder: pathlib.Path, store: Any, heldout: Any, mesh: Any, stop: Any
) -> None:
    """Update until the budget is spent and the last states are saved."""
    steps = config.n_steps
    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        stream = live.open_stream(config, store, mesh, SAMPLE_ROWS, folder / "rows")
        closing.callback(stream.close)
        log.info("stream: %s", stream.info)
        numbers = {k: v for k, v in stream.info.items() if isinstance(v, int | float)}
        facts = {f"stream/{name}": float(value) for name, value in numbers.items()}
        members = members_of(config, folder)
        for m in members:
            closing.callback(m.open(config).close)
        slots, first = _restore_or_init(config, members, stream, store, mesh)
        for m in members:
            _write_config(m.config, m.folder)  # from here on the folder is this configuration's
            m.start(first)
        if config.members:
            _write_config(config, folder)
        step_fn = stack.make_stack_step(config.sae, config.optim, steps)
        hypers = [hyper_arrays(m.config.sae, m.config.optim, steps) for m in members]
        keys = stack.join([jax.random.key(m.config.seed) for m in members], mesh)
        rates = ", ".join(f"{float(h['lr']):.3g}" for h in hypers)
        log.info("learning rate %s, %d steps of %d rows", rates, steps, stream.batch)
        hypers = stack.join(hypers, mesh)
        pending = None  # metrics of the step before, read one step late
        limits = norm_limits(config, store) if config.eval.every else {}
        looked_at = evals.HeldOut(site_rows(config, heldout, None, limits))
        batches = stream.iterate(first)
        clock = _Clock(first)

        for step in range(first, steps):
            with clock:
                batch = next(batches)
            slots, out = step_fn(slots, batch, keys, hypers)
            if pending is not None:
                _record(members, mesh, config, *pending, clock, facts)
            pending = (step + 1, out)
            stopping = stop.agreed(step)
            evaluating = bool(config.eval.every) and (step + 1) % config.eval.every == 0
            saving = (step + 1) % config.checkpoint.every == 0 or step + 1 == steps or stopping
            if not evaluating and not saving:
                continue
            _record(members, mesh, config, *pending, clock, facts)
            pending = None  # seen finite: states may be evaluated and saved
            for i, m in enumerate(members):
                if m.failed is None:
                    state = stack.member(slots, i, mesh)
                    with jax.set_mesh(stack.place_of(mesh, i)):
                        if evaluating:
                            m.writer.write(step + 1, _look(m.config, state.params, looked_at))
                        if saving:
                            m.save(state, store.digest)
            if stopping and step + 1 < steps:
                raise Preempted(f"SIGTERM: saved step {step + 1} of {steps}; run again to go on")


def _look(config: Config, params: Any, rows: Any) -> dict[str, float]:
    """A small evaluation in the middle of the run."""
    values = evals.Reconstruction(16_384).run(config.sae, params, rows)
    return {f"heldout/{name}": value for name, value in values.items()}


def _restore_or_init(
    config: Config, members: list[Member], stream: Any, store: Any, mesh: Any
) -> tuple[Any, int]:
    """(slots, step): every member at the newest step that all of them have, or all anew."""
    places = [stack.place_of(mesh, i) for i in range(len(members))]
    living = [m for m in members if m.failed is None]
    wanted = min((max(m.checkpointer.steps(), default=0) for m in living), default=0)
    restored = {}
    while wanted:  # a damaged step sends everybody back to the one before
        restored = {id(m): m.restore(place, store, wanted) for m, place in zip(members, places)}
        reached = min(0 if (found := restored[id(m)]) is None else found[1] for m in living)
        if reached == wanted:
            break
        wanted = reached
    if not wanted:
        for m in living:
            m.checkpointer.set_aside(0)
        sample = stream.sample(SAMPLE_ROWS)
        return stack.join([m.init(p, sample) for m, p in zip(members, places)], mesh), 0
    log.info("resumed at step %d", wanted)
    states = []
    for m, place in zip(members, places):
        found = restored[id(m)]
        # one that failed keeps its place in the program; what it computes is not looked at
        states.append(m.init(place, stream.sample(SAMPLE_ROWS)) if found is None else found[0])
    return stack.join(states, mesh), wanted


def _record(members, mesh, config, step, out, clock, facts) -> None:
    """Look at the metrics of a step that has (almost surely) finished."""
    writing = step % config.log.every == 0 or step in (1, config.n_steps)
    seconds = clock.read(step) if writing else {}
    out = jax.device_get(out) if writing else [{"finite": jax.device_get(o["finite"])} for o in out]
    for i, m in enumerate(members):
        values = stack.metrics_of(out, i, mesh)
        if m.failed is None and not bool(values["finite"]):
            m.fail(step)
        if writing and m.failed is None:
            values = {k: float(v) for k, v in values.items() if k != "finite"}
            said = facts if step == 1 else {}  # what is streamed, once
            m.write(step, {**values, "tokens": step * config.stream.batch, **seconds, **said})
    failed = [m for m in members if m.failed is not None]
    if len(failed) == len(members):
        raise NotFinite(failed[0].failed)


class _Clock:
    """Seconds a step, and the part of them that the loop waited for data."""

    def __init__(self, first: int) -> None:
        self._t0, self._step, self._waited = time.perf_counter(), first, 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *args: Any) -> None:
        self._waited += time.perf_counter() - self._entered

    def read(self, step: int) -> dict[str, float]:
        """Averages since the last reading."""
        now = time.perf_counter()
        out = {
            "step_seconds": (now - self._t0) / max(step - self._step, 1),
            "wait_share": self._waited / max(now - self._t0, 1e-9),
        }
        self._t0, self._step, self._waited = now, step, 0.0
        return out


# --------------------------------------------------------------------------------- before and after


def _claim(config: Config, folder: pathlib.Path, extend: bool, allow_change: bool) -> pathlib.Path:
    """The workdir, made and found to be this configuration's own or nobody's; else refuse."""
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"--workdir={folder} cannot be written to ({error.strerror}); choose another folder"
            ) from error
    path = folder / "config.json"
    if not path.exists():
        return folder
    old = json.loads(path.read_text())
    changed = differences(recorded_identity(old), json.loads(json.dumps(identity(config))))
    budget = [d for d in changed if d.startswith(("config.steps:", "config.tokens:"))]
    larger = config.n_steps >= old["n_steps"]
    if extend and budget and larger:
        changed = [d for d in changed if d not in budget]
    if changed and not allow_change:
        mend = ""
        if changed == budget:
            mend = "--extend continues with a larger budget; "
            if not larger:
                mend = f"the budget there is {old['n_steps']} steps, which cannot be made smaller; "
        raise ConfigError(
            f"{folder} holds a run of another configuration:\n  "
            + "\n  ".join(changed)
            + f"\n{mend}choose another --workdir, or --allow_config_change to go on regardless"
        )
    return folder


def _write_config(config: Config, folder: pathlib.Path) -> None:
    """Record whose workdir this is, once the run can start; what was done before is not done."""
    if distributed.is_main():
        (folder / "DONE.json").unlink(missing_ok=True)
        record = {"config": to_json(config), "identity": identity(config)}
        record |= {"hash": run_hash(config), "n_steps": config.n_steps}
        metrics.write_json(folder / "config.json", record)


def _plan(config: Config, folder: pathlib.Path) -> str:
    return (
        f"{folder} {run_hash(config)}: {type(config.sae).__name__} of {config.sae.n} latents on "
        f"{config.site}, {config.n_steps} steps of {config.stream.batch} rows"
    )


class _Sigterm:
    """Notes SIGTERM; the loop asks for it at every step, harvesting between segments."""

    def __enter__(self) -> "_Sigterm":
        self.came, self._old = False, None
        # Of several processes, JAX's own handler tells all of them: see ``agreed``.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *args: Any) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _note(self, *args: Any) -> None:
        self.came = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step: the same answer on every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.came

    def check(self, *args: Any) -> None:
        """Stop here and now if SIGTERM came."""
        if self.came:
            raise Preempted("SIGTERM: what was committed stays; run again to go on")
