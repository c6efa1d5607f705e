"""docs/how-to/live.md: the numbers it names follow from the defaults."""

import pathlib
import re

import numpy as np

from saex.config import load
from saex.data import Store
from saex.data.exclude import kept_rows
from saex.data.lanes import Lanes
from saex.harvest import Harvest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "live.md").read_text()


class Passes(Store):
    """As much of a live store as lanes ask for: passes of full contexts of pocket-lm."""

    def __init__(self):
        pass

    rows, windows_held, columns = 200 * 32 * 256, 2, {}
    chunk_rows = 32 * 256

    def chunk_segments(self):
        return np.zeros(200, np.int64)


def distinct(contexts, batch):
    """Contexts among `batch` rows of 255 each, drawn from all without replacement; a mean of 20."""
    rng = np.random.default_rng(0)
    draws = [rng.choice(contexts * 255, batch, replace=False) // 255 for _ in range(20)]
    return np.mean([len(np.unique(draw)) for draw in draws])


def test_the_mixing_of_the_defaults_is_what_it_says():
    passes, contexts, batch, window, found, share, more, better = map(
        int,
        re.search(
            r"said \((\d+) passes of (\d+) contexts, batches of (\d+)\) a window is (\d+) "
            r"contexts, and a batch has rows of (\d+) of them, (\d+)% of the 4096 .*"
            r"`stream.window=(\d+)`, with eight times the memory, makes that (\d+)%",
            PAGE.replace("\n", " "),
        ).groups(),
    )
    config = load(str(ROOT / "experiments" / "quickstart.py"))
    assert (contexts, batch) == (Harvest().batch, config.stream.batch) == (32, 4096)
    assert config.harvest.batch == contexts and config.stream.window == 0
    ends = Passes.chunk_rows * np.arange(1, 201)
    kept = kept_rows(np.stack([ends - Passes.chunk_rows, ends], axis=1), None, {})
    lanes = Lanes(
        Passes(), [kept], [], batch=batch, lanes=config.stream.lanes, window=0, seed=0,
        checksums=False,
    )  # fmt: skip
    assert lanes.rows == passes * Passes.chunk_rows and window == passes * contexts
    lanes.close()
    assert abs(distinct(window, batch) - found) < 10
    assert round(100 * found / batch) == share and more == 8 * passes
    assert abs(100 * distinct(8 * window, batch) / batch - better) < 0.7
