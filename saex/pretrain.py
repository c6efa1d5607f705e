"""Trains a byte language model, the kind of subject model that the package ships.

    saex pretrain --config=experiments/pocket_lm.py --workdir=runs/pocket_lm

Muon for the matrices of the blocks, Adam for the rest, learning rates that warm up, stay and fall
linearly to zero at the last step. A step's batch depends on (seed, step) alone. Stopped runs go on
from their last checkpoint; the same workdir with other `steps` moves the end (and so the fall).
"""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saex import config as configs
from saex import registry
from saex.data import SOURCES
from saex.data.text import Stdlib, chunk
from saex.models.transformer import BOS, Transformer, encode, next_token_nats
from saex.models.weights import FILE_NAME, save_model


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """What is trained, on what, for how long; `steps` is the only one that may change midway."""

    text: Any = registry.section(SOURCES, Stdlib)
    model: Transformer = dataclasses.field(default_factory=Transformer)
    seed: int = 0
    steps: int = 1000
    batch_tokens: int = 8192
    short_context: int = 128  # context of the first `short_share` of the steps, which are cheaper
    short_share: float = 0.5
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.01  # of the Muon matrices
    warmup_steps: int = 50
    decay_share: float = 0.5  # of the steps, at the end
    log_every: int = 10
    checkpoint_every: int = 100
    snapshot_every: int = 500  # weights that are kept
    evaluate_every: int = 250
    evaluate_chunks: int = 512  # held-out contexts of the evaluations before the last


def pretrain(config: Pretrain, workdir: str | os.PathLike) -> dict:
    """Trains to `config.steps`, or goes on where `workdir` stopped; returns the final numbers.

    Writes into workdir: config.json, log.jsonl, state.npz (to go on from), step-N.safetensors
    (snapshots) and model.safetensors.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    train = Corpus(config.text.documents("train"))
    heldout = list(chunk(config.text.documents("heldout"), encode, config.model.context, BOS))
    sample = heldout[:: max(1, len(heldout) // config.evaluate_chunks)]
    print(f"train {len(train.data)} bytes, held out {sum(c.length - 1 for c in heldout)} bytes")
    update = make_update(config)
    params = config.model.init(jax.random.key(config.seed))
    state = params, make_optimizer(config).init(params)
    step, state = load_state(workdir / "state.npz", state)
    (workdir / "config.json").write_text(json.dumps(registry.to_dict(config), indent=1))
    clock = time.perf_counter(), step
    while step < config.steps:
        context = context_at(config, step)
        batch = train.batch(config.seed, step, config.batch_tokens // context, context)
        state, nats = update(state, *batch)
        step += 1
        if step % config.log_every == 0:
            bits = float(nats) / math.log(2)
            now = time.perf_counter(), step
            speed = config.batch_tokens * (step - clock[1]) / (now[0] - clock[0])
            clock = now
            row = {"step": step, "train_bits": bits, "context": context}
            log(workdir, row | {"tokens_per_s": round(speed)})
        if step % config.snapshot_every == 0:
            save_model(workdir / f"step-{step}.safetensors", config.model, state[0], {"step": step})
        if step % config.evaluate_every == 0 and step < config.steps:
            evaluate(config, workdir, step, state[0], sample)
        if step % config.checkpoint_every == 0 or step == config.steps:
            save_state(workdir / "state.npz", step, state)
    final = evaluate(config, workdir, step, state[0], heldout)
    save_model(workdir / FILE_NAME, config.model, state[0], final)
    return final


def context_at(config: Pretrain, step: int) -> int:
    """Context length of a step's batch: short at first, then the model's."""
    short = step < config.short_share * config.steps
    return config.short_context if short else config.model.context


def evaluate(config: Pretrain, workdir: Path, step: int, params, chunks) -> dict:
    """Scores the chunks and logs the row that it returns."""
    bits = bits_per_byte(config.model, params, chunks)
    row = {"step": step, "heldout_bits_per_byte": round(bits, 4), "chunks": len(chunks)}
    log(workdir, row)
    return row


class Corpus:
    """All training documents as one array of bytes, from which batches are drawn."""

    def __init__(self, documents):
        pieces = [encode(d.text) for d in documents]
        self.data = np.concatenate(pieces)
        self.ends = np.cumsum([len(p) for p in pieces])
        self.starts = self.ends - [len(p) for p in pieces]

    def batch(self, seed: int, step: int, rows: int, context: int):
        """(tokens int32 [rows, context] with BOS first, lengths int32 [rows] with BOS counted).

        Windows lie inside of one document each; all of its bytes are about equally likely.
        """
        random = np.random.default_rng([seed, step])
        centre = random.integers(len(self.data), size=rows)
        document = np.searchsorted(self.ends, centre, side="right")
        first, end = self.starts[document], self.ends[document]
        start = np.maximum(np.minimum(centre - context // 2, end - (context - 1)), first)
        columns = start[:, None] + np.arange(context - 1)
        tokens = np.full((rows, context), BOS, np.int32)
        tokens[:, 1:] = self.data[np.minimum(columns, len(self.data) - 1)]
        return tokens, np.minimum(end - start, context - 1).astype(np.int32) + 1


def make_optimizer(config: Pretrain) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, Adam on embeddings, unembedding and norms."""

    def shape(step):  # the schedule's, 0 to 1
        warm = (step + 1) / config.warmup_steps
        left = (config.steps - step) / max(1, config.decay_share * config.steps)
        return jnp.clip(jnp.minimum(warm, left), 0, 1)

    def matrices(params):
        dims = optax.contrib.MuonDimensionNumbers()
        nothing = jax.tree.map(lambda _: None, params)
        return nothing | {
            "blocks": jax.tree.map(lambda x: dims if x.ndim == 2 else None, params["blocks"])
        }

    return optax.contrib.muon(
        lambda step: config.muon_rate * shape(step),
        adam_learning_rate=lambda step: config.adam_rate * shape(step),
        adam_b2=0.95,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=matrices,
    )


