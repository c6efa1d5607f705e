import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_cases import SITE

from saex.evals import EVALS, Contexts, controls, evaluate, table
from saex.sae import ReLU, TopK
from saex.sharding import MeshConfig, make_mesh, shardings

WANTED = """fvu l0 mse cosine dead_fraction dense_fraction ce_clean ce_reconstructed
ce_mean_ablated ce_zero_ablated loss_recovered loss_recovered_mean fvu_without_first kl
tokens""".split()


@pytest.fixture(params=[TopK(16, 64, 4), ReLU(16, 64)], ids=["topk", "relu"])
def sae(request):
    return request.param


def with_controls(lm, sae, k=4):
    fitted = controls.fit(lm.rows, sae, jax.random.key(1), k)
    return dataclasses.replace(lm, controls=fitted)


def params_of(sae, lm, key=0):
    x = lm.rows.store.read(SITE)
    return sae.init(jax.random.key(key), {"x": jnp.asarray(x, jnp.float32)})[0]


def test_everything_that_was_promised_is_there(lm, sae):
    out = evaluate(sae, params_of(sae, lm), with_controls(lm, sae))
    assert set(WANTED) <= set(out)
    assert all(np.isfinite(v) and isinstance(v, float) for v in out.values())
    assert json.loads(json.dumps(out)) == out
    for control in ("pca", "untrained", "token_mean"):
        for metric in ("fvu", "cosine", "ce_reconstructed", "ce_increase", "loss_recovered_mean"):
            assert f"{control}.{metric}" in out
    text = table(out)
    widths = {len(line) for line in text.splitlines()[2:6]}
    assert len(widths) == 1 and "per-token mean" in text and "dead latents" in text


@pytest.mark.parametrize(("mesh", "in_context"), [((8, 1), False), ((2, 4), True)])
def test_a_mesh_changes_nothing(lm, sae, mesh, in_context):
    params = params_of(sae, lm)
    alone = evaluate(sae, params, lm)
    mesh = make_mesh(MeshConfig(*mesh))
    spread = jax.device_put(params, shardings(sae.specs()["params"], mesh))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        on_mesh = evaluate(sae, spread, lm)
    assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in alone.items()} == on_mesh


def test_the_table_of_evaluations_has_frozen_dataclasses():
    for cls in EVALS.values():
        assert dataclasses.is_dataclass(cls()) and cls.__dataclass_params__.frozen
        assert callable(cls().run) and cls.__doc__


def test_contexts_are_rebuilt_from_the_store(lm):
    texts = Contexts.of(lm.rows)
    real = np.arange(12)[None] < lm.contexts.lengths[:, None]
    np.testing.assert_array_equal(texts.lengths, lm.contexts.lengths)
    np.testing.assert_array_equal(texts.tokens, np.where(real, lm.contexts.tokens, 0))
    assert dataclasses.replace(lm, contexts=None).text.tokens.shape == (21, 12)


def test_rows_are_left_out_by_any_column(lm):
    """As by position, and in cross-entropy too, where the model then keeps its own activations."""
    held = dataclasses.replace(lm, contexts=None)
    params = params_of(sae := TopK(16, 64, 4), lm)
    one = dataclasses.replace(held, rows=dataclasses.replace(lm.rows, skip_positions=(0, 2)))
    other = dataclasses.replace(held, rows=dataclasses.replace(lm.rows, skip={"position": (0, 2)}))
    assert evaluate(sae, params, one) == evaluate(sae, params, other) != evaluate(sae, params, held)
    assert "position 0, 2" in other.notes()[0]
    with pytest.raises(ValueError, match="no column 'role'"):
        evaluate(sae, params, dataclasses.replace(
            held, rows=dataclasses.replace(lm.rows, skip={"role": (1,)})))  # fmt: skip
