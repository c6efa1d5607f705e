"""The code of docs/how-to/harvest.md runs, twice, and what it writes is trained on."""

import importlib.util
import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from saex import cli
from saex.config import literal
from saex.data import Store
from saex.data.split import open_split
from saex.data.stream import Stream

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "harvest.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
(CONFIG,), (USE,), (TORCH,) = (
    [block for block in BLOCKS if word in block] for word in ("get_config", "load_sae", "torch")
)
SKLEARN = importlib.util.find_spec("sklearn") is not None
ARRAYS = [block for block in BLOCKS if block not in (CONFIG, USE, TORCH)]
COMMANDS = re.findall(r"^saex (train .*)$", PAGE.read_text(), flags=re.MULTILINE)


def some_digits():
    """scikit-learn's, or numbers of their kind where it is not installed."""
    if SKLEARN:
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, 1797)
    ink = rng.integers(0, 17, (10, 64)) * (rng.random((10, 64)) < 0.5)
    return np.clip(ink[digits] + rng.integers(-2, 3, (1797, 64)), 0, 16).astype(float), digits


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with `mine.py`, and the namespace of the page's code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONFIG)
    module = types.ModuleType("sklearn.datasets")
    module.load_digits = lambda return_X_y: some_digits()
    datasets = {"sklearn": types.ModuleType("sklearn"), "sklearn.datasets": module}
    for name, one in () if SKLEARN else datasets.items():
        monkeypatch.setitem(sys.modules, name, one)
    return {}


def run(names, *blocks):
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)


def train(command, steps, **changes):
    """The page's command, with fewer steps."""
    changes = {"steps": steps, "eval.controls": False, "report.enabled": False, **changes}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    assert cli.main([*command.split(), *overrides]) == 0
    folder = pathlib.Path(re.search(r"--workdir=(\S+)", command)[1])
    return json.loads((folder / "eval.json").read_text())


def test_the_page_goes_from_arrays_to_a_dictionary(page, capsys):
    images, digits = some_digits()
    run(page, *ARRAYS)
    first, second, third = capsys.readouterr().out.splitlines()
    median = np.median(np.linalg.norm(images, axis=1))
    assert first.split()[0] == "1797"
    assert float(first.split()[1]) == pytest.approx(median, rel=0.005)
    assert second == f"{60 * 3 * 16} {1 / 3} ('cat', 'dog')"
    assert float(third) < 0.02
    store = Store.open("digits")
    assert (store.read("x") == images[number := store.read("document")]).all()
    assert (store.read("digit") == digits[number]).all() and set(number) == set(range(1797))
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path().rglob("*.json")}
    run(page, *ARRAYS)  # finds all complete
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path().rglob("*.json")}
    capsys.readouterr()
    scores = train(COMMANDS[0], steps=40)
    assert scores["step"] == 40 and scores["l0"] <= 5 and 0 < scores["fvu"] < 0.9
    assert scores["rows"] == open_split("digits", "heldout").rows
    run(page, USE)
    assert page["codes"].indices.shape == (5, 5)


def test_the_columns_of_patches_are_aligned_and_rules_find_them(page):
    run(page, *ARRAYS)
    store, acts = Store.open("patches"), page["acts"].astype("bfloat16")
    x, y = store.read("patch_x"), store.read("patch_y")
    time = np.searchsorted((0.1, 0.5, 0.9), store.read("timestep") - 0.01)
    image = store.read("document")
    assert (store.read("x") == acts[image, time, y, x]).all()
    assert len(set(zip(image, time, y, x))) == store.rows == 60 * 3 * 16
    labels = np.array(store.strings("label"))[store.read("label")]
    assert (labels == np.where(image % 3, "cat", "dog")).all()
    sides = [set(open_split("patches", s).read("document")) for s in ("train", "heldout")]
    assert sides[0] | sides[1] == set(range(60)) and not sides[0] & sides[1]
    section = PAGE.read_text().split("## Columns of other kinds")[1].split("\n## ")[0]
    rules = re.findall(r"--config\.stream\.exclude\.(\w+)=\"([^\"]+)\"", section)
    exclude = {name: literal(rule) for name, rule in rules}
    assert set(exclude) == {"patch_x", "label"}
    stream = Stream(batch=64, exclude=exclude).open(store, ["patch_x", "label", "x"], 0)
    assert stream.rows == ((x > 0) & (x < 3) & (labels != "dog")).sum()
    stream.close()


def test_the_page_goes_from_a_model_of_torch_to_a_dictionary(page):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    run(page, TORCH)
    store = Store.open("vision")
    with page["torch"].no_grad():
        expected = page["model"](page["images"]).float().numpy()  # [64, 32, 8, 8]
    n, y, x = (store.read(name) for name in ("document", "patch_y", "patch_x"))
    assert store.complete and len(set(zip(n, y, x))) == store.rows == 64 * 8 * 8
    assert (store.read("x").astype(np.float32) == expected[n, :, y, x]).mean() > 0.99
    digest = store.digest
    run({}, TORCH)
    assert Store.open("vision").digest == digest
    scores = train(COMMANDS[1], steps=20)
    assert scores["step"] == 20 and 0 < scores["fvu"] < 1
