"""The package as a user meets it: names, command, version, and what README says of it."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import saex

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/saex train "
    "--config=experiments/quickstart.py --workdir=runs/quickstart",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
)


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "saex.cli", *args], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", saex.__all__)
def test_public_names_are_documented(name):
    assert getattr(saex, name) is not None
    assert name == "SAES" or getattr(saex, name).__doc__.strip()


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = saex.nonsense


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == saex.__version__
    assert f"## [{saex.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    try:
        assert importlib.metadata.version("saex") == saex.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("saex is importable here but not installed")


def test_help_names_the_commands():
    done = run("--help")
    assert done.returncode == 0
    for command in ("train", "eval", "report", "info", "pretrain"):
        assert command in done.stdout


def test_a_missing_config_is_one_message_and_exit_code_2(tmp_path):
    done = run("train", f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    assert "none.py" in done.stderr and "Traceback" not in done.stderr


def test_the_base_installation_pulls_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = " ".join(project["dependencies"] + extras["test"])
    assert not re.search(r"\b(torch|tensorflow|clu|transformers)\b", names)


# ------------------------------------------------------------------------------------------- README


def test_readme_has_the_two_commands():
    for command in COMMANDS:
        assert f"```\n{command}\n```" in README


def table(heading):
    """The first cells of the table under a heading, in backquotes."""
    body = README.split(f"## {heading}")[1].split("\n## ")[0]
    return [re.findall(r"`([^`]+)`", line) for line in body.splitlines() if line.startswith("| ")]


def test_readme_names_files_that_are_there():
    names = [
        name for cells in table("Where things are") for name in cells if "." in name or "/" in name
    ]
    assert len(names) > 20
    folders = [ROOT, ROOT / "saex", ROOT / "saex" / "sae", ROOT / "experiments"]
    gone = [n for n in names if not any((folder / n).exists() for folder in folders)]
    assert gone == []


def test_readme_names_every_part_of_the_package():
    named = " ".join(" ".join(cells) for cells in table("Where things are"))
    parts = [p for p in (ROOT / "saex").iterdir() if not p.name.startswith("_")]
    parts = [p.name for p in parts if p.is_dir() or p.suffix == ".py"]
    assert [p for p in parts if p not in named and p != "typing.py"] == []


def test_readme_names_tables_that_are_there():
    from saex import data, evals, models, sae, sharding

    tables = {"SAES": sae, "SOURCES": data, "MODELS": models, "EVALS": evals, "STORE": sharding}
    body = README.split("## Where do I add")[1].split("\n## ")[0]
    for name, module in tables.items():
        assert f"`{name}`" in body and isinstance(getattr(module, name), dict)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
