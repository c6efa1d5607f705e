"""Every dictionary has a configuration that resolves, and a section that says when to choose it."""

import pathlib
import re

import pytest

from saex.config import load
from saex.sae import SAES

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ROOT / "experiments" / "methods"


@pytest.mark.parametrize("name", sorted(SAES))
def test_a_method_trains_from_its_file(name):
    config = load(str(METHODS / f"{name}.py"))
    assert type(config.sae) is SAES[name]


@pytest.mark.parametrize("file", sorted(METHODS.glob("*.py")), ids=lambda f: f.stem)
def test_the_commands_of_a_file_are_right(file):
    said = re.findall(r"--config=(\S+?\.py)(?::(\w+))?[\s`.]", file.read_text())
    assert (f"experiments/methods/{file.name}", "") in said
    for path, arg in said:
        assert (ROOT / path).exists(), path
        if path.startswith("experiments/methods"):
            load(f"{ROOT / path}:{arg}" if arg else str(ROOT / path))


def test_every_method_has_its_section():
    sections = re.findall(r"^## .*\(`(\w+)`\)$", (ROOT / "docs" / "methods.md").read_text(), re.M)
    assert sorted(sections) == sorted(SAES)
