"""Checkpoints: the only file that knows Orbax.

A step holds three items: ``params`` (all that inference reads), ``train`` (step, optimiser state,
stats) and ``meta`` (JSON: resolved configuration, versions, data state, a digest per array).
Orbax restores a flipped bit without a word, so digests are verified on load and a step that does
not match is passed over, with a warning, for the one before.
"""

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from saex.distributed import barrier
from saex.registry import make
from saex.sae import SAES
from saex.sharding import abstract

FORMAT = 1
_log = logging.getLogger("saex")


class CheckpointError(RuntimeError):
    """No checkpoint that can be used; the message says which were tried and why not."""


# ------------------------------------------------------------------------------------------ digests


@jax.jit
def digests(tree: Any) -> Any:
    """Two uint32 words per array: a sum over (global index, bits) of their hash.

    A sum does not care about order or place, so the digest is that of the numbers alone: the same
    on every mesh and on one device. Computed where the array lies.
    """
    return jax.tree.map(_digest, tree)


def _digest(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    sharding = jax.typeof(x).sharding
    where = {} if sharding.mesh.empty else {"out_sharding": sharding}
    for axis in range(x.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, **where)
        place = _mix(place + index * jnp.uint32(0x9E3779B1) + jnp.uint32(axis + 1))
    words = _mix(bits ^ place), _mix(bits * jnp.uint32(0x9E3779B9) + _mix(place))
    return jnp.stack([jnp.sum(w, dtype=jnp.uint32) for w in words])


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def hex_digests(tree: Any) -> dict[str, str]:
    """The digests by path, as 16 hexadecimal digits."""
    words = jax.tree_util.tree_leaves_with_path(jax.device_get(digests(tree)))
    return {jax.tree_util.keystr(p): f"{int(w[0]):08x}{int(w[1]):08x}" for p, w in words}


# ----------------------------------------------------------------------------- saving and restoring


class Checkpointer:
    """The checkpoints of one run, in ``workdir/checkpoints/<step>/``."""

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
        """Open (or make) the folder; the newest ``keep`` steps are kept."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = pathlib.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: Any, config: dict[str, Any], config_hash: str, data: dict[str, Any]
    ) -> None:
        """Start saving ``state``; returns while the disk is still being written to.

        Args:
          state: a TrainState whose numbers were seen to be finite.
          config: the resolved configuration, as JSON can hold it.
          config_hash: of its identity.
          data: what the stream needs to go on: {"step": global step}.
        """
        step = int(state.step)
        params, train = _items(state)
        meta = {
            "format": FORMAT,
            "step": step,
            "config": config,
            "config_hash": config_hash,
            "data": data,
            "versions": versions(),
            "digests": {"params": hex_digests(params), "train": hex_digests(train)},
        }
        args = self._ocp.args
        items = args.Composite(
            params=args.StandardSave(params),
            train=args.StandardSave(train),
            meta=args.JsonSave(meta),
        )
        self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Until everything that was started is on disk."""
        self._manager.wait_until_finished()

    def restore(self, target: Any, at_most: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """The newest step that is whole, laid out as ``target``; None where there is no step.

        Later steps are moved out of the way, so that they can be saved again.

        Args:
          target: TrainState of ShapeDtypeStructs with shardings.
          at_most: the last step that is wanted; None: whichever is the newest.

        Returns:
          (state, meta).

        Raises:
          CheckpointError: there are steps, but none can be used; nothing is deleted.
        """
        args, failures = self._ocp.args, []
        for step in reversed(self.steps()):
            if at_most is not None and step > at_most:
                continue
            try:
                meta = _read_meta(self.path / str(step))
                params, train = _items(target)
                out = self._manager.restore(
                    step,
                    args=args.Composite(
                        params=args.StandardRestore(params), train=args.StandardRestore(train)
                    ),
                )
                _verify(meta, params=out["params"], train=out["train"])
                state = target.replace(params=out["params"], **out["train"])
                self.set_aside(step)
                return state, meta
            except Exception as error:  # Orbax raises bare Exceptions for damaged files
                failures.append(f"step {step}: {_first_line(error)}")
                _log.warning("checkpoint %s is not usable: %s", self.path / str(step), failures[-1])
        if failures:
            raise CheckpointError(
                f"no step of {self.path} can be restored ({'; '.join(failures)}); "
                "move the folder away to start anew, or restore it from a copy"
            )
        return None

    def set_aside(self, good: int) -> None:
        """Move steps after ``good``, which cannot be used, to where they are in no one's way."""
        later = [step for step in self.steps() if step > good]
        if not later:
            return
        if jax.process_index() == 0:
            damaged = self.path.parent / "damaged"
            damaged.mkdir(exist_ok=True)
            for step in later:
                place = damaged / f"{step}-{time.time_ns()}"
                (self.path / str(step)).rename(place)
                _log.warning("step %d was moved to %s", step, place)
        barrier("set damaged checkpoints aside")
        self._manager.reload()

    def close(self) -> None:
        """Wait and release threads."""
        self._manager.close()


def _items(state: Any) -> tuple[Any, dict[str, Any]]:
    return state.params, {"step": state.step, "opt_state": state.opt_state, "stats": state.stats}


def _verify(meta: dict[str, Any], **items: Any) -> None:
    for name, tree in items.items():
        found, recorded = hex_digests(tree), meta["digests"][name]
        changed = [path for path in recorded if found.get(path) != recorded[path]]
        if changed:
            raise ValueError(f"{name}{changed[0]} does not match its digest: altered on disk")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    names = ("saex", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore")
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---------------------------------------------------------------------------- reading, for analysis


def read_meta(path: str | pathlib.Path) -> dict[str, Any]:
    """The metadata of the newest complete step of a run (or of the step folder itself).

    Raises:
      CheckpointError: nothing complete is there.
    """
    return _read_meta(_step_folders(path)[0])


def load_sae(path: str | pathlib.Path, mesh: Any = None) -> tuple[Any, dict[str, jax.Array]]:
    """(sae, params) of a run's newest whole checkpoint, on any machine.

    Args:
      path: a run's workdir, its ``checkpoints`` folder, or one step's folder.
      mesh: None: plain arrays on this process's first device. A mesh: params lie sharded on it.

    Returns:
      The dictionary, rebuilt from the configuration in the checkpoint (no file is executed), and
      its params: ``sae.encode(params, x)``, ``sae.decode(params, codes)`` take raw activations.

    Raises:
      CheckpointError: no step there can be used: damaged, or of a method that this version does
        not have; says which and why.
    """
    failures = []
    for folder in _step_folders(path):
        try:
            meta = _read_meta(folder)
            sae = make(SAES, meta["config"]["sae"], "config.sae")
            params = _restore_params(folder, sae.specs()["params"], mesh)
            _verify(meta, params=params)
            return sae, params
        except Exception as error:  # Orbax raises bare Exceptions for damaged files
            failures.append(f"{folder}: {_first_line(error)}")
            _log.warning("%s is not usable: %s", folder, failures[-1])
    raise CheckpointError(f"no checkpoint can be loaded: {'; '.join(failures)}")


def _restore_params(folder: pathlib.Path, specs: Any, mesh: Any) -> Any:
    import orbax.checkpoint as ocp

    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), abstract(specs)
        )
    else:
        target = abstract(specs, mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "params", target)


def _step_folders(path: str | pathlib.Path) -> list[pathlib.Path]:
    """Folders of complete steps, newest first."""
    root = pathlib.Path(path).expanduser().resolve()
    if not root.exists():
        raise CheckpointError(f"{root} does not exist; expected a run's folder or a checkpoint")
    if (root / "meta").is_dir():
        return [root]
    root = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = [p for p in root.iterdir() if p.name.isdigit() and (p / "meta").is_dir()]
    if not steps:
        raise CheckpointError(
            f"no complete checkpoint under {root}: it may still be being written, or the run was "
            "stopped before its first one; run the same training command again"
        )
    return sorted(steps, key=lambda p: -int(p.name))


def _read_meta(folder: pathlib.Path) -> dict[str, Any]:
    files = [f for f in (folder / "meta").iterdir() if f.name == "metadata"]
    if not files:
        raise ValueError(f"{folder / 'meta'} holds no metadata file")
    meta = json.loads(files[0].read_text())
    if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
        raise ValueError(f"{files[0]} is not the metadata of a saex checkpoint")
    if meta.get("format", 0) > FORMAT:
        raise ValueError(
            f"{files[0]} is of format {meta['format']}, this version reads up to {FORMAT}: "
            "upgrade saex"
        )
    return meta


def info(path: str | pathlib.Path) -> dict[str, Any]:
    """What two runs are compared by: step, configuration hash, digests of params and of the state.

    ``state_digest`` covers all that a resume needs: params, optimiser, stats and the data state.
    """
    meta = read_meta(path)
    digests, data = meta["digests"], meta["data"]
    return {
        "step": meta["step"],
        "config_hash": meta["config_hash"],
        "params_digest": _combine(digests["params"]),
        "state_digest": _combine({**digests["params"], **digests["train"], "data": str(data)}),
        "data": data,
        "sae": meta["config"]["sae"],
        "versions": meta["versions"],
    }


def _combine(parts: dict[str, str]) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
