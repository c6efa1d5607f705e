"""Gradients at a site: what is stored is what moves the model's loss, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.config import resolve
from saex.contexts import make_forward
from saex.data.store import Store
from saex.data.text import Document
from saex.harvest import Harvest, columns_of, harvest, settle
from saex.models import Edit, Transformer
from saex.models.transformer import BOS
from saex.sae import GradientTopK

SITE = "blocks.0.resid_post"
MODEL = Transformer(d_model=16, n_layers=2, n_heads=2, d_mlp=32, context=12)
CFG = Harvest(
    sites=(SITE,), gradients=(SITE,), rows=300, heldout_rows=100, batch=4, dtype="float32",
    segment_rows=100, chunk_rows=16, shuffle=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Letters:
    """Documents of unequal lengths, so that contexts are padded; a zero byte is no padding."""

    def documents(self, split):
        for i in range(20):
            yield Document(f"{split}-{i}", f"{split} {i} \0abc" + "xyz" * (i % 5))

    def digest(self, split):
        return split


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(0))
    draw = jax.random.normal(jax.random.key(1), params["unembed"].shape)
    return {**params, "unembed": 0.3 * draw}


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "packed"])
def store(request, params, tmp_path_factory):
    cfg = dataclasses.replace(CFG, pack=request.param)
    return harvest(MODEL, params, Letters(), "train", tmp_path_factory.mktemp("store"), cfg)


def nats(params, tokens, at=None, delta=None):
    """Summed loss of one context without padding, BOS not predicted; float."""
    edits = {}
    if delta is not None:
        move = jnp.zeros((1, len(tokens), 16)).at[0, at].set(delta)
        edits = {SITE: Edit(jnp.add, (move,))}
    logits, _ = MODEL.run(params, np.asarray(tokens)[None], edits=edits)
    log_p = jax.nn.log_softmax(np.asarray(logits[0], np.float64))
    return -sum(log_p[i, t] for i, t in enumerate(tokens[1:]) if t != BOS)


def test_a_stored_gradient_is_the_slope_of_the_loss(store, params):
    """Along random directions, at rows of several contexts, recomputed from the tokens alone."""
    read = {n: store.read(n, 0, store.rows) for n in ("tokens", "position", SITE + ".gradient")}
    starts = np.flatnonzero(read["position"] == 0)
    ends = [*starts[1:], store.rows]
    draw = np.random.default_rng(0)
    for context in (0, 3, len(starts) - 1):
        tokens = read["tokens"][starts[context] : ends[context]]
        for at in (1, len(tokens) // 2, len(tokens) - 2):
            v = jnp.asarray(draw.normal(size=16), jnp.float32)
            up, down = (nats(params, tokens, at, s * v) for s in (2e-3, -2e-3))
            stored = read[SITE + ".gradient"][starts[context] + at]
            slope = float(up - down) / 4e-3
            np.testing.assert_allclose(stored @ np.asarray(v), slope, rtol=0.01, atol=0.02)


def test_the_last_token_of_a_context_moves_nothing(store):
    position = store.read("position", 0, store.rows)
    last = np.append(position[1:] == 0, True)
    g = store.read(SITE + ".gradient", 0, store.rows)
    assert not g[last].any() and (np.abs(g[~last & (position > 0)]).max(1) > 0).mean() > 0.8


def test_activations_are_those_of_a_harvest_without_gradients(store, params, tmp_path):
    pack = store.meta["harvest"]["pack"] == "documents apart"
    cfg = dataclasses.replace(CFG, gradients=(), pack=pack)
    plain = harvest(MODEL, params, Letters(), "train", tmp_path, cfg)
    assert SITE + ".gradient" not in plain.columns and "gradients" not in plain.meta["harvest"]
    for name in (SITE, "tokens", "document"):
        one, other = (s.read(name, 0, s.rows) for s in (store, plain))
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_column_of_that_name_asks_for_it():
    cfg = settle(MODEL, Harvest(dtype="int8"), (SITE, SITE + ".gradient"))
    assert cfg.sites == cfg.gradients == (SITE,)
    assert columns_of(MODEL, Letters(), cfg)[SITE + ".gradient"].dtype == "bfloat16"


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"harvest.gradients: no site 'blocks.9"):
        settle(MODEL, dataclasses.replace(CFG, gradients=("blocks.9.resid_post",)))

    class Foreign(Transformer):
        traceable = False

    class Plain:
        sites, context = MODEL.sites, 12

        def run(self, params, tokens, taps=(), edits=None, stop_at=None): ...

    with pytest.raises(ValueError, match=r"harvest.pack=True: Plain cannot keep .* leave pack out"):
        settle(Plain(), dataclasses.replace(CFG, gradients=(), pack=True))
    with pytest.raises(ValueError, match="JAX programs"):
        settle(Foreign(d_model=16, n_layers=1, n_heads=2), CFG)


def test_a_batch_is_filled_up_without_effect(params):
    """Contexts of a batch do not know each other, nor how far they are padded."""
    forward = make_forward(MODEL, settle(MODEL, CFG))
    tokens = np.full((4, 12), -1, np.int32)
    tokens[0, :7] = [BOS, *b"abcdef"]
    tokens[1] = [BOS, *b"0123456789x"]
    both = forward(params, tokens)[SITE + ".gradient"]
    alone = forward(params, np.concatenate([tokens[:1], np.zeros((3, 12), np.int32)]))
    np.testing.assert_allclose(both[0], alone[SITE + ".gradient"][0], atol=1e-6)
    assert not np.asarray(both[0, 6:]).any()


def test_packed_documents_are_as_if_each_were_alone(params, tmp_path):
    """Activations and gradients of every piece of every document, whatever stands before it."""
    cfg = dataclasses.replace(CFG, rows=10**6)
    alone, packed = (
        pieces(harvest(MODEL, params, Letters(), "train", tmp_path / str(pack),
                       dataclasses.replace(cfg, pack=pack)))
        for pack in (False, True)
    )  # fmt: skip
    assert alone.keys() == packed.keys() and len(alone) > 20
    for key, rows in alone.items():
        np.testing.assert_allclose(rows, packed[key], atol=2e-5)
    contexts = Store.open(tmp_path / "True").manifest.cursor["context"]
    assert contexts < Store.open(tmp_path / "False").manifest.cursor["context"], "nothing is packed"


def pieces(store):
    """{(document, its tokens): activations beside gradients}, by runs of positions."""
    starts = np.flatnonzero(store.read("position") == 0)
    rows = np.concatenate([store.read(SITE), store.read(SITE + ".gradient")], axis=1)
    tokens, document = store.read("tokens"), store.read("document")
    spans = zip(starts, [*starts[1:], store.rows])
    return {(int(document[a]), tokens[a:b].tobytes()): rows[a:b] for a, b in spans}


def test_the_method_reads_it_by_name():
    config = resolve(
        {
            "sae": {"name": "gradient_topk", "d_in": 16, "n": 32, "k": 4},
            "site": SITE,
            "columns": {"gradient": SITE + ".gradient"},
            "steps": 2,
        }
    )
    assert isinstance(config.sae, GradientTopK)
    assert config.reads == {"x": SITE, "gradient": SITE + ".gradient"}
