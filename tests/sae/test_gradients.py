"""Gradients of every method's loss against its card: a dense formula that jax differentiates.

What is selected is held constant there, and written with sorts and masks; AuxK is on, with a third
of the latents dead. Thresholds that learn by an estimate are compared with the estimate's formula.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import SAES, zipf
from saex.sae.base import split
from tests.sae import toy
from tests.sae.small import small

ROWS, DEAD_AFTER = 64, 1000
CHANGES = {
    "relu": {"l1": 0.3},
    "crosscoder": {"l1": 0.3},
    "transcoder": {"l1": 0.3},
    "gated": {"l1": 0.3},
    "jump_relu": {"l0": 0.3},
    "jump_relu_tanh": {"sparsity": 3.0, "pre_activation": 0.03},
    "batch_topk": {"capacity": 0},
    "matryoshka": {"capacity": 0},
    "batch_crosscoder": {"capacity": 0},
    "feature_choice": {"choice_from": 0.0, "aux_coefficient": 0.0},  # none is dead that chooses
    "adaptive_k": {"l1": 0.1},
    "gradient_topk": {"beta": 2.0},
    "guided": {"positive_weight": 3.0, "label_coefficient": 0.5},
    "variational": {"aux_coefficient": 0.0},  # whose residual, held constant, its noise moves
}
stop = jax.lax.stop_gradient


def squares(r):
    """Mean over rows of the sum over d."""
    return jnp.mean(jnp.sum(jnp.square(r), axis=1))


def pre(p, x, bias=None):
    x = x if bias is None else x - bias[None]
    return x @ p["W_enc"].T + p["b_enc"][None]


def largest(s, k):
    """bool: the k largest of each row that are above 0."""
    return (s >= -jnp.sort(-s, axis=1)[:, k - 1 : k]) & (s > 0)


def of_batch(s, k):
    return (s >= -jnp.sort(-s.reshape(-1))[k * len(s) - 1]) & (s > 0)


def aux(sae, stats, on, s, W, e, compared=None):
    """aux_coefficient * AuxK: the residual by what the k_aux largest dead latents write."""
    dead = (stats["since_fired"] > DEAD_AFTER) & ~on.any(0)
    compared, e = stop((jnp.where(dead[None], s if compared is None else compared, 0), e))
    y = jnp.where(largest(compared, sae.aux_latents), s, 0) @ W
    return sae.aux_coefficient * jnp.mean(jnp.square(y - e)) / jnp.mean(jnp.var(e, axis=0))


def selected(sae, stats, p, x, s, on, compared=None):
    """s * MSE + AuxK of codes relu(s) where on."""
    r = x - jnp.where(on, s, 0) @ p["W_dec"] - p["b_dec"][None]
    return stats["mse_scale"] * jnp.mean(jnp.square(r)) + aux(
        sae, stats, on, s, p["W_dec"], r, compared
    )


def relu(sae, p, stats, b):
    x = b["x"] * p["scale"]
    f = jax.nn.relu(pre(p, x))
    weights = jnp.linalg.norm(p["W_dec"], axis=1)
    return squares(x - f @ p["W_dec"] - p["b_dec"][None]) + sae.l1 * jnp.mean(f @ weights)


def crosscoder(sae, p, stats, b):
    x = b["x"] * p["scale"][None]
    f, (one, two) = jax.nn.relu(pre(p, x)), jnp.split(p["W_dec"], [10], axis=1)
    weights = jnp.linalg.norm(one, axis=1) + jnp.linalg.norm(two, axis=1)
    return squares(x - f @ p["W_dec"] - p["b_dec"][None]) + sae.l1 * jnp.mean(f @ weights)


def transcoder(sae, p, stats, b):
    f = jax.nn.relu(pre(p, b["x"] * p["scale"], p["b_in"]))
    r = b["y"] * p["y_scale"] - f @ p["W_dec"] - p["b_dec"][None]
    return squares(r) + sae.l1 * jnp.mean(jnp.sum(f, axis=1))


def gated(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = (x - p["b_dec"][None]) @ p["W_enc"].T
    gate = s + p["b_enc"][None]
    m = jax.nn.relu(jnp.exp(p["r_mag"])[None] * s + p["b_mag"][None])
    y = jnp.where(gate > 0, m, 0) @ p["W_dec"] + p["b_dec"][None]
    y_gate = jax.nn.relu(gate) @ stop(p["W_dec"]) + stop(p["b_dec"])[None]
    opened = jnp.mean(jnp.sum(jax.nn.relu(gate), axis=1))
    return squares(x - y) + sae.l1 * opened + squares(x - y_gate)


def estimates(sae, p, s):
    """(f, 1 where f is active), linear in theta with the slopes of the card."""
    theta = jnp.exp(p["log_threshold"])[None]
    inside = stop(jnp.abs(s - theta) < sae.bandwidth / 2) / sae.bandwidth
    moved = inside * (theta - stop(theta))
    return jnp.where(s > theta, s, 0) - stop(theta) * moved, (s > theta) - moved


def jump_relu(sae, p, stats, b):
    x = b["x"] * p["scale"]
    f, active = estimates(sae, p, pre(p, x, p["b_dec"]))
    r = x - f @ p["W_dec"] - p["b_dec"][None]
    return squares(r) + sae.l0 * jnp.mean(jnp.sum(active, axis=1))


def jump_relu_tanh(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s, theta = pre(p, x), jnp.exp(p["log_threshold"])[None]
    f, norms = estimates(sae, p, s)[0], jnp.linalg.norm(p["W_dec"], axis=1)
    count = jnp.tanh(sae.tanh_scale * f * norms[None])
    lift = jax.nn.relu(theta - s) * norms[None]
    terms = sae.sparsity * count + sae.pre_activation * lift
    return squares(x - f @ p["W_dec"] - p["b_dec"][None]) + jnp.mean(jnp.sum(terms, axis=1))


def topk(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    return selected(sae, stats, p, x, s, largest(s, sae.k))


def batch_topk(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    return selected(sae, stats, p, x, s, of_batch(s, sae.k))


def group_max(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    split = s.reshape(len(x), sae.k, -1)
    on = (split == split.max(axis=2, keepdims=True)).reshape(s.shape) & (s > 0)
    return selected(sae, stats, p, x, s, on)


def gradient_topk(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    effect = jnp.abs(b["gradient"] * p["gradient_scale"] @ p["W_dec"].T)
    return selected(sae, stats, p, x, s, largest(s * (1 + sae.beta * effect), sae.k))


def guided(sae, p, stats, b):
    s = pre(p, b["x"] * p["scale"], p["b_dec"])[:, : sae.concepts]
    chance, y = jax.nn.sigmoid(s), b["label"]
    entropy = -sae.positive_weight * y * jnp.log(chance) - (1 - y) * jnp.log(1 - chance)
    return topk(sae, p, stats, b) + sae.label_coefficient * jnp.mean(jnp.sum(entropy, axis=1))


def adaptive_k(sae, p, stats, b):
    """Before the probe is tuned."""
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    told = jnp.clip(b["x"] * p["probe_scale"] @ p["probe_w"] + p["probe_b"], 0, 10)
    share = jax.nn.sigmoid(sae.steep * (told / 10 - 0.5))
    k = jnp.round(sae.k_min + (sae.k_max - sae.k_min) * share)
    rank = jnp.argsort(jnp.argsort(-s, axis=1), axis=1)
    on = (rank < k[:, None]) & (s > 0)
    sums = jnp.mean(jnp.sum(jnp.where(on, s, 0), axis=1))
    l1 = sae.l1 * sums / jnp.mean(jnp.linalg.norm(x, axis=1))
    return l1 + selected(sae, stats, p, x, s, on)


def feature_choice(sae, p, stats, b):
    """Each latent its largest rows, as many as its budget; budgets are tested for themselves."""
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    budget = zipf.budgets(stats["law"], sae.k * ROWS, 0.5, ROWS)
    rank = jnp.argsort(jnp.argsort(-s, axis=0), axis=0)
    return selected(sae, stats, p, x, s, (rank < budget[None]) & (s > 0))


def matryoshka(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    on = of_batch(s, sae.k)
    f = jnp.where(on, s, 0)
    ends = [f[:, :m] @ p["W_dec"][:m] + p["b_dec"][None] for m in sae.prefixes]
    each = [jnp.mean(jnp.square(x - y)) for y in ends]
    last = aux(sae, stats, on, s, p["W_dec"], x - ends[-1])
    return stats["mse_scale"] * sum(each) / len(each) + last


def batch_crosscoder(sae, p, stats, b):
    x = b["x"] * p["scale"][None]
    s, (one, two) = jax.nn.relu(pre(p, x)), jnp.split(p["W_dec"], [10], axis=1)
    N = jnp.linalg.norm(one, axis=1) + jnp.linalg.norm(two, axis=1)
    return selected(sae, stats, p, x, s, of_batch(s * N[None], sae.k), s * N[None])


def skip_transcoder(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x))
    rest = b["y"] * p["y_scale"] - x @ p["W_skip"].T
    return selected(sae, stats, p, rest, s, largest(s, sae.k))


def multi_layer(sae, p, stats, b):
    raw = b["x"].reshape(-1, sae.d_in)
    mean, sd = raw.mean(1, keepdims=True), raw.std(1, keepdims=True, ddof=1) + 1e-5
    x = (raw - mean) / sd * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    on = largest(s, sae.k)
    y = jnp.where(on, s, 0) @ p["W_dec"] + p["b_dec"][None]
    left = jnp.square(raw - (y / p["scale"] * sd + mean)).reshape(ROWS, sae.sites, -1)
    sites = raw.reshape(left.shape)
    fvu = left.sum((0, 2)) / jnp.square(sites - sites.mean(0, keepdims=True)).sum((0, 2))
    return jnp.mean(fvu) + aux(sae, stats, on, s, p["W_dec"], x - y)


def group_bias(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = (x - p["b_dec"][None]) @ p["W_enc"].T
    f = jnp.where(s + p["b_enc"][None] > 0, s, 0) * p["amplitude"][None]
    return 0.5 * squares(x - f @ p["W_enc"] - p["b_dec"][None])


def top_afa(sae, p, stats, b):
    x = b["x"] * p["scale"]
    s = jax.nn.relu(pre(p, x, p["b_dec"]))
    size = s * jnp.linalg.norm(p["W_dec"], axis=1)[None]
    order = jnp.argsort(-size, axis=1)
    prefix = jnp.sqrt(jnp.cumsum(jnp.take_along_axis(size, order, axis=1) ** 2, axis=1))
    gap = jnp.abs(prefix - jnp.linalg.norm(x - p["b_dec"][None], axis=1, keepdims=True))
    on = (jnp.argsort(order, axis=1) <= jnp.argmin(gap, axis=1)[:, None]) & (s > 0)
    f = jnp.where(on, s, 0)
    apart = jnp.linalg.norm(f, axis=1) - jnp.linalg.norm(x, axis=1)
    norms = sae.afa * sae.d_in * jnp.mean(jnp.square(apart))
    r = x - f @ p["W_dec"] - p["b_dec"][None]
    return squares(r) + norms + aux(sae, stats, on, s, p["W_dec"], r)


CARDS = {
    f.__name__: f
    for f in (
        *(relu, crosscoder, transcoder, gated, jump_relu, jump_relu_tanh, topk, batch_topk),
        *(group_max, gradient_topk, guided, adaptive_k, feature_choice, matryoshka),
        *(batch_crosscoder, skip_transcoder, multi_layer, group_bias, top_afa),
    )
}


@functools.cache
def made(name):
    """(dictionary, params away from the start, stats with dead latents, a batch)."""
    fields = SAES[name].__dataclass_fields__
    aux = {"k_aux": 4, "aux_coefficient": 0.5} if "k_aux" in fields else {}
    sae = small(name, dead_after_tokens=DEAD_AFTER, **{**aux, **CHANGES.get(name, {})})
    x = 3 * toy.batch(toy.directions(40, sae.d_in), ROWS, 3, 1) + 0.5
    batch = jax.tree.map(jnp.asarray, toy.columns(sae, x, 0))
    params, stats = jax.jit(sae.init)(jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    trainable, frozen = split(params, sae.specs()["params"])
    for key, a in trainable.items():
        size = 0.3 if key in ("W_dec", "W_skip") and not np.any(a) else 0.05
        trainable[key] = a + size * rng.normal(size=a.shape).astype(np.float32)
    for key in sae.unit_rows:
        trainable[key] /= jnp.linalg.norm(trainable[key], axis=1, keepdims=True)
    if "b_enc" in frozen:
        frozen["b_enc"] = -jnp.abs(0.1 * rng.normal(size=sae.n).astype(np.float32))
    stats = {**stats, "since_fired": stats["since_fired"].at[::3].set(10**6)}
    return sae, trainable, frozen, stats, batch


def compared(sae, params, g):
    """Along unit rows no gradient reaches the optimiser."""
    for key in sae.unit_rows:
        along = jnp.sum(g[key] * params[key], axis=1, keepdims=True)
        g = {**g, key: g[key] - along * params[key]}
    return g


REST = ("W_enc", "W_dec", "b_enc", "b_dec")  # of these test_all makes finite differences
MORE = {
    name: [
        key
        for key, spec in small(name).specs()["params"].items()
        if spec.trainable and key not in (*REST, "log_threshold")  # whose gradient is an estimate
    ]
    for name in sorted(SAES)
}


@pytest.mark.parametrize("name", [name for name, keys in MORE.items() if keys])
def test_params_of_its_own_match_finite_differences(name):
    """Along a random direction of each, at a point where few latents are about to switch."""
    sae, trainable, frozen, stats, batch = made(name)
    few = jax.tree.map(lambda a: a[:8], batch)
    hyper = {k: jnp.float32(v) for k, v in {**sae.hyper(), "steps": 10**6}.items()}

    @jax.jit
    def loss(trainable):
        p = {**trainable, **frozen}
        return sae.loss(p, stats, few, jax.random.key(1), jnp.int32(10**6), hyper)[0]

    grads = jax.grad(loss)(trainable)
    for key in MORE[name]:
        value = trainable[key]
        direction = np.random.default_rng(1).normal(size=value.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        slope, right, found = float(jnp.sum(grads[key] * direction)), [], []
        assert abs(slope) > 1e-7, key
        for step in (3e-3, 3e-4):  # within the larger a latent may switch
            up, down = (loss({**trainable, key: value + s * direction}) for s in (step, -step))
            found.append((float(up) - float(down)) / (2 * step))
            rounding = float(jnp.spacing(up)) / step
            right.append(abs(found[-1] - slope) < 0.03 * abs(slope) + 2 * rounding)
        assert any(right), (key, slope, found)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_gradients_are_those_of_the_card(name):
    sae, trainable, frozen, stats, batch = made(name)
    hyper = {k: jnp.float32(v) for k, v in {**sae.hyper(), "steps": 10}.items()}
    step = 0 if name == "adaptive_k" else 10**6

    def ours(trainable):
        p = {**trainable, **frozen}
        loss, out = sae.loss(p, stats, batch, None, jnp.int32(step), hyper)
        return loss, out.metrics

    def card(trainable):
        return CARDS[name](sae, {**trainable, **frozen}, stats, batch)

    (loss, metrics), found = jax.jit(jax.value_and_grad(ours, has_aux=True))(trainable)
    expected, gradient = jax.jit(jax.value_and_grad(card))(trainable)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    if getattr(sae, "aux_coefficient", 0):
        assert float(metrics["aux_served"]) > 0
    found, gradient = (compared(sae, trainable, g) for g in (found, gradient))
    for key in trainable:
        size = float(jnp.abs(gradient[key]).max())
        assert size > 0 or key.startswith("probe"), key
        np.testing.assert_allclose(found[key], gradient[key], atol=1e-6 + 1e-4 * size, err_msg=key)
