"""Every method comes back from a checkpoint: the same dictionary, the same codes bit by bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex import config
from saex.checkpoint import Checkpointer, load_sae
from saex.sae import SAES
from saex.train.state import TrainState
from tests.sae import toy
from tests.sae.small import small

# Fields of which JSON keeps no tuple and no whole number: those need care on the way back.
ODD = {
    "matryoshka": {"fractions": (0.25, 0.75), "capacity": None},
    "crosscoder": {"widths": (10, 6)},
    "msae": {"levels": (1, 3), "whole": False},
    "variational": {"variance": "fixed"},
    "skip_transcoder": {"skip": False},
}


@pytest.mark.parametrize("name", sorted(SAES))
def test_a_checkpoint_gives_the_method_back(tmp_path, name):
    sae = small(name, **ODD.get(name, {}))
    x = 3 * toy.batch(toy.directions(40, sae.d_in), 64, 3, 1) + 0.5
    params, stats = jax.jit(sae.init)(jax.random.key(0), toy.columns(sae, x, 0))
    rng = np.random.default_rng(0)
    params = {
        k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) * (v.ndim > 0)
        for k, v in params.items()
    }
    whole = config.Config(sae=sae, steps=10, store="rows")
    said = json.loads(json.dumps(config.to_json(whole)))
    state = TrainState(step=jnp.int32(3), params=params, opt_state={}, stats=stats)
    saver = Checkpointer(tmp_path)
    saver.save(state, said, "hash", {"step": 3})
    saver.wait()
    saver.close()
    again, loaded = load_sae(tmp_path)
    assert again == sae and hash(again) == hash(sae)
    assert {k: type(getattr(again, k)) for k in sae.__dataclass_fields__} == {
        k: type(getattr(sae, k)) for k in sae.__dataclass_fields__
    }
    assert set(loaded) == set(params)
    for key in params:
        np.testing.assert_array_equal(loaded[key], params[key])
    one, two = (np.asarray(s.encode(p, x).dense(s.n)) for s, p in ((sae, params), (again, loaded)))
    np.testing.assert_array_equal(one, two)
    assert one.any()
