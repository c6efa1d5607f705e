"""Metrics as an aligned text table: the dictionary and its controls, one row each."""

import math
from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "fvu": "FVU",
    "mse": "MSE",
    "cosine": "cosine",
    "l0": "L0",
    "ce_reconstructed": "CE",
    "ce_increase": "CE increase",
    "loss_recovered": "recovered (zero)",
    "loss_recovered_mean": "recovered (mean)",
    "kl": "KL",
}
LABELS = {
    "pca": "PCA",
    "untrained": "untrained dictionary",
    "token_mean": "per-token mean",
}


def rows(metrics: Mapping[str, Any], name: str = "SAE") -> dict[str, dict[str, Any]]:
    """Label -> {column: value}, the dictionary first, then each control of the flat metrics.

    A control's metrics are those under ``<control>.``, a site's (of a dictionary of several, each
    encoded by itself) under ``<site>.``; None is a number that JSON cannot hold.
    """
    found = {key.rpartition(".")[0] for key in metrics if "." in key}
    controls = [c for c in LABELS if c in found] + sorted(found - set(LABELS))
    out = {name: {c: metrics[c] for c in COLUMNS if c in metrics}}
    for control in controls:
        scores = {c: metrics[f"{control}.{c}"] for c in COLUMNS if f"{control}.{c}" in metrics}
        out[LABELS.get(control, control)] = scores
    return out


def shown(value: float | int | None) -> str:
    """A number in at most four significant digits; a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3g}"


def table(metrics: Mapping[str, Any], name: str = "SAE") -> str:
    """The table of flat metrics, then the other figures, as text for a terminal."""
    body = rows(metrics, name)
    used = [c for c in COLUMNS if any(c in r for r in body.values())]
    lines = [["", *(COLUMNS[c] for c in used)]]
    lines += [[label, *(shown(r.get(c)) for c in used)] for label, r in body.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(_pad(line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *others(metrics)])


def others(metrics: Mapping[str, Any]) -> list[str]:
    """Figures that have no column, in sentences."""
    metrics = {k: v for k, v in metrics.items() if v is not None}
    get = metrics.get
    out = []
    if "ce_clean" in metrics:
        out.append(
            f"cross-entropy of the model itself {shown(get('ce_clean'))}, mean-ablated "
            f"{shown(get('ce_mean_ablated'))}, zero-ablated {shown(get('ce_zero_ablated'))} nats "
            f"per token, over {get('tokens', 0):,.0f} tokens"
        )
    if "fvu_without_first" in metrics:
        out.append(
            f"FVU {shown(get('fvu'))} pooled and centred, {shown(get('fvu_without_first'))} "
            f"without position 0, over {get('rows', 0):,.0f} held-out rows"
        )
    if "dead_fraction" in metrics:
        out.append(
            f"dead latents {get('dead_fraction', 0):.2%}, firing in more than 10% of rows "
            f"{get('dense_fraction', 0):.2%}, over {get('density_rows', 0):,.0f} held-out rows"
        )
    return out


def _pad(cells: list[str], widths: list[int]) -> list[str]:
    return [
        cells[0].ljust(widths[0]),
        *(c.rjust(w) for c, w in zip(cells[1:], widths[1:])),
    ]
