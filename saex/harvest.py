"""Activations of a subject model over text, written as a store; goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from saex import distributed, harvest_room
from saex.calibration import with_scales
from saex.contexts import (
    GRADIENT,
    Contexts,
    choose,
    in_batches,
    is_compiled,
    is_gradient,
    keeps_apart,
    make_forward,
)
from saex.data import store_remote
from saex.data.exclude import NORM
from saex.data.manifest import Column, StoreError
from saex.data.quantise import with_parts
from saex.data.store import Store, find_manifest
from saex.data.store_merge import merge_parts
from saex.data.store_writer import StoreWriter
from saex.data.text import check_split
from saex.registry import choices, run_field

log = logging.getLogger("saex")

# Called after each batch with rows done, rows in all (of this process), and rows per second.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Harvest:
    """What is harvested, and in which pieces. All but the last decides the content of the store.

    Attributes:
      sites: sites of the subject model to harvest besides the ones that a run asks for.
      rows: rows (tokens, the first of each context counted) of the training store, at most.
      heldout_rows: rows of the held-out store, at most.
      context: tokens per context; 0 takes the model's own.
      batch: contexts per forward pass.
      dtype: of the activations on disk; int8 has a scale for each channel, and channels that this
        would hurt stay bfloat16 (`saex.data.calibrate`).
      calibration_rows: rows on which these scales are found, the first of the harvest.
      segment_rows: rows after which a segment is written; a kill loses less than that. They are
        held in memory and shuffled together, so with long contexts make it larger: a hundred
        contexts and more are mixed well.
      chunk_rows: rows per chunk of the store, which are read together.
      shuffle: whether the rows of each segment of the training store are put in random order, so
        that any chunk has rows of many documents, and a batch is as good as one drawn at random.
        Held-out stores keep contexts together, which evaluations need.
      gradients: sites of which the gradient of the model's loss (`saex.models.gradients`) is
        harvested too, as a column `SITE.gradient`; a site's pass then takes three times as long.
      norms: whether each site gets a column of its norms, `SITE.norm`, by which a stream can leave
        outliers out.
      pack: whether short contexts are put into one, so that little is padding. A token sees those
        of its own document alone, at positions that begin anew, as if the document were alone.
        Without it every context is of one document.
      parts: parts that the processes of a job write side by side, a whole number of them for each.
        The store is the same for any number of processes, but not for another number of parts.
      non_finite: what becomes of rows with NaN or infinity: "refuse" stops the harvest, "drop"
        leaves them out and counts them in the manifest.
      check_room: whether a store that the disk has no room for is refused before it is begun.
    """

    sites: tuple[str, ...] = ()
    rows: int = 1_000_000
    heldout_rows: int = 200_000
    context: int = 0
    batch: int = 32
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    calibration_rows: int = 16_384
    segment_rows: int = 131_072
    chunk_rows: int = 256
    shuffle: bool = True
    gradients: tuple[str, ...] = ()
    norms: bool = True
    pack: bool = False
    parts: int = 1
    non_finite: Literal["refuse", "drop"] = "refuse"
    check_room: bool = run_field(True)

    def __post_init__(self) -> None:
        for name in (
            "rows", "heldout_rows", "batch", "segment_rows", "chunk_rows", "parts",
            "calibration_rows",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"harvest.{name}={getattr(self, name)}: at least 1 is needed")
        if self.context < 0 or self.context == 1:
            raise ValueError(f"harvest.context={self.context}: 0 (the model's) or at least 2")

    @property
    def made_as(self) -> str:
        """The dtype of activations before they are stored."""
        return "float32" if self.dtype == "int8" else self.dtype

    @property
    def gradient_dtype(self) -> str:
        """The dtype of gradients, which have no scales of channels."""
        return "bfloat16" if self.dtype == "int8" else self.dtype

    def budget(self, split: str) -> int:
        """Rows of a split, at most."""
        return self.rows if check_split(split) == "train" else self.heldout_rows


def harvest(
    model: Any,
    params: Any,
    source: Any,
    split: str,
    path: str | os.PathLike,
    cfg: Harvest,
    *,
    sites: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    beside: int = 0,
) -> Store:
    """Runs the model over a split of the text and writes what its sites hold.

    Columns: one per site [width], its norm `SITE.norm` (float32), `tokens`, `document`, `position`
    (from the BOS, which is 0), int32, and the source's. Held-out rows of a context follow each
    other, training rows do so with `cfg.shuffle` off; there are none of padding. A store that is
    complete is opened as it is; one that was stopped goes on at its last segment; one that lost
    segments (somebody deleted damaged ones) gets them anew. Of several processes the first writes
    and the others wait for it, or (`cfg.parts` above 1) each writes its share of the parts.

    Args:
      model: has `sites` (name -> width, in the order of computation), `context` and `run`, and
        what `saex.models` says of models that read no bytes or are no JAX programs.
      params: its parameters.
      source: has `documents(split)` and `digest(split)`; if it cuts its contexts itself,
        `chunks(split, context, tokenizer, wanted)` and `token_columns` (name -> dtype).
      split: "train" or "heldout".
      path: of the store: a folder, or a place on an object store (as `StoreWriter` has it).
      cfg: the section.
      sites: sites to harvest, together with those of the section; `SITE.gradient` is one of its
        `gradients`.
      seed: of the order of contexts, so that a small budget is not the first documents only.
      progress: called after each batch.
      beside: bytes that another store, to be made later, will take of the same disk.

    Raises:
      ValueError: a site that the model does not have, a context that is too long, no text, parts
        that the processes cannot share.
      StoreError: as StoreWriter; NaN or infinite activations, a full disk. What was committed
        before is whole.
    """
    cfg = settle(model, cfg, sites)
    _check_processes(cfg)
    shuffled = seed if cfg.shuffle and split == "train" else None
    run = functools.partial(_Run, model, params, cfg, progress=progress, shuffle=shuffled)

    def open_writer(part: tuple[int, int] | None) -> StoreWriter:
        return StoreWriter(
            path, columns, meta, part=part, chunk_rows=cfg.chunk_rows,
            max_buffer_bytes=buffer_bytes(columns, cfg), non_finite=cfg.non_finite,
        )  # fmt: skip

    @functools.cache
    def contexts() -> Contexts:
        return choose(model, source, split, cfg, seed)

    meta = describe(model, params, source, split, cfg, seed)
    columns = columns_of(model, source, cfg)
    if cfg.dtype == "int8":
        sample = functools.partial(_sample, run, contexts)
        columns = with_scales(columns, cfg.sites, path, sample)
    if distributed.is_main() or cfg.parts > 1:
        harvest_room.tell(path, columns, cfg, contexts, beside)
    if cfg.parts > 1 and find_manifest(store_remote.place(path)) is None:
        _write_parts(cfg.parts, open_writer, contexts, run)
        distributed.barrier(f"parts {path}")
        if distributed.is_main():
            merge_parts(path)
    elif distributed.is_main():
        with open_writer(None) as writer:
            if not writer.complete or writer.missing:
                run(contexts(), writer).work()
    distributed.barrier(f"harvest {path}")
    return Store.open(path)


def settle(model: Any, cfg: Harvest, sites: Sequence[str] = ()) -> Harvest:
    """The section with all sites, and the model's context where it names none; checked.

    Raises:
      ValueError: a site that the model does not have, none at all, a context that is too long.
    """
    named, context = dict.fromkeys((*sites, *cfg.sites)), cfg.context or model.context
    gradients = [n.removesuffix(GRADIENT) for n in named if is_gradient(n, model)]
    gradients = tuple(dict.fromkeys((*cfg.gradients, *gradients)))
    sites = tuple(n for n in named if not is_gradient(n, model))
    cfg = dataclasses.replace(cfg, sites=sites, gradients=gradients, context=context)
    _check(model, cfg)
    return cfg


def _sample(run: Callable, contexts: Callable) -> dict[str, np.ndarray]:
    """The first rows of a harvest, by site."""
    work, found, rows = run(contexts(), None), [], 0
    for _, batch in work._batches(0, len(work.contexts)):
        found.append(batch)
        rows += len(batch["tokens"])
        if rows >= work.cfg.calibration_rows:
            break
    return {site: np.concatenate([b[site] for b in found]) for site in work.cfg.sites}


def _write_parts(parts: int, open_writer: Callable, contexts: Callable, run: Callable) -> None:
    """Writes this process's share of the parts, each of them a stretch of the contexts."""
    chosen = contexts()
    ends = [len(chosen) * part // parts for part in range(parts + 1)]
    mine = range(jax.process_index(), parts, jax.process_count())
    rows = {part: int(chosen.lengths[ends[part] : ends[part + 1]].sum()) for part in mine}
    before = 0
    for part in mine:
        with open_writer((part, parts)) as writer:
            if not writer.complete or writer.missing:
                span, told = (ends[part], ends[part + 1]), (before, sum(rows.values()))
                run(chosen, writer, span=span, told=told).work()
        before += rows[part]


def describe(
    model: Any, params: Any, source: Any, split: str, cfg: Harvest, seed: int
) -> dict[str, Any]:
    """What decides the content of the store, as its `meta`: model, text, split, section, seed."""
    section = dataclasses.asdict(cfg)
    rows = {"rows": cfg.budget(split)}  # the other split's budget does not matter to this store
    unused = () if cfg.dtype == "int8" else ("calibration_rows",)
    unused += () if cfg.gradients else ("gradients",)
    for name in ("heldout_rows", "check_room", *unused):
        section.pop(name)
    if cfg.pack:  # other rows than when documents of a context saw each other (pack: true)
        section["pack"] = "documents apart"
    return {
        "kind": "harvest",
        "split": split,
        "seed": seed,
        "harvest": {**section, **rows, "sites": list(cfg.sites)},
        "model": {"name": type(model).__name__, **_fields(model)},
        "params_sha256": digest_of_params(params),
        "source": {"name": type(source).__name__, **_fields(source)},
        "source_sha256": source.digest(split),
    }


def digest_of_params(params: Any) -> str:
    """SHA-256 (hex) over the paths, dtypes, shapes and bytes of a tree of arrays."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class _Run:
    """One process's work on a store, or a span of it; told: (rows before, in all) to be shown."""

    def __init__(
        self, model, params, cfg, contexts, writer, progress, shuffle=None, span=None, told=None
    ):
        self.cfg, self.contexts, self.writer, self.progress = cfg, contexts, writer, progress
        self.params, self.forward = params, make_forward(model, cfg)
        self.compiled = is_compiled(model)
        self.shuffle = shuffle
        self.first, self.end = span or (0, len(contexts))
        self.rows = int(contexts.lengths[self.first : self.end].sum())
        self.before, self.total = told or (0, self.rows)
        self.done, self.started = 0, time.monotonic()

    def work(self) -> None:
        """Does what is to be done: lost segments first, then the rest."""
        for place in list(self.writer.missing):
            self._replace(place)
        if not self.writer.complete:
            self._finish()

    def _replace(self, place: int) -> None:
        """Writes a lost segment anew, from the same contexts in the same batches."""
        before, after = self.writer.span(place)
        start = before.get("context", self.first)
        for _, rows in self._batches(start, after["context"]):
            self._append(rows)
        self.writer.commit(after, replace=place, shuffle=self._key(start))

    def _finish(self) -> None:
        """Writes what is left, segment by segment, and marks the store complete."""
        start = self.writer.cursor.get("context", self.first)
        for end, rows in self._batches(start, self.end):
            self._append(rows)
            if self.writer.buffered >= self.cfg.segment_rows or end == self.end:
                self.writer.commit({"context": end}, shuffle=self._key(start))
                start = end
        self.writer.finish()

    def _key(self, context: int) -> tuple[int, ...] | None:
        """What the order of the rows of the segment that begins at a context depends on."""
        return None if self.shuffle is None else (self.shuffle, context)

    def _append(self, rows: dict[str, np.ndarray]) -> None:
        try:
            self.writer.append(rows)
        except StoreError as err:
            low, high = rows["document"].min(), rows["document"].max()
            raise StoreError(f"harvesting documents {low} to {high}: {err}") from err
        self.done += len(rows["tokens"])
        if self.progress:
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            so_far = min(self.writer.rows + self.writer.buffered, self.rows)
            self.progress(self.before + so_far, self.total, rate)

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        forward = functools.partial(self.forward, self.params)
        return in_batches(self.contexts, (start, stop), self.cfg.batch, forward, self.compiled)


def _check(model: Any, cfg: Harvest) -> None:
    if not cfg.sites:
        raise ValueError(f"harvest.sites is empty; choose from {choices('', model.sites)}")
    for field in ("sites", "gradients"):
        for site in getattr(cfg, field):
            if site not in model.sites:
                names = choices(site, model.sites)
                raise ValueError(f"harvest.{field}: no site {site!r}; choose from {names}")
    if cfg.gradients and not is_compiled(model):
        raise ValueError(
            f"harvest.gradients={cfg.gradients}: only of models that are JAX programs; "
            f"{type(model).__name__} is none"
        )
    if cfg.pack and not keeps_apart(model):
        raise ValueError(
            f"harvest.pack=True: {type(model).__name__} cannot keep the documents of a context "
            "apart (its `run` takes no `positions`); leave pack out: a document is a context then"
        )
    if cfg.context > model.context:
        raise ValueError(
            f"harvest.context={cfg.context}: the model was made for at most {model.context}"
        )


def _check_processes(cfg: Harvest) -> None:
    if cfg.parts > 1 and cfg.parts % jax.process_count():
        raise ValueError(
            f"harvest.parts={cfg.parts} cannot be shared by {jax.process_count()} processes: "
            "use a multiple of their number, or 1 to have the first write alone"
        )


def columns_of(model: Any, source: Any, cfg: Harvest) -> dict[str, Column]:
    """The columns of a harvest."""
    sites = {site: Column((model.sites[site],), cfg.made_as) for site in cfg.sites}
    if cfg.norms:
        sites |= {site + NORM: Column((), "float32") for site in cfg.sites}
    for site in cfg.gradients:
        sites[site + GRADIENT] = Column((model.sites[site],), cfg.gradient_dtype)
    numbers = dict.fromkeys(("tokens", "document", "position"), "int32")
    numbers |= getattr(source, "token_columns", {})
    return {**sites, **{name: Column((), dtype) for name, dtype in numbers.items()}}


def buffer_bytes(columns: Mapping[str, Column], cfg: Harvest) -> int:
    """Bytes that the rows of a segment may take before they are written."""
    rows = cfg.segment_rows + cfg.batch * cfg.context
    return 2 * rows * sum(c.row_bytes for c in with_parts(columns).values())


def _fields(thing: Any) -> dict[str, Any]:
    if hasattr(thing, "describe"):
        return thing.describe()
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return {}
    return dataclasses.asdict(thing)
