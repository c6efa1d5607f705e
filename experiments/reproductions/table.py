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
counts if it is larger than the spread of the seeds. They are small, minutes on 2 CPU cores: with
pocket-lm's activations, or data whose features are known. With `pip install -e '.[studies]'`,
`python experiments/reproductions/NAME.py` runs one; `figures.py` and `table.py` beside it draw what
the records hold and write this page.
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
        + (f"\n- Positive control: {record['control']}" if record["control"] else ""),
        f"`{record['command']}`; {seeds} seeds, {time(record)}; "
        f"{record['machine']}, JAX {record['jax']}, {record['date']}.",
    ]
    if (HERE / "results" / f"{name}.svg").exists():
        parts.append(f"![{name}](../experiments/reproductions/results/{name}.svg)")
    return "\n\n".join(parts) + "\n"


def time(record: dict[str, Any]) -> str:
    """What a study took; processor time where the machine had other work beside it."""
    used = record.get("cpu_seconds")
    return f"{record['seconds']} s" if used is None else f"{used} s of processor time"


if __name__ == "__main__":
    main()
