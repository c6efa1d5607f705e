"""Studies of methods against their papers: what they say beforehand, and the page."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from saex.sae import SAES

HERE = pathlib.Path(__file__).parents[2] / "experiments" / "reproductions"


def table():
    spec = importlib.util.spec_from_file_location("table", HERE / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STUDIES = table().studies()
RECORDS = {record["name"]: record for record in table().records()}


def test_the_page_is_what_the_records_say():
    assert table().PAGE.read_text() == table().page(), "python experiments/reproductions/table.py"


def test_every_study_has_a_record_and_a_figure_and_every_method_a_study():
    assert set(RECORDS) == set(STUDIES)
    assert {method for record in RECORDS.values() for method in record["methods"]} == set(SAES)
    figures = {file.stem for file in (HERE / "results").glob("*.svg")}
    assert figures == set(STUDIES), "python experiments/reproductions/figures.py"


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_record_says_what_its_study_says(name):
    record = RECORDS[name]
    tree = ast.parse((HERE / f"{name}.py").read_text())
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    said = next(c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Study")
    for field in said.keywords:
        try:
            value = ast.literal_eval(field.value)
        except ValueError:
            continue  # made of other names
        assert record[field.arg] == (list(value) if isinstance(value, tuple) else value), field.arg
    assert len({run["seed"] for run in record["runs"]}) >= 3
    assert record["holds"] or record["control"], "a no first passes a positive control"
    assert ("our reading" in record["verdict"]) != record["own_text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs(name):
    subprocess.run([sys.executable, HERE / f"{name}.py", "--small"], check=True, timeout=600)
