"""The page docs/reproductions.md, from the records of all studies.

python experiments/reproductions/table.py
"""

import json
import pathlib
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "reproductions.md"
HEAD = """# Does each method do what its paper says?

One row a study: the claim in a sentence, the paper's figure, ours, and the verdict. "Our reading"
stands where the method was built without the paper's own text at hand. A study says beforehand when
it would say no, names its baseline and how that was tuned, and runs at least three seeds; an effect
counts if it is larger than the spread of the seeds. A "no" counts only where the method passed a
positive control, data on which it must win; else the study is "not settled". They are small,
minutes on 2 CPU cores: with pocket-lm's activations, or data whose features are known. With
`pip install -e '.[studies]'`, `python experiments/reproductions/NAME.py` runs one; `figures.py` and
`table.py` beside it draw what the records hold and write this page.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    found = records()
    lines = ["| study | claim | the paper's figure | ours | verdict |", "|---|---|---|---|---|"]
    lines += [row(record) for record in found]
    if missing := unrecorded(found):
        lines += ["", f"Written, without a record yet: {', '.join(missing)}."]
    return "\n".join([HEAD, *lines, "", *map(section, found)])


def unrecorded(found: list[dict[str, Any]]) -> list[str]:
    """Studies that were not run, or whose control is to be found."""
    return sorted({*studies()} - {record["name"] for record in found})


def studies() -> list[str]:
    """All studies, by name."""
    return sorted(f.stem for f in HERE.glob("*.py") if "\nSTUDY = " in f.read_text())


def records() -> list[dict[str, Any]]:
    """All committed records, by name."""
    return [json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))]


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"[{record['name']}](#{record['name']})"
    texts = [record[key] for key in ("claim", "paper", "ours")]
    cells = [name, *texts, f"**{record['verdict']}**"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def section(record: dict[str, Any]) -> str:
    """What stands behind a row."""
    name, seeds = record["name"], len({run["seed"] for run in record["runs"]})
    parts = [
        f"## {name}",
        f"{record['source']}. Methods: {', '.join(f'`{m}`' for m in record['methods'])}. "
        f"{record['why']}",
        f"- Baseline: {record['baseline']}.\n- It would have said no: {record['says_no_if']}."
        + control(record)
        + rates(record),
        f"`{record['command']}`; {seeds} seeds, {time(record)}; {record['machine']}, "
        f"JAX {record['jax']}, {record['date']}{commit(record)}.",
    ]
    if (HERE / "results" / f"{name}.svg").exists():
        parts.append(f"![{name}](../experiments/reproductions/results/{name}.svg)")
    return "\n\n".join(parts) + "\n"


def control(record: dict[str, Any]) -> str:
    """What the method did where it must win; nothing where that was not asked."""
    if not record["control"]:
        return ""
    passed = {True: " (passed)", False: " (not passed)", None: ""}[record.get("control_passed")]
    return f"\n- Positive control{passed}: {record['control'].rstrip('.')}."


def rates(record: dict[str, Any]) -> str:
    """Learning rates, where the record says how they were found."""
    grids = [grid for grid in record.get("rates", []) if grid.get("chosen", True)]
    if not grids:
        return ""
    edge = sorted({named(grid) for grid in grids if grid["edge"]})
    found = dict.fromkeys(f"{named(grid)} {grid['lr']:g} of {tried(grid)}" for grid in grids)
    return f"\n- Rates: {'; '.join(found)}. On an edge: {', '.join(edge) or 'none'}."


def named(grid: dict[str, Any]) -> str:
    """Whose rate it is, and on which of several data."""
    return f"{grid['of']} ({grid['data']})" if "data" in grid else grid["of"]


def tried(grid: dict[str, Any]) -> str:
    return ", ".join(f"{lr:g}" for lr in sorted(map(float, grid["tried"])))


def commit(record: dict[str, Any]) -> str:
    return f", commit {record['commit']}" if "commit" in record else ""


def time(record: dict[str, Any]) -> str:
    """What a study took; processor time where the machine had other work beside it."""
    used = record.get("cpu_seconds")
    return f"{record['seconds']} s" if used is None else f"{used} s of processor time"


if __name__ == "__main__":
    main()
