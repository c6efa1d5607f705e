"""docs/add-a-dictionary.md walks through a file of the package, and what it says of it holds."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from saex.checkpoint import Checkpointer, load_sae
from saex.config import resolve, run_hash, to_json
from saex.sae import SAES, AbsTopK
from saex.sharding import MeshConfig, make_mesh
from saex.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-dictionary.md").read_text()
D, N, K = 16, 64, 4


def test_the_page_shows_the_file_as_it_is():
    (code,) = re.findall(r'```python title="saex/sae/abs_topk.py"\n(.*?)```', PAGE, re.S)
    assert code == (ROOT / "saex" / "sae" / "abs_topk.py").read_text()


def test_the_page_shows_lines_of_the_table():
    (table,) = re.findall(r"SAES: dict\[str, type\] = \{\n(.*?)\}", PAGE, re.S)
    shown = dict(re.findall(r'"(\w+)": (\w+),', table))
    assert shown["abs_topk"] == "AbsTopK"
    assert {name: SAES[name].__name__ for name in shown} == shown


def test_the_page_shows_a_section_that_resolves():
    (section,) = re.findall(r'^"sae": (\{.*\}),$', PAGE, re.M)
    config = resolve({"sae": eval(section), "steps": 10})
    assert config.sae == AbsTopK(256, 2048, 25)


def test_it_is_saved_and_loaded_by_name(tmp_path):
    section = {"name": "abs_topk", "d_in": D, "n": N, "k": K}
    config = resolve({"sae": section, "steps": 10})
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        sample = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(64, D)), jnp.float32)}
        tx = config.optim.transformation()
        state = init_state(config.sae, tx, jax.random.key(0), sample, mesh, "tp")
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(state, to_json(config), run_hash(config), {"step": 0})
        checkpointer.close()
    sae, params = load_sae(tmp_path)
    assert sae == AbsTopK(D, N, K)
    np.testing.assert_array_equal(params["W_enc"], state.params["W_enc"])
