"""A finished or running workdir, looked at: evaluation and report of its newest checkpoint."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from saex import distributed, evals, metrics
from saex.checkpoint import load_sae, read_meta
from saex.config import Config, resolve, to_json
from saex.data import joined
from saex.data.exclude import NORM, norm_limit
from saex.data.split import open_split
from saex.data.store_remote import RemotePath, place
from saex.registry import ConfigError

log = logging.getLogger("saex")


def evaluate_run(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint on its held-out store; writes and returns eval.json.

    Of a stack, every member that did not fail: {"members": {name: its evaluation}}.

    Raises:
      CheckpointError, StoreError: nothing to evaluate, or nothing to evaluate it on.
    """
    folder = pathlib.Path(workdir)
    if folders := member_folders(folder):
        result = {"members": {path.name: evaluate_run(path) for path in folders}}
        if distributed.is_main():
            metrics.write_json(folder / "eval.json", _writable(result))
        return result
    config, folder, sae, params, heldout = _open_run(workdir)
    each, limits = {}, heldout.rows.max_norms
    for site in encoded_sites(config):
        rows = site_rows(config, heldout.rows.store, site, limits)
        heldout = dataclasses.replace(heldout, rows=rows, controls={})
        each[site] = _evaluate(config, folder, sae, params, heldout)
    result = each[config.site] if config.site in each else _of_sites(each)
    result["step"] = read_meta(folder)["step"]
    for note in heldout.notes():
        log.info(note)
    if distributed.is_main():
        metrics.write_json(folder / "eval.json", _writable(result))
    return result


def encoded_sites(config: Config) -> list[str]:
    """What ``encode`` takes rows of: the run's site, or each of several side by side by itself."""
    several = getattr(config.sae, "sites", 1) > 1
    return joined.parts(config.site) if several else [config.site]


def _of_sites(each: dict[str, dict[str, float]]) -> dict[str, float]:
    """The metrics of each site under its name, and their means."""
    names = [name for name in next(iter(each.values())) if "." not in name]
    means = {name: sum(m[name] for m in each.values()) / len(each) for name in names}
    return means | {f"{site}.{name}": v for site, m in each.items() for name, v in m.items()}


def _evaluate(
    config: Config, folder: pathlib.Path, sae: Any, params: Any, heldout: Any
) -> dict[str, Any]:
    """All evaluations, with controls, on the rows of one site."""
    kept = config.live.tee or not config.live.enabled
    if config.eval.controls and not kept:
        log.info("no controls: a live run keeps no training rows; with live.tee=True it does")
    if config.eval.controls and kept:
        k = getattr(sae, "k", None)
        if k is None:  # as many numbers as the dictionary uses
            k = round(evals.Reconstruction(32_768).run(sae, params, heldout)["l0"])
        store = open_split(store_folder(config, folder), "train")
        train_rows = site_rows(config, store, heldout.rows.site, heldout.rows.max_norms)
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        controls = evals.controls.fit(train_rows, sae, key, k=max(1, min(k, sae.d_in)))
        heldout = dataclasses.replace(heldout, controls=controls)
    sizes = {
        "reconstruction": {"rows": min(config.eval.rows, 262_144)},
        "density": {"rows": config.eval.rows},
        "cross_entropy": {"contexts": config.eval.contexts},
    }
    chosen = {name: cls(**sizes.get(name, {})) for name, cls in evals.EVALS.items()}
    return evals.evaluate(sae, params, heldout, chosen)


def _writable(result: dict[str, Any]) -> dict[str, Any]:
    """With None where a ratio has no value: JSON knows no NaN."""
    each = {k: _writable(v) if isinstance(v, dict) else v for k, v in result.items()}
    return {k: None if v != v else v for k, v in each.items()}


def report_run(workdir: str | pathlib.Path) -> pathlib.Path:
    """Write report.html of a run's newest checkpoint (of a stack, of each member's).

    Returns:
      Its path; of a stack the folder with the members.
    """
    from saex import report

    if folders := member_folders(pathlib.Path(workdir)):
        for path in folders:
            report_run(path)
        return pathlib.Path(workdir) / "members"
    config, folder, sae, params, heldout = _open_run(workdir)
    if not distributed.is_main():
        return folder / "report.html"
    evaluation = folder / "eval.json"
    return report.write(
        folder / "report.html",
        sae=sae,
        params=params,
        heldout=heldout,
        config=to_json(config),
        history=metrics.read(folder),
        evaluation=json.loads(evaluation.read_text()) if evaluation.exists() else {},
        latents=config.report.latents,
        contexts=config.report.contexts,
    )


def member_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs of a stack's members that did not fail; [] where the run is no stack."""
    every = sorted((folder / "members").glob("*/config.json"))
    return [path.parent for path in every if not (path.parent / "FAILED.json").exists()]


def _open_run(workdir: str | pathlib.Path) -> tuple[Config, pathlib.Path, Any, Any, Any]:
    folder = pathlib.Path(workdir)
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{path} does not exist: {folder} is not a run's workdir")
    config = resolve(json.loads(path.read_text())["config"])
    sae, params = load_sae(folder)
    model, model_params = config.subject.load() if config.subject else (None, None)
    root = store_folder(config, folder)
    limits = norm_limits(config, open_split(root, "train")) if config.stream.max_norm else {}
    rows = site_rows(config, open_split(root, "heldout"), None, limits)
    heldout = evals.HeldOut(rows, model, model_params)
    return config, folder, sae, params, heldout


def norm_limits(config: Config, train: Any) -> dict[str, list[float]]:
    """``max_norms`` of ``evals.Rows``: the norms beyond which the stream leaves rows out.

    Args:
      config: the run's.
      train: the store that it trains on, whose median norms these are multiples of: held-out rows
        are judged by the same numbers.

    Raises:
      StoreError: no norms of a column in this store.
    """
    if not config.stream.max_norm:
        return {}
    read = sorted({part for name in config.reads.values() for part in joined.parts(name)})
    stores, most = getattr(train, "stores", (train,)), config.stream.max_norm
    return {
        name + NORM: [float(norm_limit(one.read(name + NORM), most)) for one in stores]
        for name in read
        if train.column(name).shape
    }


def site_rows(
    config: Config,
    store: Any,
    site: str | None = None,
    max_norms: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Any:
    """A store's rows as this configuration counts them.

    Args:
      config: the run's.
      store: its training or its held-out store.
      site: None: the first site that is encoded.
      max_norms: as ``norm_limits`` gives them.
    """
    site = encoded_sites(config)[0] if site is None else site
    skip = config.stream
    left_out = skip.exclude_positions, skip.exclude_tokens
    target = config.reads.get("y")
    return evals.Rows(store, site, *left_out, target=target, skip=skip.exclude, max_norms=max_norms)


def store_folder(config: Config, folder: pathlib.Path) -> pathlib.Path | RemotePath:
    """Where a run's train and heldout stores are, or the one that is split into them."""
    return folder / "store" if config.store is None else place(config.store)
