"""The code of docs/how-to/harvest.md runs, and what it writes can be streamed."""

import pathlib
import re

from saex.data import Store
from saex.data.split import open_split
from saex.data.stream import Stream

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "harvest.md"


def test_the_page_writes_a_store_that_streams(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("20000 ")
    assert float(second.split()[0]) < 0.02 and second.endswith("('even', 'odd')")
    store = Store.open("digits")
    assert store.complete and sorted(store.read("document").tolist()) == list(range(20_000))
    train = open_split("digits", "train")
    batches = Stream(batch=1024).open(train, {"x": "x"}, seed=0)
    assert batches.gather(0, 1024)["x"].shape == (1024, 64)
    assert batches.info["documents_per_batch"] == 1024
    batches.close()
