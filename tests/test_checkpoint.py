"""Saved on one mesh, loaded on another, damaged, and found out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saex
from saex import checkpoint
from saex.checkpoint import Checkpointer, CheckpointError
from saex.registry import to_dict
from saex.sae import SAES, TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from saex.train.state import abstract_state, init_state

SAE = TopK(8, 4096, 4)
TX = Optim().transformation()


def rows(count=16, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def state_on(mesh, strategy="tp"):
    with jax.set_mesh(mesh):
        sample = {"x": jnp.asarray(rows(256))}
        return init_state(SAE, TX, jax.random.key(0), sample, mesh, strategy)


def save(folder, mesh, steps=(1,), strategy="tp"):
    state, saver = state_on(mesh, strategy), Checkpointer(folder, keep=5)
    with jax.set_mesh(mesh):
        for step in steps:
            changed = {**state.params, "b_enc": state.params["b_enc"] + step}
            one = state.replace(step=state.step + step, params=changed)
            saver.save(one, {"sae": to_dict(SAE, SAES)}, "hash", {"step": step})
            saver.wait()
    saver.close()
    return jax.device_get(one)


def restore(folder, mesh, strategy="tp"):
    saver = Checkpointer(folder)
    with jax.set_mesh(mesh):
        out = saver.restore(abstract_state(SAE, TX, mesh, strategy))
    saver.close()
    return out


MESHES = {"one": MeshConfig(), "data": MeshConfig(8, 1), "both": MeshConfig(2, 4, "fsdp")}


@pytest.mark.parametrize(("there", "here"), [("one", "both"), ("both", "one"), ("data", "both")])
def test_saved_on_one_mesh_and_restored_on_another(tmp_path, there, here):
    saved = save(tmp_path, make_mesh(MESHES[there]), strategy=MESHES[there].strategy)
    state, meta = restore(tmp_path, make_mesh(MESHES[here]), MESHES[here].strategy)
    assert meta["data"] == {"step": 1}
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(state))
    mesh = make_mesh(MESHES[here])
    with jax.set_mesh(mesh):
        want = abstract_state(SAE, TX, mesh, MESHES[here].strategy)
    assert jax.tree.all(jax.tree.map(lambda a, t: a.sharding == t.sharding, state, want))


def test_load_sae_with_no_mesh_and_on_meshes(tmp_path):
    saved = save(tmp_path, make_mesh(MESHES["both"]))
    sae, params = saex.load_sae(tmp_path)
    assert sae == SAE
    codes = sae.encode(params, rows())
    expected = np.asarray(codes.dense(4096))
    for mesh in (make_mesh(MESHES["both"]), make_mesh(MESHES["data"])):
        sae, sharded = saex.load_sae(tmp_path, mesh)
        assert sharded["W_enc"].sharding.mesh.shape == mesh.shape
        again = jax.device_get(sae.encode(sharded, rows()))
        np.testing.assert_allclose(np.asarray(again.dense(4096)), expected, atol=1e-6)
        decoded = sae.decode(sharded, sae.encode(sharded, rows()))
        np.testing.assert_allclose(decoded, sae.decode(params, codes), atol=1e-5)
    np.testing.assert_array_equal(params["W_dec"], saved.params["W_dec"])


def test_a_users_own_mesh_works(tmp_path):
    save(tmp_path, make_mesh(MESHES["one"]))
    sae, params = saex.load_sae(tmp_path)
    expected = sae.decode(params, sae.encode(params, rows()))
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(rows(), jax.NamedSharding(mesh, jax.P("batch")))
        y = sae.decode(params, sae.encode(params, x))
    assert y.sharding.spec[0] == "batch"
    np.testing.assert_allclose(y, expected, atol=1e-6)


def damage(folder, step, change):
    """Change the bytes of the files that hold a step's weights."""
    files = (folder / "checkpoints" / str(step) / "params").rglob("d/*")
    largest = sorted(files, key=lambda p: -p.stat().st_size)[:2]
    assert largest[0].stat().st_size > 10_000
    for path in largest:
        path.write_bytes(change(bytearray(path.read_bytes())))


def flip(raw):
    raw[len(raw) // 2] ^= 4
    return raw


def test_a_flipped_bit_is_found_and_the_step_before_is_used(tmp_path, caplog):
    mesh = make_mesh(MESHES["one"])
    save(tmp_path, mesh, steps=(1, 2))
    damage(tmp_path, 2, flip)
    state, meta = restore(tmp_path, mesh)
    assert meta["step"] == 1 and int(state.step) == 1
    assert "step 2" in caplog.text
    _, params = saex.load_sae(tmp_path)
    np.testing.assert_array_equal(params["b_enc"], 1.0)
    assert [p.name.split("-")[0] for p in (tmp_path / "damaged").iterdir()] == ["2"]
    save(tmp_path, mesh, steps=(2,))  # the way is free: the run can come to that step again
    _, params = saex.load_sae(tmp_path)
    np.testing.assert_array_equal(params["b_enc"], 2.0)


def test_a_checkpoint_cut_short_is_passed_over_and_none_left_is_an_error(tmp_path, caplog):
    mesh = make_mesh(MESHES["one"])
    save(tmp_path, mesh, steps=(1, 2))
    damage(tmp_path, 2, lambda raw: raw[: len(raw) // 2])
    assert restore(tmp_path, mesh)[1]["step"] == 1
    damage(tmp_path, 1, lambda raw: raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"no step of .* can be restored \(step 1:"):
        restore(tmp_path, mesh)
    with pytest.raises(CheckpointError, match="no checkpoint can be loaded"):
        saex.load_sae(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert [p.name.split("-")[0] for p in (tmp_path / "damaged").iterdir()] == ["2"]


def test_unfinished_steps_and_empty_folders(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        saex.load_sae(tmp_path / "nowhere")
    mesh = make_mesh(MESHES["one"])
    assert restore(tmp_path, mesh) is None
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp" / "meta").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        saex.load_sae(tmp_path)


def test_a_newer_format_is_named(tmp_path):
    save(tmp_path, make_mesh(MESHES["one"]))
    path = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"format 99.*upgrade saex"):
        saex.load_sae(tmp_path)


def test_digests_are_of_numbers_and_places_not_of_layout():
    W = rows(64)
    plain = checkpoint.hex_digests({"W": W})
    mesh = make_mesh(MESHES["both"])
    with jax.set_mesh(mesh):
        for spec in (jax.P("model", "data"), jax.P("data"), jax.P()):
            sharded = jax.device_put(W, jax.NamedSharding(mesh, spec))
            assert checkpoint.hex_digests({"W": sharded}) == plain
    for other in (W[::-1].copy(), W.T.copy(), np.where(W == W[3, 2], -W, W), W.reshape(32, 16)):
        assert checkpoint.hex_digests({"W": other}) != plain
