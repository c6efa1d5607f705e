"""Ground truth: data made of known features; a trained SAE must find them.

128 independent features in 64 dimensions, 3 active in each row (methods of SynthSAEBench, in
small). The only tests that notice an SAE which trains well and learns the wrong thing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

FEATURES, D, ACTIVE, STEPS, ROWS = 128, 64, 3, 300, 1024


class EncoderStopped(TopK):
    """The control: what is left when nothing trains the encoder."""

    def loss(self, params, *args):
        constant = {k: jax.lax.stop_gradient(params[k]) for k in ("W_enc", "b_enc")}
        return super().loss({**params, **constant}, *args)


def best_cosines(W_dec, truth):
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    return unit @ truth.T  # [n, features]; signed: a negative latent is of no use


def trained(cls, n, seed):
    truth = toy.directions(FEATURES, D, seed)
    sae = cls(D, n, ACTIVE, dead_after_tokens=20 * ROWS)
    params, _ = toy.fit(
        sae,
        lambda i: toy.batch(truth, ROWS, ACTIVE, i + seed * 10**7),
        Optim(lr=1e-2),
        make_mesh(MeshConfig()),
        STEPS,
        seed=seed,
    )
    start, _ = sae.init(
        jax.random.fold_in(jax.random.key(seed), 1),
        {"x": jnp.asarray(toy.batch(truth, ROWS, ACTIVE, 1))},
    )
    return best_cosines(params["W_dec"], truth), best_cosines(np.asarray(start["W_dec"]), truth)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_topk_recovers_the_features(seed):
    cosines, at_start = trained(TopK, 256, seed)
    found = np.mean(cosines.max(axis=0) >= 0.95)
    print(f"seed {seed}: n=256 finds {found:.3f}, at init {np.mean(at_start.max(0) >= 0.95):.3f}")
    assert found >= 0.95


def test_with_the_encoder_stopped_nothing_is_recovered():
    cosines, _ = trained(EncoderStopped, 256, 0)
    assert np.mean(cosines.max(axis=0) >= 0.95) < 0.5


@pytest.mark.slow
def test_print_recovery_and_precision_at_n_equal_to_the_features():
    cosines, _ = trained(TopK, FEATURES, 0)
    found = np.mean(cosines.max(axis=0) >= 0.95)
    precise = np.mean(cosines.max(axis=1) >= 0.95)
    print(f"n=128: recovery {found:.3f}, precision {precise:.3f}")
    assert found > 0.5
