"""The method that docs/add-a-dictionary.md adds works as the page says."""

import importlib.util
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.checkpoint import Checkpointer, load_sae
from saex.config import resolve, run_hash, to_json
from saex.sae import SAES
from saex.sharding import MeshConfig, make_mesh, shardings
from saex.train.optim import Optim
from saex.train.state import init_state
from tests.sae import test_all, toy

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "add-a-dictionary.md"
D, N, K = 16, 64, 4
CONFORMANCE = [
    test_all.test_specs_say_what_init_makes,
    test_all.test_a_dictionary_is_hashable_and_owns_no_arrays,
    test_all.test_codes_are_canonical,
    test_all.test_inference_is_per_row,
    test_all.test_decode_is_affine_in_the_codes,
    test_all.test_folding_the_scale_changes_nothing,
    test_all.test_gradients_match_finite_differences,
]


@pytest.fixture(scope="module")
def abs_topk(tmp_path_factory):
    """The class of the page's file, registered as the page says."""
    (code,) = re.findall(
        r'```python title="saex/sae/abs_topk.py"\n(.*?)```', PAGE.read_text(), re.S
    )
    path = tmp_path_factory.mktemp("page") / "abs_topk.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("saex_docs_abs_topk", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        patch.setitem(SAES, "abs_topk", module.AbsTopK)
        yield module.AbsTopK


def rows(seed, count=256):
    """Signed sparse sums: both poles of each direction occur."""
    truth = toy.directions(24, D)
    return toy.batch(truth, count, 2, seed) - toy.batch(truth, count, 2, seed + 10**6) + 0.2


def trained(cls, mesh):
    return toy.fit(cls(D, N, K), rows, Optim(lr=3e-3), make_mesh(mesh), 30)


@pytest.fixture(scope="module")
def one(abs_topk):
    return trained(abs_topk, MeshConfig())


def test_it_learns(one):
    _, history = one
    assert history[-1]["fvu"] < 0.7 * history[0]["fvu"]
    assert history[-1]["l0"] == K


def test_it_is_the_same_on_eight_devices(abs_topk, one):
    _, sharded = trained(abs_topk, MeshConfig(data=2, model=4))
    losses = [[m["loss"] for m in history[:20]] for history in (one[1], sharded)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("k", [K, 12])
def test_codes_are_the_same_on_eight_devices(abs_topk, one, k):
    """Also where a device has fewer latents (8) than are to be chosen."""
    sae, x = abs_topk(D, N, k), rows(79, 32)
    mesh = make_mesh(MeshConfig(data=1, model=8))
    where = shardings(sae.specs()["params"], mesh)
    split = {name: jax.device_put(value, where[name]) for name, value in one[0].items()}
    codes, whole = jax.device_get(sae.encode(split, x)), sae.encode(one[0], x)
    assert codes.values.shape == whole.values.shape == (32, k)
    np.testing.assert_allclose(codes.dense(N), whole.dense(N), atol=1e-6)
    np.testing.assert_allclose(sae.decode(split, codes), sae.decode(one[0], whole), atol=1e-5)


@pytest.mark.parametrize("check", CONFORMANCE, ids=lambda check: check.__name__)
def test_it_does_what_every_row_of_the_table_does(abs_topk, check):
    sae = abs_topk(d_in=test_all.D, n=test_all.N, k=K)
    params, _ = sae.init(jax.random.key(0), {"x": jnp.asarray(test_all.batch(0))})
    given = {"sae": sae, "params": params}
    check(**{name: given[name] for name in inspect.signature(check).parameters})


def test_codes_are_the_k_largest_by_size_with_their_signs(abs_topk, one):
    params, x = one[0], rows(77, 32)
    p = (x * params["scale"] - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    f = np.asarray(abs_topk(D, N, K).encode(params, x).dense(N))
    assert ((f != 0).sum(1) == K).all() and (f < 0).any()
    np.testing.assert_allclose(f[f != 0], p[f != 0], atol=1e-5)
    cut = np.sort(np.abs(p), axis=1)[:, -K]
    assert (np.abs(p)[f == 0] <= np.broadcast_to(cut[:, None], p.shape)[f == 0] + 1e-6).all()


def test_without_biases_it_is_odd(abs_topk, one):
    params = {k: v * 0 if k.startswith("b_") else v for k, v in one[0].items()}
    sae, x = abs_topk(D, N, K), rows(78, 32)
    plus, minus = (sae.encode(params, sign * x).dense(N) for sign in (1, -1))
    np.testing.assert_allclose(minus, -plus, atol=1e-6)


def test_it_is_configured_saved_and_loaded_by_name(abs_topk, tmp_path):
    section = {"name": "abs_topk", "d_in": D, "n": N, "k": K}
    config = resolve({"sae": section, "steps": 10})
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        sample = {"x": jnp.asarray(rows(1))}
        tx = config.optim.transformation()
        state = init_state(config.sae, tx, jax.random.key(0), sample, mesh, "tp")
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(state, to_json(config), run_hash(config), {"step": 0})
        checkpointer.close()
    sae, params = load_sae(tmp_path)
    assert sae == abs_topk(D, N, K)
    np.testing.assert_array_equal(params["W_enc"], state.params["W_enc"])


def test_too_large_a_k_is_refused(abs_topk):
    with pytest.raises(ValueError, match="k=9 active of n=8"):
        abs_topk(4, 8, 9)
