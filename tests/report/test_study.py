import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex import report
from saex.data import Column, Store, StoreWriter
from saex.evals import HeldOut, Rows
from saex.report.text import AFTER, BEFORE, Text
from saex.sae import TopK
from saex.sharding import MeshConfig, make_mesh, shardings

TEXT = b"for i in range(10):\n\tprint(i)\n" * 30
SAE = TopK(12, 48, 4)


@pytest.fixture(scope="module")
def columns():
    """Rows that depend on the byte and its context: a random embedding, smoothed over time."""
    rng = np.random.default_rng(0)
    parts = []
    for document in range(12):
        ids = np.frombuffer(TEXT, np.uint8)[document % 3 * 3 :][: 100 if document % 3 else 20]
        tokens = np.concatenate([[256], ids]).astype(np.int32)
        parts.append((tokens, np.arange(len(tokens)), np.full(len(tokens), document)))
    tokens, position, document = (np.concatenate(p).astype(np.int32) for p in zip(*parts))
    x = rng.normal(size=(257, 12))[tokens]
    x[1:] += 0.7 * x[:-1]
    return {
        "x": x.astype(np.float32),
        "tokens": tokens,
        "position": position,
        "document": document,
    }


@pytest.fixture(scope="module")
def params(columns):
    return SAE.init(jax.random.key(0), {"x": jnp.asarray(columns["x"])})[0]


@pytest.fixture(scope="module")
def rows_of(columns, tmp_path_factory):
    def make(*names):
        path = tmp_path_factory.mktemp("study") / "store"
        chosen = {n: columns[n] for n in ("x", *names)}
        shapes = {k: Column(v.shape[1:], str(v.dtype)) for k, v in chosen.items()}
        with StoreWriter(path, shapes) as writer:
            writer.append(chosen)
            writer.commit({"done": 1})
            writer.finish()
        skip = (0,) if "position" in names else ()
        return Rows(Store.open(path), "x", skip_positions=skip, batch=128)

    return make


@pytest.fixture(scope="module")
def model_params():
    rng = np.random.default_rng(1)
    return {"unembed": rng.normal(size=(12, 257)), "final_norm": rng.random(12) + 0.5}


@pytest.fixture(scope="module")
def found(rows_of, params, model_params):
    heldout = HeldOut(rows_of("tokens", "position", "document"), None, model_params)
    return report.study(SAE, params, heldout, latents=10, contexts=4)


def codes_of(params, columns):
    codes = np.array(SAE.encode(params, jnp.asarray(columns["x"])).dense(48))
    codes[columns["position"] == 0] = 0
    return codes


def test_highlighted_values_are_those_of_the_dictionary(found, columns, params):
    codes = codes_of(params, columns)
    assert len(found.latents) == 10 and found.rows == (columns["position"] > 0).sum()
    for latent in found.latents:
        mine = codes[:, latent.index]
        assert latent.largest == pytest.approx(mine.max())
        assert latent.density == pytest.approx((mine > 0).sum() / found.rows)
        assert latent.mean == pytest.approx(mine[mine > 0].mean(), rel=1e-5)
        assert 1 <= len(latent.examples) <= 4
        peaks = [e.values[e.peak] for e in latent.examples]
        assert peaks == sorted(peaks, reverse=True) and peaks[0] == pytest.approx(mine.max())
        for e in latent.examples:
            words = e.where.replace(",", "").split()
            document, position = int(words[1]), int(words[3])
            (row,) = np.flatnonzero(
                (columns["document"] == document) & (columns["position"] == position)
            )
            start = row - e.peak
            span = slice(start, start + len(e.tokens))
            np.testing.assert_allclose(e.values, mine[span], rtol=1e-5, atol=1e-6)
            assert set(columns["document"][span]) == {document}
            shown = "".join(t for t in e.tokens if t != "<bos>").encode()
            assert shown == bytes(t for t in columns["tokens"][span] if t < 256)


def test_a_window_is_as_large_as_its_context_allows(rows_of, columns):
    text = Text(rows_of("tokens", "position", "document"))
    lengths = np.bincount(columns["document"])
    for row, (document, position) in enumerate(zip(columns["document"], columns["position"])):
        start, stop, cut = text.window(row)
        assert start <= row < stop
        assert stop - start == min(lengths[document], BEFORE + AFTER + 1)
        assert set(columns["document"][start:stop]) == {document}
        assert cut == (columns["position"][start] > 0, stop - row < lengths[document] - position)
        if all(cut):
            assert row - start == BEFORE


def test_contexts_that_read_the_same_are_shown_once(found):
    for latent in found.latents:
        texts = [e.tokens for e in latent.examples]
        assert len(set(texts)) == len(texts)


def test_next_tokens_are_the_decoder_row_through_the_unembedding(found, params, model_params):
    unembed = model_params["final_norm"][:, None] * model_params["unembed"]
    for latent in found.latents[:3]:
        logits = np.asarray(params["W_dec"])[latent.index] / float(params["scale"]) @ unembed
        logits -= logits.mean()
        best, worst = np.argsort(-logits)[:8], np.argsort(logits)[:8]
        np.testing.assert_allclose([v for _, v in latent.promoted], logits[best], rtol=1e-4)
        np.testing.assert_allclose([v for _, v in latent.suppressed], logits[worst], rtol=1e-4)
        assert latent.promoted[0][0] == report.latents.byte_text(int(best[0]))


def test_histogram_counts_every_latent(found):
    assert found.histogram.counts.sum() + found.histogram.dead == 48


def test_rows_that_are_not_text_are_shown_by_number(rows_of, params):
    found = report.study(SAE, params, HeldOut(rows_of()), latents=4, contexts=3)
    for latent in found.latents:
        assert latent.promoted == () and len(latent.examples) == 3
        for e in latent.examples:
            assert e.tokens == (e.where,) and e.where.startswith("row ")
            assert e.values[0] > 0


def test_a_mesh_changes_nothing(rows_of, params, found, model_params):
    mesh = make_mesh(MeshConfig(2, 4))
    spread = jax.device_put(params, shardings(SAE.specs()["params"], mesh))
    heldout = HeldOut(rows_of("tokens", "position", "document"), None, model_params)
    other = report.study(SAE, spread, heldout, latents=10, contexts=4)
    assert [latent.index for latent in other.latents] == [latent.index for latent in found.latents]


def test_write_puts_it_all_into_one_small_file(tmp_path, rows_of, params, model_params):
    heldout = HeldOut(rows_of("tokens", "position", "document"), None, model_params)
    path = report.write(
        tmp_path / "report.html",
        sae=SAE,
        params=params,
        heldout=heldout,
        config={"sae": {"k": 4}},
        history=[{"step": 1, "loss": 0.5, "tokens": 10}],
        evaluation={"fvu": 0.25, "loss_recovered": None},
        latents=6,
        contexts=2,
    )
    text = path.read_text()
    assert text.count('class="latent"') == 6 and "48 latents of x" in text
    assert "Left out: position 0" in text and len(text) < 2_000_000
