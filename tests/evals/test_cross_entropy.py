import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_cases import SITE, Affine, LargestEntries, constant

from saex.evals import CrossEntropy, HeldOut, evaluate
from saex.models.transformer import Edit

D = 16


@pytest.fixture(scope="module")
def plain():
    """One context at a time: plain(heldout, fn, skip) puts fn(x [t, d]) of numpy in.

    Returns (nats per token, KL per position, tokens).
    """
    run = jax.jit(
        lambda model, params, tokens, edits: [
            out[0] for out in jax.tree.leaves(model.run(params, tokens, (SITE,), edits))
        ],
        static_argnums=0,
    )

    def score(heldout, fn, skip=()):
        model, params = heldout.model, heldout.model_params
        nats, kl, predicted, positions = 0.0, 0.0, 0, 0
        for tokens, length in zip(heldout.contexts.tokens, heldout.contexts.lengths):
            ids = jnp.asarray(tokens[None, :length])
            logits, x = run(model, params, ids, {})
            edit = Edit(put, (jnp.asarray(fn(np.asarray(x)), jnp.float32)[None],))
            clean, p = log_softmax(logits), log_softmax(run(model, params, ids, {SITE: edit})[0])
            seen = [t for t in range(length) if t not in skip]
            kl += sum(float(np.sum(np.exp(clean[t]) * (clean[t] - p[t]))) for t in seen)
            targets = [(t, tokens[t + 1]) for t in seen if t + 1 < length]
            nats -= sum(p[t, token] for t, token in targets)
            predicted, positions = predicted + len(targets), positions + len(seen)
        return nats / predicted, kl / positions, predicted

    return score


def put(x, new):
    return new


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def largest(x, k=4):
    return np.where(np.abs(x) >= np.sort(np.abs(x), axis=1)[:, -k][:, None], x, 0)


def test_equals_a_plain_loop_over_contexts(lm, plain):
    out = CrossEntropy(batch=4).run(LargestEntries(D, 4), {}, lm)
    for name, fn in {
        "ce_clean": lambda x: x,
        "ce_reconstructed": largest,
        "ce_mean_ablated": lambda x: np.broadcast_to(lm.mean[None], x.shape),
        "ce_zero_ablated": np.zeros_like,
    }.items():
        nats, kl, predicted = plain(lm, fn)
        assert out[name] == pytest.approx(nats, rel=1e-5), name
        assert out["tokens"] == predicted
        if name == "ce_reconstructed":
            assert out["kl"] == pytest.approx(kl, rel=1e-4)
    assert out["ce_increase"] == out["ce_reconstructed"] - out["ce_clean"]


def test_identity_recovers_everything(lm):
    out = CrossEntropy().run(Affine(D), {"offset": jnp.zeros(D)}, lm)
    assert out["loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert out["loss_recovered_mean"] == pytest.approx(1, abs=1e-5)
    assert out["kl"] == pytest.approx(0, abs=1e-6)


def test_ablations_recover_exactly_nothing(lm):
    sae, params = constant(np.zeros(D))
    out = CrossEntropy().run(sae, params, lm)
    assert out["loss_recovered"] == 0.0
    sae, params = constant(lm.mean)
    assert CrossEntropy().run(sae, params, lm)["loss_recovered_mean"] == 0.0


@pytest.mark.parametrize("batch", [1, 64])
def test_padding_and_batch_do_not_matter(lm, batch):
    out = CrossEntropy(batch=batch).run(LargestEntries(D, 4), {}, lm)
    tokens = lm.contexts.tokens.copy()
    beyond = np.arange(12)[None] >= lm.contexts.lengths[:, None]
    tokens[beyond] = 7
    other = dataclasses.replace(lm, contexts=dataclasses.replace(lm.contexts, tokens=tokens))
    same = CrossEntropy(batch=21).run(LargestEntries(D, 4), {}, other)
    for name in ("ce_clean", "ce_reconstructed", "ce_mean_ablated", "ce_zero_ablated", "kl"):
        assert out[name] == pytest.approx(same[name], rel=1e-5), name
    assert out["tokens"] == (lm.contexts.lengths - 1).sum()


def test_positions_left_out_keep_their_activation(lm, plain):
    rows = dataclasses.replace(lm.rows, skip_positions=(0, 2))
    held = HeldOut(rows, lm.model, lm.model_params, lm.contexts)
    sae, params = constant(np.full(D, 3.0))

    kept = np.isin(np.arange(12), (0, 2))[:, None]
    out = CrossEntropy().run(sae, params, held)
    nats, kl, predicted = plain(held, lambda x: np.where(kept[: len(x)], x, 3.0), skip=(0, 2))
    assert out["ce_reconstructed"] == pytest.approx(nats, rel=1e-5)
    assert out["kl"] == pytest.approx(kl, rel=1e-4)
    assert out["tokens"] == predicted
    assert "0, 2" in held.notes()[0]


def test_tokens_left_out_keep_their_activation(lm):
    held = dataclasses.replace(lm, rows=dataclasses.replace(lm.rows, skip_tokens=tuple(range(19))))
    with pytest.raises(ValueError, match="no token"):
        CrossEntropy().score({}, held)
    held = dataclasses.replace(lm, rows=dataclasses.replace(lm.rows, skip_tokens=(18,)))
    first = dataclasses.replace(lm, rows=dataclasses.replace(lm.rows, skip_positions=(0,)))
    sae, params = constant(np.ones(D))
    assert CrossEntropy().run(sae, params, held) == CrossEntropy().run(sae, params, first)


def test_without_a_model_there_is_no_cross_entropy(lm):
    out = evaluate(LargestEntries(D, 4), {}, HeldOut(lm.rows))
    assert "fvu" in out and "dead_fraction" in out and "ce_clean" not in out


def test_one_program_serves_all_batches(lm):
    from saex.evals import cross_entropy

    before = cross_entropy._replaced._cache_size()
    CrossEntropy(batch=3).run(LargestEntries(D, 4), {}, lm)
    assert cross_entropy._replaced._cache_size() == before + 1
