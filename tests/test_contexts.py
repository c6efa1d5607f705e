"""Contexts: packed into full ones, and put beside others of like length."""

import dataclasses
import threading
import tracemalloc

import numpy as np
import pytest

from saex.contexts import Contexts, alike, choose, enough, in_batches, packed, rows_of, tokens_of
from saex.data.text import Chunk, Document
from saex.harvest import Harvest


def chunks(lengths, context=16):
    """Token ids say which document and position they are of."""
    out = []
    for number, length in enumerate(lengths):
        tokens, mark = np.zeros(context, np.int32), np.zeros(context, np.int8)
        tokens[:length] = 100 * number + np.arange(length)
        mark[:length] = np.arange(length) % 3
        out.append(Chunk(tokens, length, number, 0, {"mark": mark}))
    return out


def test_packed_contexts_hold_whole_pieces_in_the_fullest_context_with_room():
    lengths = [5, 16, 3, 1, 16, 9, 2, 7]
    before, after = chunks(lengths), packed(chunks(lengths), 16)
    held = [list(dict.fromkeys(c.columns["document"][: c.length].tolist())) for c in after]
    assert held == [[0, 2, 3, 6], [1], [4], [5, 7]]
    tokens = [t for c in after for t in c.tokens[: c.length].tolist()]
    assert sorted(tokens) == sorted(t for c in before for t in c.tokens[: c.length].tolist())
    for c in after:
        position = c.columns["position"]
        assert position.dtype == np.int32 and not position[c.length :].any()
        assert (position[: c.length] == c.tokens[: c.length] % 100).all()
        assert c.tokens.dtype == np.int32 and not c.tokens[c.length :].any()
        document = c.columns["document"][: c.length]
        assert document.dtype == np.int32 and (document == c.tokens[: c.length] // 100).all()
        assert c.document == document[0]
        assert (c.columns["mark"][: c.length] == c.tokens[: c.length] % 100 % 3).all()
        assert c.columns["mark"].dtype == np.int8
    assert packed([], 16) == []


def test_many_short_pieces_leave_little_padding():
    lengths = np.random.default_rng(0).integers(2, 257, 2000).tolist()
    after = packed(chunks(lengths, 256), 256)
    assert sum(lengths) / (len(after) * 256) > 0.95


@pytest.mark.parametrize("count", [0, 3, 8, 1000, 1003])
def test_contexts_of_like_length_are_read_together(count):
    lengths = np.random.default_rng(0).integers(2, 400, count)
    documents = np.arange(count, dtype=np.int32)
    tokens = np.repeat(documents, lengths)
    contexts = Contexts(400, tokens, lengths, documents, {"role": tokens})
    one = alike(contexts, 4, seed=0)
    assert sorted(one.documents.tolist()) == documents.tolist()
    assert (one.lengths == lengths[one.documents]).all()
    assert (one.tokens == np.repeat(one.documents, one.lengths)).all()
    assert (one.columns["role"] == one.tokens).all()
    again, other = alike(contexts, 4, seed=0), alike(contexts, 4, seed=1)
    assert (again.documents == one.documents).all()
    if count < 1000:
        return
    assert (other.documents != one.documents).any()
    assert padding(one, 4) < 0.05 < 0.4 < padding(contexts, 4)
    means = one.lengths[: count // 4 * 4].reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2, "short ones come first"


def padding(contexts, batch):
    """Padding, over what counts."""
    lengths = contexts.lengths[: len(contexts) // batch * batch].reshape(-1, batch)
    return (lengths.max(axis=1) * batch).sum() / lengths.sum() - 1


def test_what_is_not_compiled_is_spared_padding():
    lengths = np.array([3, 64, 65, 200, 7])
    tokens = np.ones(lengths.sum(), np.int32)
    contexts = Contexts(200, tokens, lengths, np.arange(5, dtype=np.int32), padding=-1)
    shapes = [tokens_of(contexts, i, j, 4, False).shape for i, j in ((0, 2), (1, 3), (3, 5))]
    assert shapes == [(2, 64), (2, 128), (2, 200)]
    read = tokens_of(contexts, 4, 5, 4, True)
    assert read.shape == (4, 200) and (read[0] == [1] * 7 + [-1] * 193).all()
    rows = rows_of(contexts, 0, 3, {"x": np.ones((4, 128, 7))})
    assert rows["x"].shape == (132, 7) and rows["position"].max() == 64


def test_of_a_large_text_only_as_much_as_needed_is_wanted():
    sizes = np.random.default_rng(0).integers(0, 2000, 1000).tolist()
    documents = [Document(str(i), "x" * int(size)) for i, size in enumerate(sizes)]
    assert enough(documents, sum(sizes), None, 0) is None
    wanted = enough(documents, 1000, None, 0)
    assert 16_000 <= sum(sizes[i] for i in wanted) < 20_000
    assert np.mean(list(wanted)) == pytest.approx(500, abs=200), "the first documents only"
    assert enough(documents, 1000, None, 0) == wanted != enough(documents, 1000, None, 1)
    cut = enough(documents, 1000, 100, 0)
    assert sum(min(sizes[i], 100) for i in cut) >= 16_000 and len(cut) > 2 * len(wanted)


class Spy:
    """A tokenizer of words that notes what it was given."""

    bos = 0

    def __init__(self):
        self.read = []

    def encode(self, text):
        self.read.append(text)
        return np.full(len(text.split()), 7, np.int32)


class Words:
    """Many documents; the model's tokenizer is the only one that reads them."""

    def documents(self, split):
        for i in range(400):
            yield Document(str(i), f"{i} " + "word " * 50)


def test_budget_is_met_though_few_documents_are_read():
    model = dataclasses.make_dataclass("Model", ["tokenizer"])(Spy())
    cfg = Harvest(rows=500, context=20, batch=4)
    chosen = choose(model, Words(), "train", cfg, seed=0)
    read = [text for text in model.tokenizer.read if text]
    assert 480 < chosen.lengths.sum() <= 500 and 20 < len(read) < 60
    numbers = {int(text.split()[0]) for text in read}
    assert set(chosen.documents.tolist()) <= numbers and max(numbers) > 200


TWENTY = Contexts(2, np.arange(40), np.full(20, 2), np.zeros(20, np.int32))


def test_batches_come_in_order_and_the_model_runs_ahead():
    begun = [threading.Event() for _ in range(10)]

    def forward(tokens):
        begun[tokens[0, 0] // 4].set()
        return {"x": tokens * 10}

    ends, values = [], []
    for end, rows in in_batches(TWENTY, (0, 20), 2, forward, compiled=True):
        assert all(event.wait(10) for event in begun[: end // 2 + 3])  # while these rows are held
        ends.append(end)
        values += rows["x"].tolist()
    assert ends == list(range(2, 21, 2)) and values == list(range(0, 400, 10))


def test_a_pass_that_fails_ends_the_batches_and_one_that_is_not_wanted_is_not_begun():
    passes = []

    def forward(tokens):
        passes.append(len(passes))
        if len(passes) == 8:
            raise RuntimeError("the eighth")
        return {"x": tokens}

    made = in_batches(TWENTY, (0, 20), 2, forward, compiled=True)
    with pytest.raises(RuntimeError, match="the eighth"):
        list(made)
    passes.clear()
    made = in_batches(TWENTY, (0, 20), 2, forward, compiled=True)
    next(made)
    made.close()
    count = len(passes)
    assert count <= 6 and list(made) == [] and len(passes) == count


class Letters:
    """A text that is made as it is read: a million characters, 4 MB as tokens."""

    def documents(self, split):
        for i in range(50):
            yield Document(str(i), chr(97 + i % 26) * 20_000)


class Model:
    """Reads bytes."""

    context = 64


def test_of_a_large_text_only_what_is_chosen_is_kept_in_memory():
    tracemalloc.start()
    chosen = choose(Model(), Letters(), "train", Harvest(rows=2_000, context=64), seed=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1_900 < chosen.lengths.sum() <= 2_000
    assert (chosen.tokens[chosen.starts[:-1] + 1] == 97 + chosen.documents % 26).all()
    assert most < 1e6


class Chats(Words):
    """Short ones, each a context of its own."""

    def chunks(self, split, context, tokenizer, wanted):
        for i, _ in enumerate(self.documents(split)):
            tokens = np.full(context, 0, np.int32)
            tokens[:10] = i
            yield Chunk(tokens, 10, i, 0, {"role": np.full(context, 3, np.int8)})


def test_of_short_contexts_no_padding_is_kept_in_memory():
    model = dataclasses.make_dataclass("Model", ["tokenizer"])(Spy())
    tracemalloc.start()
    chosen = choose(model, Chats(), "train", Harvest(rows=3_000, context=8192), seed=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(chosen) == 300 and (chosen.tokens == np.repeat(chosen.documents, 10)).all()
    assert chosen.columns["role"].tolist() == [3] * 3_000
    assert most < 1e6
