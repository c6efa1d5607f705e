"""Labels of comments: the right bytes, in the right rows of a store."""

import numpy as np
import pytest

from saex import loop, metrics
from saex.data import Store
from saex.data.comments import StdlibComments, in_comments
from saex.models.tokenizer import Bytes
from tests import runs


def labelled(text):
    """The labelled bytes, with a dot for each that is not."""
    data, label = text.encode(), in_comments(text)
    assert label.dtype == np.int8 and len(label) == len(data)
    return bytes(b if on else ord(".") for b, on in zip(data, label)).decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1  # one\nb\n", ".......# one..."),
        ("s = '# no'\n", "..........."),
        ('"""\n# no\n"""\n# yes', ".............# yes"),
        ("x = 'é'  # ü\r\ny", "..........# ü..."),
        ("# first\n(((", "# first...."),
        ("", ""),
    ],
)
def test_comments_and_nothing_else_are_labelled(text, expected):
    assert labelled(text) == expected


def folder(tmp_path):
    for i in range(40):
        text = f"a = {i}  # number {i}, at the end of its line\n" * 4
        (tmp_path / f"module_{i}.py").write_text(text)
    return StdlibComments(str(tmp_path))


def test_contexts_carry_the_labels_of_their_bytes(tmp_path):
    source = folder(tmp_path)
    documents = list(source.documents("train"))
    pieces = list(source.chunks("train", 32, Bytes))
    assert {p.document for p in pieces} == set(range(len(documents)))
    for piece in pieces:
        expected = in_comments(documents[piece.document].text)
        held = piece.columns["label"]
        assert held[0] == 0 and not held[piece.length :].any()
        part = expected[piece.start : piece.start + piece.length - 1]
        np.testing.assert_array_equal(held[1 : piece.length], part)
    few = list(source.chunks("train", 32, Bytes, wanted={2}))
    assert {p.document for p in few} == {2} and 0 < len(few) < len(pieces)


def test_other_tokens_are_refused(tmp_path):
    class Words:
        bos = 0

        @staticmethod
        def encode(text):
            return list(range(len(text.split())))

    with pytest.raises(ValueError, match=r"module_.*comments are labelled byte by byte"):
        next(folder(tmp_path).chunks("train", 32, Words))


@pytest.mark.methods
def test_a_guided_run_reads_the_labels(tmp_path):
    (tmp_path / "code").mkdir()
    folder(tmp_path / "code")
    runs.write_model(tmp_path / "model.safetensors")
    taught = {"name": "guided", "d_in": 16, "n": 64, "k": 4, "dead_after_tokens": 200}
    text = {"name": "stdlib_comments", "path": str(tmp_path / "code")}
    loop.train(runs.config(tmp_path, sae=taught, text=text), tmp_path / "run")
    store = Store.open(tmp_path / "run/store/train")
    tokens, label = (store.read(name, 0, store.rows) for name in ("tokens", "label"))
    assert label[tokens == ord("#")].all() and not label[tokens == ord("=")].any()
    assert 0 < metrics.read(tmp_path / "run")[-1]["label_accuracy"] < 1
