"""The monosemanticity score on codes whose answer is known."""

import numpy as np
import pytest

from saex.evals.fms import fms


def noise(rows=2000, n=12, seed=0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(rows, n)), 0).astype(np.float32)


def best_threshold(z, y):
    """Accuracy of the threshold of least impurity, by trying all (slowly), and its latent."""
    found = (np.inf, 0, 0.0)
    for i in range(z.shape[1]):
        for t in np.unique(z[:, i])[:-1]:
            sides = [y[z[:, i] > t], y[z[:, i] <= t]]
            impurity = sum(2 * s.mean() * (1 - s.mean()) * len(s) for s in sides)
            right = sum(max(s.sum(), len(s) - s.sum()) for s in sides) / len(y)
            found = min(found, (impurity, i, right))
    return found[2], found[1]


def test_a_concept_that_is_one_latent_scores_1():
    z = noise()
    scores = fms(z, z[:, 5] > 0.4)
    assert scores["latent"] == 5 and scores["accuracy"] == 1 and scores["global"] == 1
    assert scores["fms@1"] > 0.93 and scores["fms@5"] > 0.9


def test_a_concept_that_nobody_knows_scores_little():
    z = noise()
    scores = fms(z, np.random.default_rng(3).integers(0, 2, len(z)), depth=3)
    assert 0.5 <= scores["accuracy"] < 0.6 and scores["fms@1"] < 0.35


def test_a_second_latent_that_knows_it_lowers_the_local_score_alone():
    z = noise()
    label = z[:, 5] > 0.4
    z[:, 2] = np.where(label, 1.0, 0.0)
    scores = fms(z, label)
    assert scores["accuracy"] == scores["global"] == 1 and scores["local@1"] == 0
    assert scores["fms@1"] == 0.5 and scores["fms@5"] > 0.9


def test_a_concept_of_two_latents_lowers_the_global_score():
    z = noise()
    label = (z[:, 1] > 0) & (z[:, 2] > 0)
    scores = fms(z, label)
    assert 0.75 < scores["accuracy"] < 0.95 and scores["global"] < 0.9
    assert scores["fms@1"] < 0.8


def test_the_first_threshold_is_the_best():
    z = noise(rows=60, n=4)
    label = (z[:, 1] + 0.5 * noise(60, 1, seed=4)[:, 0] > 0.5).astype(int)
    some = np.concatenate([np.flatnonzero(label == c)[: min(np.bincount(label))] for c in (0, 1)])
    scores = fms(z[some], label[some], removed=())
    accuracy, latent = best_threshold(z[some], label[some])
    assert (scores["accuracy"], scores["latent"]) == (pytest.approx(accuracy), latent)


def test_classes_are_balanced_and_unknown_labels_left_out():
    z = noise()
    label = np.where(z[:, 3] > 1.2, 1, 0)
    label[::5] = -1
    scores = fms(z, label)
    assert scores["accuracy"] == 1 and scores["latent"] == 3
    with pytest.raises(ValueError, match="0 rows with the concept, 2000 without"):
        fms(z, np.zeros(len(z)))
