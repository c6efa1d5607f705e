"""The stores of a run: those that its configuration names, or those that it has harvested."""

import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from saex import distributed, harvest_room, live, metrics
from saex.config import Config
from saex.contexts import GRADIENT, choose, sites_of
from saex.data import joined
from saex.data.manifest import Column
from saex.data.split import open_split
from saex.evaluate import store_folder
from saex.harvest import columns_of, harvest, settle
from saex.registry import ConfigError
from saex.sae.base import column_widths

log = logging.getLogger("saex")


def of_run(
    config: Config, folder: pathlib.Path, mesh: Any, check: Callable[[], Any]
) -> tuple[Any, Any]:
    """(train store, held-out store): harvested into the workdir if no store is named.

    Of a live run the first one is made while it is read.

    Args:
      folder: the workdir. mesh: the run's.
      check: called after each batch of a harvest; what it raises ends it.

    Raises:
      ConfigError: neither rows nor a model that makes them, or a column of another width.
    """
    root = store_folder(config, folder)
    if config.store is not None and config.live.enabled:
        raise ConfigError(
            f"config.store={config.store!r} with live.enabled: rows come from the one or the other"
        )
    if config.store is not None:
        stores = open_split(root, "train"), open_split(root, "heldout")
    else:
        given = subject_of(config, "name a store of ready rows by --config.store=DIR")
        if config.live.enabled:
            train = _live(config, *given, root / "train", mesh)
        else:
            later = _bytes_left(config, *given, "heldout", root / "heldout")
            train = _harvested(config, *given, "train", root / "train", check, later)
        stores = train, _harvested(config, *given, "heldout", root / "heldout", check)
    for store in stores:
        if not store.complete:
            raise ConfigError(f"{store.path} is not complete: run its harvest again to the end")
        _check_widths(config, functools.partial(_width_in, store))
    return stores


def harvested(config: Config, place: str | os.PathLike, check: Callable[[], Any]) -> list[Any]:
    """Both stores of a configuration, `train` and `heldout`, in a folder or on an object store.

    Args: as ``of_run``; place: a folder, or a place such as s3://bucket/name.
    """
    given = subject_of(config, "saex harvest is for models")
    where = str(place).rstrip("/")
    later = _bytes_left(config, *given, "heldout", f"{where}/heldout")
    return [
        _harvested(config, *given, split, f"{where}/{split}", check, beside)
        for split, beside in (("train", later), ("heldout", 0))
    ]


def subject_of(config: Config, mend: str) -> tuple[Any, Any, tuple[str, ...]]:
    """(model, its parameters, sites that the dictionary reads); checked against the dictionary.

    Raises:
      ConfigError: no subject model; a site that it does not have, or of another width.
    """
    if config.subject is None:
        raise ConfigError(
            "config.subject=None and config.store=None: without a subject model there is nothing "
            f"to harvest; {mend}"
        )
    model, params = config.subject.load()
    sites = sites_of(config, model)
    _check_widths(config, functools.partial(_width_of_sites, model))
    return model, params, sites


def _live(config: Config, model: Any, params: Any, sites: Any, path: Any, mesh: Any) -> Any:
    return live.open_rows(
        model, params, config.text, path, config.harvest, config.live,
        sites=sites, seed=config.seed, mesh=mesh,
    )  # fmt: skip


def _bytes_left(config: Config, model: Any, params: Any, sites: Any, split: str, path: Any) -> int:
    """Bytes of the disk that a store of a run has yet to take.

    Of int8 without the channels that stay bfloat16, which are not known before the first rows.
    """
    cfg = settle(model, config.harvest, sites)
    columns = columns_of(model, config.text, cfg)
    if cfg.dtype == "int8":
        columns |= {site: Column((model.sites[site],), "int8") for site in cfg.sites}
    contexts = functools.partial(choose, model, config.text, split, cfg, config.seed)
    return harvest_room.left(path, columns, cfg, contexts)


def _harvested(
    config: Config, model: Any, params: Any, sites: Any, split: str, path: Any, check: Any,
    beside: int = 0,
) -> Any:  # fmt: skip
    bars: list[Any] = []  # made at the first batch, which knows how many rows there will be

    def update(done: int, total: int, rate: float) -> None:
        check()
        if not bars:
            main = distributed.is_main()
            bar = metrics.Progress(f"harvest {split}", total, done, unit="row") if main else None
            bars.append(bar or metrics.Silent())
        bars[0].update(done, f"{rate:,.0f} rows/s")

    try:
        store = harvest(
            model, params, config.text, split, path, config.harvest,
            sites=sites, seed=config.seed, progress=update, beside=beside,
        )  # fmt: skip
    finally:
        for bar in bars:
            bar.close()
    log.info("%s: %d rows", path, store.rows)
    return store


def _check_widths(config: Config, width_of: Callable[[str], int | None]) -> None:
    """Raise ConfigError for a column that is not as wide as the dictionary reads it.

    Args:
      width_of: of a name in the store; None: not known yet.
    """
    wanted = column_widths(config.sae)
    for name, stored in config.reads.items():
        width = width_of(stored)
        if width is not None and width != wanted[name]:
            raise ConfigError(_of_another_width(config, name, width, wanted[name]))


def _width_in(store: Any, name: str) -> int:
    return math.prod(joined.column(store, name).shape)


def _width_of_sites(model: Any, name: str) -> int | None:
    each = [model.sites.get(part.removesuffix(GRADIENT)) for part in joined.parts(name)]
    return None if None in each else sum(each)


def _of_another_width(config: Config, name: str, width: int, wanted: int) -> str:
    sae, stored = config.sae, config.reads[name]
    if name == "x":
        sites = getattr(sae, "sites", 1)  # whose rows are encoded each by itself
        times = f" for each of config.sae.sites={sites}" if sites > 1 else ""
        return f"config.sae.d_in={sae.d_in}{times}, but {stored} has width {width}"
    mend = {
        "y": f"set config.sae.d_out={width}",
        "label": f"set config.sae.concepts={width}",
        "gradient": f"name that at config.site={config.site!r}",
    }.get(name, "name one of that width")
    return (
        f"column {stored!r}, which {type(sae).__name__} reads as {name!r}, has width {width}, and "
        f"{wanted} was expected: {mend}, or name another by config.columns"
    )
