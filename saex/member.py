"""One dictionary of a run: its folder, checkpoints and metrics. An ordinary run has one."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax

from saex import distributed, metrics
from saex.checkpoint import Checkpointer
from saex.config import Config, expand, run_hash, to_json
from saex.data import order
from saex.data.store_remote import absolute
from saex.evaluate import store_folder
from saex.registry import ConfigError
from saex.train.state import abstract_state, init_state

log = logging.getLogger("saex")
FAILED = "FAILED.json"


def members_of(config: Config, folder: pathlib.Path) -> list[Member]:
    """The dictionaries that a run trains: of a stack each in ``members/00`` and so on."""
    configs = expand(config)
    if not config.members:
        return [Member(config, folder, "train")]
    store = absolute(store_folder(config, folder))
    configs = [dataclasses.replace(c, store=store) for c in configs]
    return [Member(c, folder / "members" / f"{i:02d}", f"{i:02d}") for i, c in enumerate(configs)]


class Member:
    """A dictionary in training.

    Attributes:
      config: as it would be trained alone. folder: its workdir, as good as that of a single run.
      failed: why it does not count any more (it was not finite), or None.
      saved: the last step that was saved.
    """

    def __init__(self, config: Config, folder: pathlib.Path, name: str):
        self.config, self.folder, self.name = config, folder, name
        self.saved, self.progress = 0, metrics.Silent()
        record = folder / FAILED
        failed = record.exists() and name != "train"  # a run of one tries again
        self.failed = json.loads(record.read_text())["why"] if failed else None

    def open(self, run: Config) -> Member:
        """Open the checkpoints; ``run`` says how many are kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpointer = Checkpointer(self.folder, run.checkpoint.keep)
        self.writer: Any = metrics.Silent()
        return self

    def start(self, first: int) -> None:
        """Open the metrics, which go on after step ``first``: one process speaks for all."""
        self.saved = first
        if distributed.is_main() and self.failed is None:
            self.writer = metrics.Writer(self.folder, first, self.config.log.tensorboard)
            if self.name in ("train", "00"):
                self.progress = metrics.Progress("train", self.config.n_steps, first)

    def init(self, mesh: Any, sample: Any) -> Any:
        """A fresh state on the mesh."""
        tx, strategy = self.config.optim.transformation(), self.config.mesh.strategy
        with jax.set_mesh(mesh):
            key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
            return init_state(self.config.sae, tx, key, sample, mesh, strategy)

    def restore(self, mesh: Any, store: Any, at_most: int) -> tuple[Any, int] | None:
        """(state, step) of the newest usable step up to ``at_most``; None where there is none.

        Raises:
          ConfigError: the checkpoint is of another store, or of another order of its rows.
        """
        if self.failed is not None:
            return None
        tx, strategy = self.config.optim.transformation(), self.config.mesh.strategy
        with jax.set_mesh(mesh):
            target = abstract_state(self.config.sae, tx, mesh, strategy)
            restored = self.checkpointer.restore(target, at_most)
        if restored is None:
            return None
        state, meta = restored
        if meta["data"].get("store", store.digest) != store.digest:
            raise ConfigError(
                f"the checkpoint of step {meta['step']} was trained on another store than "
                f"{store.path}: name that store by --config.store, or choose another --workdir"
            )
        if meta["data"].get("order", 1) != order.VERSION:
            raise ConfigError(
                f"the checkpoint of step {meta['step']} was trained on rows in another order, of "
                "another version of saex, so to go on would repeat some and skip others: go on "
                "with that version, or choose another --workdir"
            )
        return state, meta["step"]

    def save(self, state: Any, store_digest: str) -> None:
        """Start saving a state whose numbers were seen to be finite."""
        step = int(state.step)
        data = {"step": step, "store": store_digest, "order": order.VERSION}
        self.checkpointer.save(state, to_json(self.config), run_hash(self.config), data)
        self.saved = step

    def fail(self, step: int) -> None:
        """Note that the loss or a parameter is not finite; nothing of it is saved any more."""
        self.failed = (
            f"the loss or a parameter is not finite at step {step}; "
            + (
                f"the last good checkpoint is of step {self.saved}"
                if self.saved
                else "no checkpoint yet"
            )
            + ". Lower optim.lr, set optim.clip=1.0, or look at the data"
        )
        if self.name != "train":
            mend = "The others go on; train this one again in a workdir of its own"
            log.error("member %s: %s. %s", self.name, self.failed, mend)
            if distributed.is_main():
                metrics.write_json(self.folder / FAILED, {"step": step, "why": self.failed})

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics."""
        self.writer.write(step, values)
        note = "  ".join(f"{k} {values[k]:.4g}" for k in ("loss", "fvu", "l0") if k in values)
        self.progress.update(step, note)

    def close(self) -> None:
        """Wait for the disk and close the files."""
        self.writer.close()
        self.progress.close()
        self.checkpointer.close()
