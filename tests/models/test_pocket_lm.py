"""The shipped language model is a real one: it predicts text that it has not seen."""

import gzip
import itertools
import os

import jax
import numpy as np
import pytest

from saex.data.text import Stdlib, chunk
from saex.models import BOS, POCKET_LM, PocketLM, decode, encode
from saex.pretrain import bits_per_byte


@pytest.fixture(scope="module")
def pocket():
    return PocketLM().load()


def test_size_and_shape(pocket):
    model, params = pocket
    assert os.path.getsize(POCKET_LM) <= 8_000_000
    assert (model.d_model, model.context, model.vocab) == (256, 256, 257)
    assert set(model.sites.values()) == {256}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_heldout_bits_per_byte_are_below_gzip(pocket):
    documents = itertools.islice(Stdlib().documents("heldout"), 30)
    sample = list(chunk(documents, encode, 256, BOS))[::8][:128]
    text = b"".join(bytes(c.tokens[1 : c.length].tolist()) for c in sample)
    bits = bits_per_byte(*pocket, sample)
    assert 0.5 < bits < min(1.8, 8 * len(gzip.compress(text, 9)) / len(text) - 0.3)


def test_it_continues_code(pocket):
    model, params = pocket
    start = np.concatenate([[BOS], encode("import sys\n\ndef main(self, name):\n    retu")])
    out = np.asarray(model.generate(params, start[None].astype(np.int32), 3, temperature=0.0))
    assert decode(out[0]).endswith("    return ")
