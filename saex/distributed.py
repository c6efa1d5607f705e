"""Processes: the only caller of ``jax.distributed``."""

import os

import jax


def initialize() -> None:
    """Join the other processes of this run, if the environment names any.

    ``SAEX_COORDINATOR`` (host:port), ``SAEX_NUM_PROCESSES`` and ``SAEX_PROCESS_ID`` say it outright
    and stand for any launcher; without them a single process is assumed. Call it before anything
    touches a device.

    Raises:
      ValueError: only some of the three are set.
    """
    names = ("SAEX_COORDINATOR", "SAEX_NUM_PROCESSES", "SAEX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    missing = [name for name, value in zip(names, values) if not value]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be set too: all of {', '.join(names)} or none")
    coordinator, count, index = values
    jax.distributed.initialize(
        coordinator, num_processes=int(count or 0), process_id=int(index or 0)
    )


def is_main() -> bool:
    """Whether this process writes what is written once: logs, reports, manifests."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
