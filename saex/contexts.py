"""The contexts of a text in the order of a harvest, and what a model's sites hold there."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from saex.data import joined
from saex.data.exclude import NORM
from saex.data.order import permutation
from saex.data.text import Chunk, Document, chunk
from saex.models import gradients
from saex.models.tokenizer import Bytes
from saex.registry import ConfigError, choices

if TYPE_CHECKING:
    from saex.harvest import Harvest

CHARACTERS = 16  # more than tokens have, in the mean of any language
GRADIENT = ".gradient"  # what the name of a site's gradient ends with
STRIDE = 64  # lengths that models see which are not compiled are multiples of it


@dataclass(frozen=True)
class Contexts:
    """The contexts of a harvest, in its order, without padding: many may be short.

    Attributes:
      context: tokens of a full one.
      tokens: [tokens] int32, of one context behind the other.
      lengths: [contexts] int64, tokens of each.
      documents: [contexts] int32, number of the document in the split.
      columns: [tokens] each, what else the source says of the tokens.
      padding: what a model reads beyond a context's tokens; -1 where gradients are harvested.
    """

    context: int
    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    padding: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """[contexts + 1] int64: where each context begins among the tokens, and the last ends."""
        return np.append(0, np.cumsum(self.lengths))

    def part(self, begin: int, end: int) -> slice:
        """Where the tokens of some contexts are."""
        return slice(int(self.starts[begin]), int(self.starts[end]))

    def real(self, begin: int, end: int, width: int) -> np.ndarray:
        """[end - begin, width] bool: which positions have a token."""
        return np.arange(width) < self.lengths[begin:end, None]

    def padded(
        self, values: np.ndarray, begin: int, end: int, width: int, fill: int = 0
    ) -> np.ndarray:
        """[end - begin, width] `values` of some contexts' tokens, `fill` where there is none."""
        out = np.full((end - begin, width), fill, values.dtype)
        out[self.real(begin, end, width)] = values[self.part(begin, end)]
        return out

    def taken(self, order: np.ndarray) -> Contexts:
        """The contexts of these numbers."""
        lengths = self.lengths[order]
        shift = self.starts[:-1][order] - (np.cumsum(lengths) - lengths)
        where = np.arange(lengths.sum()) + np.repeat(shift, lengths)
        columns = {n: x[where] for n, x in self.columns.items()}
        return dataclasses.replace(
            self, tokens=self.tokens[where], lengths=lengths, documents=self.documents[order],
            columns=columns,
        )  # fmt: skip


def choose(model: Any, source: Any, split: str, cfg: Harvest, seed: int) -> Contexts:
    """As many whole contexts of a split as fit the budget of rows, in a random order.

    Raises:
      ValueError: no text.
    """
    tokenizer, wanted = getattr(model, "tokenizer", Bytes), None
    itself = hasattr(source, "chunks")  # whether the source cuts its contexts itself
    if tokenizer is not Bytes:
        most = CHARACTERS * cfg.context if itself else None
        wanted = enough(source.documents(split), cfg.budget(split), most, seed)

    def cut() -> Iterable[Chunk]:
        if itself:
            return source.chunks(split, cfg.context, tokenizer, wanted)
        documents = (
            d if wanted is None or i in wanted else Document(d.name, "")
            for i, d in enumerate(source.documents(split))
        )  # fmt: skip
        return chunk(documents, tokenizer.encode, cfg.context, tokenizer.bos)

    # Bytes are cut twice rather than kept: a text may be much larger than what is chosen of it.
    pieces: list[Chunk] | Callable[[], Iterable[Chunk]] = cut
    if cfg.pack:
        pieces = packed(map(_without_padding, cut()), cfg.context)
    elif tokenizer is not Bytes or itself:
        pieces = list(map(_without_padding, cut()))
    chosen = _choose(pieces, cfg.budget(split), seed, cfg.context)
    if cfg.gradients:  # whose loss must know what is padding
        chosen = dataclasses.replace(chosen, padding=-1)
    return chosen if is_compiled(model) else alike(chosen, cfg.batch, seed)


def enough(
    documents: Iterable[Document], budget: int, most: int | None, seed: int
) -> set[int] | None:
    """Numbers of documents, drawn at random, that surely hold the budget of tokens; None: all.

    Of a text that is much larger than the budget, only so much is put into tokens, which takes
    longer than to read it. most: characters of a document that can become tokens; None: all.
    """
    sizes = np.array([min(len(d.text), most or len(d.text)) for d in documents], np.int64)
    if sizes.sum() <= CHARACTERS * budget:
        return None
    order = permutation(len(sizes), seed, 1)
    count = int(np.searchsorted(np.cumsum(sizes[order]), CHARACTERS * budget)) + 1
    return set(order[:count].tolist())


