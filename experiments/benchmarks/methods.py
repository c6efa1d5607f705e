"""Every method of experiments/methods trained by its command, and what came out.

    python experiments/benchmarks/methods.py

Each configuration runs as its header says, one after the other, into a folder under ``--runs``; a
store is harvested once for all that read the same columns. A run that is done is not run again, so
the command may be stopped and given anew; ``--only`` does some, and leaves the other rows of the
table as they are, each with its date. The scores are those of the
evaluation that ends each run, on held-out text; seconds are those of the command, harvest included
where it made one.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from measure import REPO, where, write

HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = HERE.parent / "methods"
# Whose store a method reads where that is not topk's, which has the quickstart's columns.
STORES = {
    **{name: name for name in ("crosscoder", "transcoder", "guided", "gradient_topk")},
    "batch_crosscoder": "crosscoder",
    "multi_layer": "crosscoder",
    "layer_groups": "crosscoder",
    "skip_transcoder": "transcoder",
    "crosscoder_models": "crosscoder_models",
}
SCORES = ("fvu", "l0", "cosine", "loss_recovered", "dead_fraction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = sorted((f.stem for f in CONFIGS.glob("*.py")), key=lambda m: (STORES.get(m) != m, m))
    every.remove("topk")
    parser.add_argument("--only", nargs="+", default=["topk", *every], metavar="METHOD")
    parser.add_argument("--runs", default="runs/methods")
    parser.add_argument("--out", default=str(HERE / "results" / "methods"))
    args = parser.parse_args()
    for name in args.only:
        ran(name, pathlib.Path(args.runs))
    found = {n: found_in(pathlib.Path(args.runs) / n) for n in ["topk", *every]}
    record = where() | {"runs": before(args.out) | {n: one for n, one in found.items() if one}}
    write(args.out, record, table(record))
    print(table(record))


def before(out: str) -> dict[str, Any]:
    """The runs of the last record, where there is one."""
    file = pathlib.Path(out).with_suffix(".json")
    record = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    return {name: {"date": record.get("date"), **one} for name, one in record["runs"].items()}


def ran(name: str, runs: pathlib.Path) -> None:
    """The command of a configuration, unless it is done."""
    workdir = runs / name
    if (workdir / "seconds.json").exists():
        return
    saex = str(pathlib.Path(sys.executable).with_name("saex"))
    if name == "crosscoder_models":  # whose header says so; done at once where it was done before
        early = ["--config=experiments/pocket_lm.py", "--config.steps=120", "--workdir=runs/early"]
        subprocess.run([saex, "pretrain", *early], check=True, cwd=REPO)
    argv = [saex, "train", f"--config={CONFIGS / name}.py"]
    argv.append(f"--workdir={workdir}")
    owner = STORES.get(name, "topk")
    if owner != name:
        argv.append(f"--config.store={runs / owner / 'store'}")
    started = time.perf_counter()
    subprocess.run(argv, check=True, cwd=REPO)
    seconds = {"seconds": round(time.perf_counter() - started), "store": owner}
    seconds["date"] = datetime.date.today().isoformat()
    (workdir / "seconds.json").write_text(json.dumps(seconds))
    print(name, found_in(workdir), flush=True)


def found_in(workdir: pathlib.Path) -> dict[str, Any]:
    """Scores and seconds of a finished run; {} of another."""
    if not (workdir / "seconds.json").exists():
        return {}
    scores = json.loads((workdir / "eval.json").read_text())
    kept = {name: scores.get(name) for name in SCORES}
    return {**json.loads((workdir / "seconds.json").read_text()), **kept}


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per method."""
    lines = [
        "# Every method by its command",
        "",
        "`python experiments/benchmarks/methods.py`, some rows anew by `--only`, at their dates.  ",
        f"{record['machine']}. Methods with a penalty have the L0 that came out.",
        "",
        "| method | FVU | L0 | cosine | loss recovered | dead | seconds | with harvest | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in sorted(record["runs"].items()):
        cells = ["" if one[s] is None else f"{one[s]:.4g}" for s in SCORES]
        cells += [str(one["seconds"]), "yes" if one["store"] == name else "", one["date"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
