"""README's Python example runs against a checkpoint of the quickstart's shape."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from saex.checkpoint import Checkpointer
from saex.config import load, run_hash, to_json
from saex.sharding import MeshConfig, make_mesh
from saex.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    config = load(str(ROOT / "experiments" / "quickstart.py"))
    rows = np.random.default_rng(0).normal(size=(512, config.sae.d_in)).astype(np.float32)
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        tx = config.optim.transformation()
        sample = {"x": jnp.asarray(rows)}
        state = init_state(config.sae, tx, jax.random.key(0), sample, mesh, "tp")
        checkpointer = Checkpointer(tmp_path / "runs" / "quickstart")
        checkpointer.save(state, to_json(config), run_hash(config), {"step": 0})
        checkpointer.close()
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["codes"].values.shape == (len(names["tokens"]), config.sae.k)
    assert names["y"].shape == names["x"].shape == (len(names["tokens"]), config.sae.d_in)
    assert capsys.readouterr().out.strip()
