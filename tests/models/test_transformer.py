"""The transformer against a numpy (float64) implementation written from its description."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.models.transformer import BOS, Edit, Transformer, decode, encode, next_token_nats

MODEL = Transformer(d_model=16, n_layers=2, n_heads=2, d_mlp=40, context=12)


@pytest.fixture(scope="module")
def params():
    """Random values in every array: zeros and ones of the initialisation would hide errors."""
    shapes, tree = jax.tree.flatten(jax.eval_shape(MODEL.init, jax.random.key(0)))
    random = np.random.default_rng(0)
    arrays = [
        random.normal(size=s.shape).astype(np.float32) / math.sqrt(s.shape[0]) for s in shapes
    ]
    return jax.tree.unflatten(tree, arrays)


@pytest.fixture(scope="module")
def tokens():
    tokens = np.random.default_rng(1).integers(0, 256, (3, 12)).astype(np.int32)
    tokens[:, 0] = BOS
    return tokens


@functools.partial(jax.jit, static_argnames=("taps", "stop_at"))
def run(params, tokens, taps=(), edits=None, stop_at=None):
    return MODEL.run(params, tokens, taps, edits, stop_at)


def reference(params, tokens):
    """{site or 'logits': float64 array}, one position and one head at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = [reference_row(p, row) for row in tokens]
    return {site: np.stack([r[site] for r in rows]) for site in rows[0]}


def reference_row(p, row):
    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def rotate(x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position / 10000 ** (i / half)
            pair = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
            out[i], out[i + half] = pair.real, pair.imag
        return out

    def attention(w, h):
        out, width = np.zeros_like(h), MODEL.d_model // MODEL.n_heads
        for head in range(MODEL.n_heads):
            part = slice(head * width, (head + 1) * width)
            q, k, v = (h @ w[name][:, part] for name in "qkv")
            q = np.array([rotate(x, i) for i, x in enumerate(norm(q))])
            k = np.array([rotate(x, i) for i, x in enumerate(norm(k))])
            for i in range(len(h)):
                weight = np.exp([q[i] @ k[j] / math.sqrt(width) for j in range(i + 1)])
                out[i] += weight / weight.sum() @ v[: i + 1] @ w["o"][part]
        return out

    sites, x = {}, p["embed"][row]
    for i in range(MODEL.n_layers):
        block, name = p["blocks"][str(i)], f"blocks.{i}"
        sites[f"{name}.resid_pre"] = x
        sites[f"{name}.attn_out"] = attention(block["attn"], norm(x) * block["attn_norm"])
        x = x + sites[f"{name}.attn_out"]
        sites[f"{name}.mlp_in"] = norm(x) * block["mlp_norm"]
        a = sites[f"{name}.mlp_in"] @ block["mlp"]["in"]
        gelu = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        sites[f"{name}.mlp_out"] = gelu @ block["mlp"]["out"]
        x = x + sites[f"{name}.mlp_out"]
        sites[f"{name}.resid_post"] = x
    return sites | {"logits": norm(x) * p["final_norm"] @ p["unembed"]}


def test_every_site_and_the_logits_equal_numpy(params, tokens):
    logits, acts = run(params, tokens, taps=tuple(MODEL.sites))
    expected = reference(params, tokens)
    assert list(MODEL.sites) == [s for s in expected if s != "logits"]
    assert acts.keys() == MODEL.sites.keys()
    for site, x in {**acts, "logits": logits}.items():
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, expected[site], atol=2e-5, err_msg=site)


