import numpy as np

from saex.report.choose import BANDS, FREQUENT, choose, clearness
from saex.report.scan import Scan


def scan_of(fired, top, rows=100_000, total=None):
    fired, top = np.asarray(fired), np.asarray(top, np.float32)
    total = fired.astype(float) if total is None else np.asarray(total, float)
    return Scan(fired, total, rows, top, np.zeros(top.shape, np.int64))


def test_frequent_ones_and_every_band_are_there():
    fired = np.repeat([50_000, 500, 50, 5], 10)
    chosen = choose(scan_of(fired, np.ones((40, 4))), np.arange(40.0), 12, 4)
    whys = [c.why for c in chosen]
    assert len(chosen) == 12 == len({c.latent for c in chosen})
    assert whys.count(FREQUENT) == 2
    assert [whys.count(words) for _, words in BANDS] == [3, 3, 2, 2]
    clearest = [c.latent for c in chosen if c.why == BANDS[1][1]]
    assert clearest == [19, 18, 17]


def test_dead_latents_and_those_of_few_contexts_are_not_shown():
    top = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    chosen = choose(scan_of([5, 5, 0, 5], top), np.zeros(4), 10, 3)
    assert sorted(c.latent for c in chosen) == [0, 3]
    assert choose(scan_of([0, 0], np.zeros((2, 3))), np.zeros(2), 10, 3) == []


def test_where_no_latent_has_enough_contexts_fewer_will_do():
    assert len(choose(scan_of([3, 1], [[1, 1, 0], [1, 0, 0]]), np.zeros(2), 10, 3)) == 1


def test_clear_is_peaked_varied_and_agreeing():
    top = np.full((4, 4), 10.0)
    top[1] = 2.0  # hardly more than its mean
    documents = np.tile(np.arange(4), (4, 1))
    documents[2] = 7  # all from one document
    tokens = np.zeros((4, 4, 2), np.int32)
    tokens[3] = np.arange(8).reshape(4, 2)  # no two peaks alike
    score = clearness(scan_of([10] * 4, top), documents, tokens, 4)
    assert score[0] > max(score[1:])
    plain = clearness(scan_of([10] * 4, top), None, None, 4)
    assert plain[0] == plain[2] == plain[3] > plain[1]


def test_empty_places_do_not_agree():
    top = np.array([[5, 0, 0, 0], [5, 5, 5, 5]], np.float32)
    zeros = np.zeros((2, 4), np.int32)
    score = clearness(scan_of([1, 4], top), zeros, np.zeros((2, 4, 2), np.int32), 4)
    assert np.isfinite(score).all()
    assert score[0] == np.log1p(5) * 2  # one context: one document, agreeing with itself
