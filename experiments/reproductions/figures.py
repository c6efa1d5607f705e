"""A figure for each study that draws none itself, from its record.

Side by side: dots are seeds, the bar their mean. Over another score: dots are runs.

    python experiments/reproductions/figures.py [NAME ...]

A study with a figure of its own has it beside its record under the same name.
"""

import dataclasses
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from study import axes, save
from table import records


@dataclasses.dataclass(frozen=True)
class Panel:
    """One score of some runs of a record.

    Fields:
      score: field of a run. title: what it is. where: fields that these runs have.
      by: fields that name a column of dots, side by side; x: or a field that is the place.
    """

    score: str
    title: str
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by: tuple[str, ...] = ("method",)
    x: str = ""


PANELS = {
    "abs_topk": (
        Panel("fvu", "FVU, features with two poles", {"data": "poles"}),
        Panel("both", "axes found with both poles", {"data": "poles"}),
        Panel("fvu", "FVU, pocket-lm", {"data": "pocket-lm"}),
    ),
    "adaptive_k": (Panel("fvu", "FVU"), Panel("l0", "L0")),
    "choice": (
        Panel("dead", "share of dead latents", by=("method", "k")),
        Panel("fvu", "FVU", by=("method", "k")),
    ),
    "gradient_topk": (
        Panel("ce_increase", "nats lost", {"beta": None}),
        Panel("fvu", "FVU", {"beta": None}),
    ),
    "ground_truth": (
        Panel("near", "mean cosine of latents and features over L0", x="l0"),
        Panel("fvu", "FVU over L0", x="l0"),
    ),
    "group_bias": (
        Panel("at_0.8", "share found at cosine 0.8"),
        Panel("at_0.9", "share found at cosine 0.9"),
    ),
    "group_max": (Panel("fvu", "FVU"), Panel("dead", "share of dead latents")),
    "jump_relu_tanh": (
        Panel("fvu", "FVU over L0", by=("method", "pre_activation"), x="l0"),
        Panel("dead", "share of dead latents over L0", by=("method", "pre_activation"), x="l0"),
    ),
    "kron": (Panel("fvu", "FVU"), Panel("dead", "share of dead latents")),
    "layer_groups": (
        Panel("fvu", "FVU"),
        Panel("ce_increase", "nats lost"),
    ),
    "msae": (Panel("fvu", "geometric mean of FVU over k"),),
    "multi_layer": (
        Panel("within", "share of the variance that one token has"),
        Panel("layers", "layers at which a latent fires for a token"),
    ),
    "multi_topk": tuple(Panel(f"fvu_{w}k", f"FVU read at k {16 * w}") for w in (1, 2, 4)),
    "shrinkage": (
        Panel("relative_bias", "gamma over L0", {"data": None}, x="l0"),
        Panel("magnitude", "codes over true magnitudes", {"data": "known features"}),
    ),
    "skip_transcoder": (Panel("fvu", "FVU"), Panel("ce_increase", "nats lost")),
    "top_afa": (
        Panel("fvu", "FVU", by=("method", "weight")),
        Panel("eps_lbo", "eps-LBO", by=("method", "weight")),
    ),
    "transcoder": (
        Panel("ce_increase", "nats lost over L0", x="l0"),
        Panel("fvu", "FVU over L0", x="l0"),
    ),
    "variational": (
        Panel("fvu", "FVU", by=("method", "k")),
        Panel("dead", "share of dead latents", by=("method", "k")),
    ),
}


def main() -> None:
    wanted = sys.argv[1:] or PANELS
    for record in records():
        if record["name"] in PANELS and record["name"] in wanted:
            draw(record)


def draw(record: Mapping[str, Any]) -> None:
    """``results/NAME.svg``."""
    panels = PANELS[record["name"]]
    figure, found = axes(record["name"], "", "", len(panels))
    for axis, panel in zip([found] if len(panels) == 1 else found, panels):
        groups = grouped(record["runs"], panel)
        if not groups:
            raise ValueError(f"{record['name']}: no runs have {panel}")
        axis.set_title(panel.title, fontsize=9)
        if panel.x:
            over(axis, groups, panel)
        else:
            beside(axis, groups, panel)
    save(figure, record["name"])


def grouped(runs: Any, panel: Panel) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of a panel by what names them, in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        wanted = all(run.get(k) == v for k, v in panel.where.items())
        if wanted and run.get(panel.score) is not None:
            names = [run[field] for field in panel.by if run.get(field) is not None]
            groups.setdefault(" ".join(map(str, names)), []).append(run)
    return groups


def beside(axis: Any, groups: Mapping[str, list], panel: Panel) -> None:
    """A column of dots each."""
    for at, runs in enumerate(groups.values()):
        values = [run[panel.score] for run in runs]
        axis.plot([at] * len(values), values, "o", markersize=4, alpha=0.6)
        mean = statistics.mean(values)
        axis.plot([at - 0.3, at + 0.3], [mean, mean], color="black", linewidth=1)
    axis.set_xticks(range(len(groups)), [wrapped(name) for name in groups], fontsize=7)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    low, high = min(0, axis.get_ylim()[0]), axis.get_ylim()[1]
    axis.set_ylim(low, high + 0.05 * (high - low))  # dots of little spread stay clear of the top
    if len(groups) > 4:
        axis.tick_params(axis="x", rotation=90)


def over(axis: Any, groups: Mapping[str, list], panel: Panel) -> None:
    """Dots at their place."""
    for name, runs in groups.items():
        points = sorted((run[panel.x], run[panel.score]) for run in runs)
        axis.plot(*zip(*points), "o", markersize=4, alpha=0.6, label=name)
    axis.set(xlabel=panel.x.upper(), xscale="log")
    places = [run[panel.x] for runs in groups.values() for run in runs]
    ticks = [float(f"{t:.2g}") for t in np.geomspace(min(places), max(places), 4)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=7)


def wrapped(name: str) -> str:
    """Words below each other."""
    return name.replace("_", " ").replace(" ", "\n")


if __name__ == "__main__":
    main()