def test_loss_equals_numpy(params, tokens):
    nats = next_token_nats(run(params, tokens)[0], jnp.asarray(tokens))
    logits = reference(params, tokens)["logits"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row in range(3):
        for t in range(11):
            expected = -math.log(p[row, t, tokens[row, t + 1]])
            assert nats[row, t] == pytest.approx(expected, abs=2e-5)


def test_bfloat16_matmuls_are_close_and_differ(params, tokens):
    exact, _ = run(params, tokens)
    coarse, _ = dataclasses.replace(MODEL, matmul="bfloat16").run(params, tokens)
    error = float(jnp.abs(exact - coarse).max())
    assert coarse.dtype == jnp.float32 and 1e-5 < error < 0.2


def test_what_comes_later_changes_nothing_before(params, tokens):
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, _ = run(params, tokens)
    after, _ = run(params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.abs(before[:, 7:] - after[:, 7:]).max(-1) > 1e-4)


def test_documents_of_a_context_are_as_if_each_were_alone(params, tokens):
    """Of 5, 4 and 3 tokens; at all sites, in the logits, and not so where nothing says it."""
    sites = tuple(MODEL.sites)
    positions = np.tile(np.concatenate([np.arange(n) for n in (5, 4, 3)]), (3, 1))
    logits, acts = MODEL.run(params, tokens, sites, positions=positions)
    for part in (slice(0, 5), slice(5, 9), slice(9, 12)):
        expected = reference(params, tokens[:, part])
        for site, x in {**acts, "logits": logits}.items():
            np.testing.assert_allclose(x[:, part], expected[site], atol=2e-5, err_msg=site)
    seen, _ = run(params, tokens)
    assert float(jnp.abs(seen[:, 5:] - logits[:, 5:]).max()) > 1e-3
    ordinary, _ = MODEL.run(params, tokens, positions=np.tile(np.arange(12), (3, 1)))
    np.testing.assert_allclose(ordinary, seen, atol=1e-6)


def test_shorter_contexts_give_the_same_prefix(params, tokens):
    full, _ = run(params, tokens)
    short, _ = run(params, tokens[:, :5])
    np.testing.assert_allclose(full[:, :5], short, atol=1e-5)


def test_stop_at_gives_the_tap_and_no_logits(params, tokens):
    logits, acts = run(params, tokens, ("blocks.0.mlp_in",), stop_at="blocks.0.mlp_in")
    _, full = run(params, tokens, ("blocks.0.mlp_in",))
    assert logits is None
    np.testing.assert_array_equal(acts["blocks.0.mlp_in"], full["blocks.0.mlp_in"])


def test_nothing_after_stop_at_is_traced(params, tokens):
    def text(site):
        f = lambda p, t: MODEL.run(p, t, (site,), stop_at=site)[1]  # noqa: E731
        return str(jax.make_jaxpr(f)(params, tokens))

    count = [text(f"blocks.{i}.resid_post").count("dot_general") for i in range(2)]
    assert count == [8, 16]  # q, k, v, scores, mix, o, in, out of each block, and no unembedding


def scale(x, factor):
    return x * factor


def replace(x, value):
    return jnp.broadcast_to(value[None, None], x.shape)


def test_taps_are_read_after_edits_and_later_sites_see_them(params, tokens):
    site, after = "blocks.0.resid_post", "blocks.1.resid_pre"
    _, plain = run(params, tokens, (site, after))
    logits, acts = run(params, tokens, (site, after), {site: Edit(scale, (2.0,))})
    np.testing.assert_allclose(acts[site], 2 * plain[site], rtol=1e-6)
    np.testing.assert_allclose(acts[after], 2 * plain[after], rtol=1e-6)
    assert float(jnp.abs(logits - run(params, tokens)[0]).max()) > 1e-3


@pytest.mark.parametrize("site", MODEL.sites)
def test_an_edit_at_every_site_reaches_the_logits(params, tokens, site):
    logits, _ = run(params, tokens, edits={site: Edit(replace, (np.ones(16, np.float32),))})
    assert float(jnp.abs(logits - run(params, tokens)[0]).max()) > 1e-3


def test_a_new_edit_argument_does_not_recompile_but_counts(params, tokens):
    traces = []

    @jax.jit
    def logits(edits):
        traces.append(1)
        return MODEL.run(params, tokens, edits=edits)[0]

    values = [logits({"blocks.0.mlp_out": Edit(scale, (f,))}) for f in (0.0, 1.0, 3.0)]
    assert len(traces) == 1
    np.testing.assert_allclose(values[1], run(params, tokens)[0], atol=1e-5)
    assert float(jnp.abs(values[0] - values[2]).max()) > 1e-3
    logits({"blocks.0.mlp_out": Edit(lambda x: x, ())})
    assert len(traces) == 2


def test_unknown_and_unreachable_sites(params, tokens):
    with pytest.raises(KeyError, match=r"no site 'blocks\.2\.resid_post'.*blocks\.1\.resid_post"):
        MODEL.run(params, tokens, taps=("blocks.2.resid_post",))
    with pytest.raises(KeyError, match="no site 'mlp'"):
        MODEL.run(params, tokens, edits={"mlp": Edit(scale, (1.0,))})
    with pytest.raises(ValueError, match="comes after stop_at"):
        MODEL.run(params, tokens, taps=("blocks.1.mlp_in",), stop_at="blocks.0.mlp_in")


def test_greedy_generation_takes_the_argmax_of_run(params, tokens):
    out = np.asarray(MODEL.generate(params, tokens[:, :4], 5, temperature=0.0))
    expected = np.argmax(run(params, out)[0], axis=-1)
    np.testing.assert_array_equal(out[:, :4], tokens[:, :4])
    np.testing.assert_array_equal(out[:, 4:], expected[:, 3:-1])
    assert out.dtype == np.int32 and out.shape == (3, 9)


def test_generation_follows_key_temperature_and_edits(params, tokens):
    def drawn(key, temperature=5.0, edits=None):
        return np.asarray(
            MODEL.generate(params, tokens[:, :2], 10, edits, jax.random.key(key), temperature)
        )

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert np.any(drawn(0) != drawn(1))
    np.testing.assert_array_equal(
        drawn(0, 1e-4), MODEL.generate(params, tokens[:, :2], 10, temperature=0.0)
    )
    edited = {"blocks.1.resid_post": Edit(scale, (-1.0,))}
    assert np.any(drawn(0, 0.0) != drawn(0, 0.0, edited))
    with pytest.raises(ValueError, match=r"temperature=1\.0 with key=None"):
        MODEL.generate(params, tokens, 1)


def test_samples_have_the_probabilities_of_the_model(params, tokens):
    start = np.repeat(tokens[:1, :3], 4000, axis=0)
    drawn = np.asarray(MODEL.generate(params, start, 1, key=jax.random.key(0)))[:, -1]
    expected = jax.nn.softmax(run(params, tokens[:1, :3])[0][0, -1])
    likeliest = int(expected.argmax())
    share, p = np.mean(drawn == likeliest), float(expected[likeliest])
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 4000)


SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in (jax.P(), jax.P(("data", "model")))]


@pytest.mark.parametrize("spec", [jax.P("data"), *SLOW], ids=str)
def test_explicit_mesh_with_replicated_and_sharded_batches(params, spec):
    tokens = np.random.default_rng(2).integers(0, 257, (8, 12)).astype(np.int32)
    site = "blocks.1.resid_post"
    logits, acts = run(params, tokens, (site,))
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=explicit)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(tokens, jax.NamedSharding(mesh, spec))
        there, taken = run(params, sharded, (site,))
        assert jax.typeof(taken[site]).sharding.spec == jax.P(*spec, *[None] * (3 - len(spec)))
        assert next_token_nats(there, sharded).shape == (8, 11)
        greedy = MODEL.generate(params, sharded, 2, temperature=0.0)
    np.testing.assert_allclose(there, logits, atol=1e-4)
    np.testing.assert_allclose(taken[site], acts[site], atol=1e-4)
    np.testing.assert_array_equal(greedy[:, -2], np.argmax(logits[:, -1], axis=-1))


def shift(x, delta):
    return x + delta


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_gradient_at_a_site_on_a_mesh(params, kind):
    tokens = np.random.default_rng(2).integers(0, 257, (8, 12)).astype(np.int32)
    zero = np.zeros((8, 12, 16), np.float32)

    @jax.jit
    def gradient(delta, tokens):
        def loss(delta):
            edits = {"blocks.0.resid_post": Edit(shift, (delta,))}
            return next_token_nats(MODEL.run(params, tokens, edits=edits)[0], tokens).mean()

        return jax.grad(loss)(delta)

    expected = gradient(zero, tokens)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    with jax.set_mesh(mesh):
        got = gradient(jax.device_put(zero, sharding), jax.device_put(tokens, sharding))
    assert float(jnp.abs(expected).max()) > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_initialisation_predicts_all_bytes_alike(tokens):
    logits, _ = run(MODEL.init(jax.random.key(0)), tokens)
    nats = next_token_nats(logits, jnp.asarray(tokens))
    np.testing.assert_allclose(nats, math.log(257), rtol=1e-5)


def test_bytes_round_trip():
    text = "naïve\r\n\t∑ 😀\x00"
    assert decode(encode(text)) == text
    assert decode([BOS, *encode("a"), 255, BOS]) == "a\ufffd"
    assert encode("").shape == (0,)


def test_impossible_hyper_parameters():
    with pytest.raises(ValueError, match="d_model=18 is no multiple"):
        Transformer(d_model=18, n_heads=4)
    with pytest.raises(ValueError, match="matmul='fp8'"):
        Transformer(matmul="fp8")