def packed(pieces: Iterable[Chunk], context: int) -> list[Chunk]:
    """Short contexts put one behind the other, none of them cut, until no other one has room.

    Each keeps its BOS. Columns `document` and `position` say whose each token is, and its place
    there; padding has position 0. A `position` tells a model where the next document begins.
    """
    parts, inside = list(pieces), []
    for number, at in zip(_bins([p.length for p in parts], context), range(len(parts))):
        inside += [[]] if number == len(inside) else []
        inside[number].append(parts[at])
    return [_joined(some, context) for some in inside]


def _bins(lengths: Iterable[int], context: int) -> Iterator[int]:
    """Which context each piece goes into: the fullest one that has room, or a new one."""
    rooms: list[tuple[int, int]] = []  # (tokens of room, number), rising
    made = 0
    for length in lengths:
        at = bisect.bisect_left(rooms, (length, 0))
        room, number = rooms.pop(at) if at < len(rooms) else (context, made)
        made = max(made, number + 1)
        if room > length:
            bisect.insort(rooms, (room - length, number))
        yield number


def _joined(parts: list[Chunk], context: int) -> Chunk:
    """One context of several pieces that have room in it."""
    lengths = [p.length for p in parts]
    columns = {
        "tokens": np.concatenate([p.tokens[: p.length] for p in parts]),
        "document": np.repeat(np.array([p.document for p in parts], np.int32), lengths),
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        **{n: np.concatenate([p.columns[n][: p.length] for p in parts]) for n in parts[0].columns},
    }
    full = {n: np.pad(x, (0, context - sum(lengths))) for n, x in columns.items()}
    return Chunk(full.pop("tokens"), sum(lengths), parts[0].document, 0, full)


