"""Studies of methods against their papers: what they say beforehand, and the page."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

from saex.sae import SAES

HERE = pathlib.Path(__file__).parents[2] / "experiments" / "reproductions"


def module(name):
    """One of the files beside the studies, which import each other by name."""
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(HERE))


def table():
    return module("table")


def record_py():
    return module("record")


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
    if record["holds"] is False:
        assert record["control"] and record["control_passed"] is True, "a no passes a control first"
    assert ("our reading" in record["verdict"]) != record["own_text"]


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_learning_rates_are_of_three_or_more_and_say_if_they_lie_on_an_edge(name):
    for grid in RECORDS[name].get("rates", []):
        rates = [float(lr) for lr in grid["tried"]]
        assert len(rates) >= 3 and grid["lr"] in rates
        assert grid["edge"] == (grid["lr"] in (min(rates), max(rates)))


def test_a_no_counts_only_after_a_passed_control():
    study = record_py().Study("", (), "", "", "", True, "", "")

    def verdict(holds, control):
        found = record_py().Found(holds, "", "", [], control)
        settled = record_py().settled(study, found)
        assert settled["verdict"] == record_py().verdict(study, settled["holds"])
        return settled["holds"], settled["control_passed"]

    assert verdict(False, (True, "won")) == (False, True)
    assert verdict(False, (False, "lost")) == (None, False)
    assert verdict(False, lambda: (False, "lost")) == (None, False)
    assert verdict(False, "") == (None, False)
    assert verdict(None, (True, "won")) == (None, True)
    assert verdict(True, lambda: pytest.fail("a yes needs no control")) == (True, None)


def test_a_rate_on_the_edge_has_its_neighbour_tried():
    best_rate = module("rates").best_rate
    found = best_rate("m", lambda lr: abs(lr - 0.02), (0.001, 0.003, 0.01))
    assert sorted(found["tried"])[:3] == [0.001, 0.003, 0.01] and len(found["tried"]) == 4
    assert found["lr"] == 0.01 and not found["edge"]
    found = best_rate("m", lambda lr: -lr, (0.001, 0.003, 0.01))
    assert found["edge"] and len(found["tried"]) == 4
    found = best_rate("m", lambda lr: float("nan") if lr > 0.002 else lr, (0.001, 0.003, 0.01))
    assert found["lr"] < 0.001 and found["edge"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs(name):
    subprocess.run([sys.executable, HERE / f"{name}.py", "--small"], check=True, timeout=600)
