"""The table of ``quality.py``: a section for each method, a line for each library."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HEAD = (
    "| library | rate | seeds | L0 | FVU (mean ± sd) | per seed | saex / this | cosine "
    "| loss recovered | dead | s | times saex's |"
)
Found = Mapping[str, Mapping[str, Any]]


def table(found: Mapping[str, Found], facts: Mapping[str, Any]) -> str:
    """Markdown. ``found``: method -> library -> {"rate", "seeds": [scores of a seed], "why"}."""
    s = facts["settings"]
    lines = [
        "# Quality against the peers",
        "",
        f"d {s['d']}, n {s['n']}, {s['steps']} steps of {s['batch']} rows, {s['warmup']} of "
        f"warm-up and {s['decay']} of decay. Methods with a penalty or a threshold are read at an "
        f"L0 of {s['l0']}, between two runs; TopK and transcoders have it as k, and the L0 that "
        "was measured (k without the latents at 0). Scores on held-out rows in raw units, by "
        "thresholds, mean ± standard deviation over seeds; rates chosen on other held-out rows. A "
        "tie: not all seeds of the one are on one side of all of the other.",
        "",
        f"`{facts['command']}`  ",
        f"{facts['date']}, {facts['machine']}; {', '.join(versions(found))}",
        "",
    ]
    for method, libraries in found.items():
        if libraries:
            lines += [f"## {method}", "", HEAD, "|" + "---|" * 12]
            lines += [_line(name, one, libraries.get("saex")) for name, one in libraries.items()]
            lines += ["", verdict(libraries), ""]
    return "\n".join(lines)


def _line(name: str, one: Mapping[str, Any], saex: Mapping[str, Any] | None) -> str:
    if not one["seeds"]:
        return f"| {name} | – | 0 | {one['why']} |" + " – |" * 8
    fvu = _of(one, "fvu")
    cells = [name, f"{one['rate']:.3g}", f"{len(fvu)}", f"{_mean(one, 'l0'):.1f}"]
    cells += [_spread(fvu)]
    cells += [" ".join(f"{v:.5f}" for v in fvu)]
    same = bool(saex and saex["seeds"])
    cells += [f"{_mean(saex, 'fvu') / _mean(one, 'fvu'):.4f}" if same else "–"]
    cells += [_spread(_of(one, "cosine")), _spread(_of(one, "loss_recovered"), 4)]
    cells += [_spread([100 * v for v in _of(one, "dead")], 1) + "%", f"{_mean(one, 'seconds'):.1f}"]
    cells += [f"{_mean(one, 'seconds') / _mean(saex, 'seconds'):.2f}" if same else "–"]
    return "| " + " | ".join(cells) + " |"


def verdict(libraries: Found) -> str:
    """saex against the peer with the least FVU, and that peer's difference in per cent."""
    peers = {name: one for name, one in libraries.items() if name != "saex" and one["seeds"]}
    saex = libraries.get("saex")
    if not saex or not saex["seeds"] or not peers:
        return "Nothing to compare."
    best = min(peers, key=lambda name: _mean(peers[name], "fvu"))
    ours, theirs = _of(saex, "fvu"), _of(peers[best], "fvu")
    more = 100 * (statistics.mean(ours) / statistics.mean(theirs) - 1)
    word = "a tie"
    if max(ours) < min(theirs) or min(ours) > max(theirs):
        word = "better" if more < 0 else "worse"
    if min(len(ours), len(theirs)) < 3:
        word = "too few seeds to say"
    return f"saex against the best peer, {best}: FVU {more:+.2f}%, {word}."


def versions(found: Mapping[str, Found]) -> list[str]:
    """Of every library, as its runs noted them."""
    runs = (run for m in found.values() for one in m.values() for run in one.get("runs", ()))
    return sorted({run["version"] for run in runs if "version" in run})


def _of(one: Mapping[str, Any], name: str) -> list[float]:
    return [scores[name] for scores in one["seeds"]]


def _mean(one: Any, name: str) -> float:
    return statistics.mean(_of(one, name))


def _spread(values: Sequence[float], digits: int = 5) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f}"