def alike(contexts: Contexts, batch: int, seed: int) -> Contexts:
    """Contexts in an order in which those of a batch are of like length: less padding.

    Among each 64 batches they are sorted; whole batches then follow each other at random.
    """
    order = [np.zeros(0, np.int64)]
    for start in range(0, len(contexts), 64 * batch):
        ids = np.argsort(contexts.lengths[start : start + 64 * batch], kind="stable") + start
        whole = ids[: len(ids) // batch * batch].reshape(-1, batch)
        order += [whole[permutation(len(whole), seed, start)].reshape(-1), ids[whole.size :]]
    return contexts.taken(np.concatenate(order))


def tokens_of(contexts: Contexts, begin: int, end: int, batch: int, compiled: bool) -> np.ndarray:
    """What a model reads: [batch, context] int32, filled up, so that nothing is compiled anew.

    A model that is not compiled is spared contexts that are none, and most positions at which there
    is padding only.
    """
    width = contexts.context
    if not compiled:
        longest = int(contexts.lengths[begin:end].max())
        width = min(width, -(-longest // STRIDE) * STRIDE)
    tokens = contexts.padded(contexts.tokens, begin, end, width, contexts.padding)
    return np.pad(tokens, ((0, batch - len(tokens)), (0, 0))) if compiled else tokens


def inputs_of(
    contexts: Contexts, begin: int, end: int, batch: int, compiled: bool
) -> tuple[np.ndarray, ...]:
    """(tokens,), and the positions [batch, context] int32 of what is packed."""
    tokens = tokens_of(contexts, begin, end, batch, compiled)
    if "position" not in contexts.columns:
        return (tokens,)
    positions = contexts.padded(contexts.columns["position"], begin, end, tokens.shape[1])
    return tokens, np.pad(positions, ((0, len(tokens) - len(positions)), (0, 0)))


def rows_of(
    contexts: Contexts, begin: int, end: int, acts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Columns of the positions that count, context by context, [rows, *shape] each.

    Args:
      contexts: all of them.
      begin, end: which.
      acts: {column: [at least end - begin, at least the longest's length, *shape]}.
    """
    lengths, part = contexts.lengths[begin:end], contexts.part(begin, end)
    longest = int(lengths.max())
    counts = np.flatnonzero(contexts.real(begin, end, longest).reshape(-1))
    found = {name: np.asarray(x)[: end - begin, :longest] for name, x in acts.items()}
    return {
        "tokens": contexts.tokens[part],
        "document": np.repeat(contexts.documents[begin:end], lengths),
        "position": (counts % longest).astype(np.int32),
        **{name: x[part] for name, x in contexts.columns.items()},
        **{name: x.reshape(-1, *x.shape[2:])[counts] for name, x in found.items()},
    }


def in_batches(
    contexts: Contexts,
    span: tuple[int, int],
    batch: int,
    forward: Callable[..., Mapping[str, Any]],
    compiled: bool,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(index after a batch, its rows) for the contexts of a span. forward: of `inputs_of`.

    Another thread makes them, up to four ahead, so that the model computes while they are written.
    """

    def passes() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        running = None  # a device computes one batch while the rows of the one before are taken
        for begin in range(*span, batch):
            end = min(begin + batch, span[1])
            acts = forward(*inputs_of(contexts, begin, end, batch, compiled))
            if running:
                yield running[1], rows_of(contexts, *running)
            running = (begin, end, acts)
        if running:
            yield running[1], rows_of(contexts, *running)

    source, pool = passes(), ThreadPoolExecutor(1, thread_name_prefix="saex-subject")
    try:
        coming = deque(pool.submit(next, source, None) for _ in range(4))
        while (made := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, source, None))
            yield made
    finally:  # a writer that fails waits for the pass under way, not for those behind it
        pool.shutdown(cancel_futures=True)


def is_gradient(name: str, model: Any) -> bool:
    """Whether a column's name says the gradient at one of the model's sites."""
    return name.endswith(GRADIENT) and name.removesuffix(GRADIENT) in model.sites


def sites_of(config: Any, model: Any) -> tuple[str, ...]:
    """The sites of the subject model that the dictionary's columns are made of.

    Other columns than x may be those that the text comes with: its own, tokens, position, document.

    Raises:
      ConfigError: a column that neither the model nor the text has.
    """
    of_text = {"tokens", "document", "position", *getattr(config.text, "token_columns", {})}
    named = []
    for name, column in config.reads.items():
        if name != "x" and column in of_text:
            continue
        for part in joined.parts(column):
            if part not in model.sites and not is_gradient(part, model):
                where = "site" if name == "x" else f"columns[{name!r}]"
                raise ConfigError(
                    f"config.{where}={part!r}: choose from {choices(part, model.sites)}"
                )
            named.append(part)
    return tuple(dict.fromkeys(named))


def make_forward(model: Any, cfg: Harvest) -> Callable:
    """(params, tokens [batch, context]) -> {site: [batch, context, width]} of `cfg.made_as`.

    With `cfg.gradients` tokens are as `choose` gives them then: padding is -1. With `cfg.pack`
    positions [batch, context] follow.
    """
    last = max(cfg.sites, key=list(model.sites).index)

    @jax.jit
    def stored(acts):
        out = {site: acts[site].astype(cfg.made_as) for site in cfg.sites}
        norms = {site + NORM: _norm(x) for site, x in out.items()} if cfg.norms else {}
        return {**out, **norms}

    def with_gradients(params, tokens, positions=None):
        tokenizer, real = getattr(model, "tokenizer", Bytes), jnp.asarray(tokens)
        counted = (real >= 0) & (real != tokenizer.bos)
        if positions is not None:
            counted &= jnp.asarray(positions) > 0
        where = counted, cfg.gradients, cfg.sites, positions
        grads, acts = gradients.at_sites(model, params, jnp.maximum(real, 0), *where)
        named = {site + GRADIENT: g.astype(cfg.gradient_dtype) for site, g in grads.items()}
        return {**stored(acts), **named}

    def forward(params, tokens, positions=None):
        if cfg.gradients:
            return with_gradients(params, tokens, positions)
        where = {} if positions is None else {"positions": positions}
        return stored(model.run(params, tokens, taps=cfg.sites, stop_at=last, **where)[1])

    return jax.jit(forward) if is_compiled(model) else forward


def is_compiled(model: Any) -> bool:
    """Whether the model's forward pass is a JAX program; else it is run as it is."""
    return getattr(model, "traceable", True)


def keeps_apart(model: Any) -> bool:
    """Whether the model can read several documents in a context as if each were alone."""
    return "positions" in inspect.signature(model.run).parameters


def _norm(x: jax.Array) -> jax.Array:
    """Norms over the last axis, float32, of what is stored."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _without_padding(piece: Chunk) -> Chunk:
    """Copies, so that what is behind them is not kept."""
    columns = {n: x[: piece.length].copy() for n, x in piece.columns.items()}
    return dataclasses.replace(piece, tokens=piece.tokens[: piece.length].copy(), columns=columns)


def _choose(
    pieces: list[Chunk] | Callable[[], Iterable[Chunk]], budget: int, seed: int, context: int
) -> Contexts:
    """As many whole contexts as fit the budget of rows, in a random order.

    pieces: all there are, or what makes them, to be called twice.
    """
    made = pieces() if callable(pieces) else pieces
    lengths = np.fromiter((p.length for p in made), np.int64)
    if not len(lengths):
        raise ValueError("the text has no tokens in this split: give a source with more documents")
    order = permutation(len(lengths), seed)
    fits = int(np.searchsorted(np.cumsum(lengths[order]), budget, side="right"))
    order = order[: max(1, fits)]
    if callable(pieces):
        wanted = set(order.tolist())
        kept = {i: _without_padding(p) for i, p in enumerate(pieces()) if i in wanted}
    else:
        kept = pieces
    chosen = [kept[i] for i in order]

    def in_a_row(of: Callable[[Chunk], np.ndarray]) -> np.ndarray:
        return np.concatenate([of(p)[: p.length] for p in chosen])

    return Contexts(
        context,
        tokens=in_a_row(lambda p: p.tokens),
        lengths=lengths[order],
        documents=np.array([p.document for p in chosen], np.int32),
        columns={n: in_a_row(lambda p, n=n: p.columns[n]) for n in chosen[0].columns},
    )
