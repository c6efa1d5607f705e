"""docs/how-to/huggingface.md: what it says resolves; with torch, a small model goes through."""

import json
import pathlib
import re

import pytest

from saex import cli, config
from saex.data.chat import ROLES
from saex.models import HuggingFace
from saex.models.huggingface import FAMILIES
from tests import runs
from tests.models import tiny

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "huggingface.md").read_text()
CONFIG, SITES, USE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SMALL = {
    "sae.d_in": 16, "sae.n": 64, "sae.k": 4, "site": "model.layers.1", "steps": 4,
    "stream.batch": 64, "harvest.rows": 1500, "harvest.heldout_rows": 600, "harvest.batch": 4,
    "subject.device": "cpu", "eval.controls": False, "report.enabled": False,
}  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONFIG)
    return tmp_path


def test_its_configuration_resolves(mine):
    resolved = config.load("mine.py")
    assert resolved.subject == HuggingFace("my-model", "bfloat16")
    rules = re.findall(r'^"stream": (\{.*\}),', PAGE, flags=re.MULTILINE)
    assert len(rules) == 2
    for rule in rules:
        (numbers,) = config.literal(rule)["exclude"].values()
        assert all(0 <= n < len(ROLES) for n in numbers) and ROLES.index("assistant") not in numbers


def test_its_tables_are_complete():
    fields = set(re.findall(r"^\| `([a-z]+)` \|", PAGE, flags=re.MULTILINE))
    assert fields == {"dtype", "context", "bos", "device"}
    words = PAGE.lower().replace("-", "").replace(" ", "")
    for family in FAMILIES:
        name = re.sub(r"(?<=[a-z])[0-9]*(_text)?$", "", family).replace("_", "")
        assert name in words, f"{family} is not on the page"


def test_a_small_model_goes_through(mine, capsys):
    tiny.save(mine / "my-model", "llama")
    runs.write_text(mine / "texts")
    overrides = [f"--config.{key}={value}" for key, value in SMALL.items()]
    assert cli.main(["train", "--config=mine.py", "--workdir=runs/mine", *overrides]) == 0
    assert json.loads((mine / "runs/mine/DONE.json").read_text())["steps"] == 4
    capsys.readouterr()
    names = {}
    exec(SITES, names)
    assert "model.layers.1 16\n" in capsys.readouterr().out
    exec(USE.replace("layers.8", "layers.1"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("'<s>' [") and any(line.startswith("' return'") for line in lines)