@functools.cache
def make_update(config: Pretrain):
    """The jitted step (state, tokens, lengths) -> (state, mean nats per byte); state is donated."""
    optimizer = make_optimizer(config)

    def loss(params, tokens, lengths):
        return total_nats(config.model, params, tokens, lengths) / jnp.sum(lengths - 1)

    def update(state, tokens, lengths):
        params, moments = state
        nats, gradient = jax.value_and_grad(loss)(params, tokens, lengths)
        changes, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), moments), nats

    return jax.jit(update, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def total_nats(model: Transformer, params, tokens, lengths):
    """-log p in nats, summed over the scored tokens: [b, t] without BOS and without padding."""
    nats = next_token_nats(model.run(params, tokens)[0], tokens)
    return jnp.sum(nats * (jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]))


def bits_per_byte(model: Transformer, params, chunks, rows: int = 64) -> float:
    """Mean -log2 p over all bytes of the chunks, each context starting anew at its BOS."""
    chunks = list(chunks)
    total, nats = sum(c.length - 1 for c in chunks), 0.0
    for first in range(0, len(chunks), rows):
        piece = chunks[first : first + rows]
        tokens = np.zeros((rows, len(piece[0].tokens)), np.int32)
        lengths = np.ones(rows, np.int32)
        tokens[: len(piece)] = [c.tokens for c in piece]
        lengths[: len(piece)] = [c.length for c in piece]
        nats += float(total_nats(model, params, tokens, lengths))
    return nats / total / math.log(2)


def save_state(path: Path, step: int, state) -> None:
    """Writes the leaves of `state` and the step; the file before is replaced when all is there."""
    leaves: dict[str, Any] = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, step=step, **leaves)
    os.replace(unfinished, path)


def load_state(path: Path, state) -> tuple[int, tuple]:
    """(step, state) of the last checkpoint, or (0, the state given) where there is none.

    ValueError where the checkpoint's arrays have other shapes.
    """
    if not path.exists():
        return 0, state
    shapes = [x.shape for x in jax.tree.leaves(state)]
    with np.load(path) as file:
        leaves = [jnp.asarray(file[str(i)]) for i in range(len(file.files) - 1)]
        if [x.shape for x in leaves] != shapes:
            raise ValueError(f"{str(path)!r} is of another model: take another --workdir")
        return int(file["step"]), jax.tree.unflatten(jax.tree.structure(state), leaves)


def log(workdir: Path, row: Mapping) -> None:
    """Appends one JSON line to log.jsonl and prints it."""
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    line = json.dumps(row | {"time": round(time.time())})
    with open(workdir / "log.jsonl", "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main_config(
    file: str, overrides: Sequence[tuple[str, str]], workdir: str | os.PathLike | None
) -> dict:
    """`pretrain` for a config file and overrides, as the command line has them.

    Raises ConfigError for what does not resolve to a `Pretrain`, or where there is no workdir.
    """
    config = configs.load(file, overrides, Pretrain)
    if not workdir:
        raise configs.ConfigError("--workdir=DIR is needed: the folder that the run writes into")
    final = pretrain(config, workdir)
    print(f"{workdir}: {FILE_NAME}, held out {final['heldout_bits_per_byte']} bits per byte")
    return final
