"""A stand-in subject model and a text of letters: what tests of live sources share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.data.stream import Stream
from saex.harvest import Harvest, harvest
from saex.live import Live, open_rows

CONTEXT, BATCH = 12, 4
SITES = ("early", "late")
LIVE, TEE = Live(enabled=True), Live(enabled=True, tee=True)
STREAM = Stream(batch=16, window=4, lanes=2)
CFG = Harvest(rows=10_000, batch=BATCH, segment_rows=100, chunk_rows=16, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Toy:
    """A stand-in subject model. `late` is computed after `early`; a letter may be poison."""

    context: int = CONTEXT
    nan_token: int = -1

    @property
    def sites(self):
        return {"early": 8, "late": 4, "never": 4}

    def run(self, params, tokens, taps=(), edits=None, stop_at=None):
        assert tokens.shape == (BATCH, self.context)
        mixed = jnp.cumsum(params["embed"][tokens], axis=1)
        early = jnp.sin(mixed)
        late = jnp.where((tokens == self.nan_token)[..., None], jnp.nan, jnp.cos(early[..., :4]))
        acts = {"early": early, "late": late}
        return None, {site: acts[site] for site in taps}


@dataclasses.dataclass(frozen=True)
class Letters:
    def documents(self, split):
        from saex.data.text import Document

        for i in range(100):  # each is one context
            yield Document(f"{split}-{i}", f"{i}" + "nopqrstuvwxyz"[: 2 + i % 7])

    def digest(self, split):
        return split


MODEL = Toy()
PARAMS = {"embed": jax.random.normal(jax.random.key(0), (257, 8))}


def rows_of(tmp_path, cfg=CFG, live=LIVE, model=MODEL, sites=SITES, **kwargs):
    return open_rows(model, PARAMS, Letters(), tmp_path, cfg, live, sites=sites, **kwargs)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same rows, harvested; about 25 chunks of 4 contexts."""
    cfg = dataclasses.replace(CFG, shuffle=False)
    path = tmp_path_factory.mktemp("stored") / "store"
    return harvest(Toy(), PARAMS, Letters(), "train", path, cfg, sites=SITES)


@pytest.fixture
def opened():
    streams = []

    def open_stream(rows, config=STREAM, columns=("early", "document", "position", "tokens"), **kw):
        streams.append(config.open(rows, columns, kw.pop("seed", 0), **kw))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


def contents(store):
    """Every row of a store as bytes of all its columns, sorted."""
    columns = [store.read(name).reshape(store.rows, -1) for name in sorted(store.columns)]
    return sorted(b"".join(c[i].tobytes() for c in columns) for i in range(store.rows))
