"""The page: plain data in, one self-contained HTML file out."""

import dataclasses
import importlib.resources
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from saex.evals.density import Histogram
from saex.evals.table import COLUMNS, others, rows, shown
from saex.report import svg
from saex.report.choose import CRITERION
from saex.report.html import Markup, el, join
from saex.report.latents import Example, Latent
from saex.report.tokens import MARKS

# Nothing may be fetched or run, whatever a text in the page tries.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
TILES = {
    "fvu": "FVU",
    "l0": "L0",
    "loss_recovered_mean": "loss recovered (mean)",
    "loss_recovered": "loss recovered (zero)",
    "ce_increase": "CE increase, nats",
    "dead_fraction": "dead latents",
}
FIRST_CURVES = ("loss", "fvu", "l0", "dead", "learning_rate", "lr", "mse", "aux_k", "aux_served")
NOT_CURVES = ("step", "tokens", "time", "seconds")
MOST_CURVES = 12


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything that the page shows; all of it may be empty.

    Fields:
      title: of the run. summary: one line below it.
      config: nested mapping, as in ``config.json``.
      curves: lines of ``metrics.jsonl``: {"step": ..., name: number or None}.
      metrics: flat, as in ``eval.json``; controls under ``<control>.``.
      histogram, latents, rows: from ``study``; rows is how many were read.
      notes: sentences that a reader of the numbers must know (``HeldOut.notes()``).
    """

    title: str
    summary: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curves: Iterable[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    histogram: Histogram | None = None
    latents: tuple[Latent, ...] = ()
    rows: int = 0
    notes: tuple[str, ...] = ()


def save(path: str | os.PathLike, page: Page) -> pathlib.Path:
    """Write the page to ``path``, replacing what is there in one move.

    Raises:
      OSError: the folder is not there or cannot be written to.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(render(page), encoding="utf-8")
    return unfinished.replace(path)


def render(page: Page) -> str:
    """The page as HTML: no scripts, no network, every text escaped."""
    sections = {
        "Metrics": _metrics(page),
        "Training": _curves(page.curves),
        "Density": _density(page),
        "Latents": _latents(page),
        "Configuration": _config(page.config),
    }
    present = {name: body for name, body in sections.items() if body}
    style = importlib.resources.files("saex.report").joinpath("page.css").read_text("utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", page.title),
        el("link", rel="icon", href="data:,"),
        el("style", Markup(style)),
    )
    body = el(
        "body",
        el("h1", page.title),
        el("div", page.summary, class_="soft") if page.summary else None,
        el("nav", [join(el("a", name, href=f"#{name.lower()}"), " ") for name in present]),
        _tiles(page.metrics),
        [el("section", el("h2", n), b, id=n.lower()) for n, b in present.items()],
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _tiles(metrics: Mapping[str, Any]) -> Markup | None:
    def number(key: str) -> str:
        value = metrics[key]
        percent = key == "dead_fraction" and value is not None
        return f"{value:.2%}" if percent else shown(value)

    found = [
        el("div", el("dt", label), el("dd", number(key)))
        for key, label in TILES.items()
        if key in metrics
    ]
    return el("dl", found, class_="tiles") if found else None


def _metrics(page: Page) -> Markup | None:
    if not page.metrics:
        return None
    body = rows(page.metrics)
    used = [c for c in COLUMNS if any(c in r for r in body.values())]
    lines = [
        el("tr", el("th", label, scope="row"), [el("td", shown(r.get(c))) for c in used])
        for label, r in body.items()
    ]
    head = el("tr", el("th"), [el("th", COLUMNS[c], scope="col") for c in used])
    words = [f"{line[0].upper()}{line[1:]}." for line in others(page.metrics)]
    return join(
        el("div", el("table", el("thead", head), el("tbody", lines)), class_="scroll"),
        [el("p", line, class_="soft") for line in (*words, *page.notes)],
    )


def _curves(lines: Iterable[Mapping[str, Any]]) -> Markup | None:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in NOT_CURVES and _number(value) and _number(line.get("step")):
                steps, values = found.setdefault(str(name), ([], []))
                steps.append(float(line["step"]))
                values.append(float(value))
    first = [name for name in FIRST_CURVES if name in found]
    names = [*first, *sorted(set(found) - set(first))][:MOST_CURVES]
    figures = [el("figure", el("figcaption", n), svg.curve(*found[n], n)) for n in names]
    return el("div", figures, class_="curves") if figures else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _density(page: Page) -> Markup | None:
    h = page.histogram
    if h is None:
        return None
    words = (
        f"{int(h.counts.sum()):,} latents fired in {h.rows:,} held-out rows, {h.dead:,} did not. "
        "Density is the share of rows in which a latent is not 0."
    )
    figure = el(
        "figure", svg.bars(h.edges.tolist(), h.counts.tolist(), h.dead, h.rows), class_="histogram"
    )
    return join(el("p", words, class_="soft"), figure)


def _latents(page: Page) -> Markup | None:
    if not page.latents:
        return None
    shades = [el("span", f" {a:.0%} ", style=f"--a:{a}") for a in (0.1, 0.5, 1)]
    legend = join(
        "Tokens are shaded by activation, relative to the latent's largest: ",
        el("span", shades, class_="ctx legend"),
        "; the outlined one is the peak. Hover to see values. ",
        "; ".join(
            f"{mark} is {name}"
            for mark, name in zip(
                MARKS.values(), ("a line end", "a carriage return", "a tab", "a space")
            )
        ),
        ".",
    )
    groups = []
    for why, members in itertools.groupby(page.latents, key=lambda latent: latent.why):
        cards = el("div", [_latent(latent) for latent in members], class_="latents")
        groups.append(join(el("h3", f"{why[:1].upper()}{why[1:]}"), cards))
    return join(
        el("p", legend, class_="soft"),
        el(
            "details",
            el("summary", "How these were chosen"),
            el("p", CRITERION, f" {page.rows:,} held-out rows were read."),
            class_="soft",
        ),
        groups,
    )


def _latent(latent: Latent) -> Markup:
    name = f"latent-{latent.index}"
    facts = (
        f"fires in 1 of {1 / max(latent.density, 1e-30):,.0f} rows, mean {shown(latent.mean)}, "
        f"largest {shown(latent.largest)}"
    )
    return el(
        "article",
        el(
            "header",
            el("h4", el("a", f"Latent {latent.index}", href=f"#{name}")),
            el("span", facts, class_="where"),
        ),
        _next("promotes", latent.promoted),
        _next("suppresses", latent.suppressed),
        [_context(e, latent.largest) for e in latent.examples],
        id=name,
        class_="latent",
    )


def _next(verb: str, tokens: tuple[tuple[str, float], ...]) -> Markup | None:
    if not tokens:
        return None
    chips = [el("code", _text(token), title=f"{value:+.3f}") for token, value in tokens]
    return el("div", el("span", verb, class_="where"), chips, class_="next")


def _context(example: Example, largest: float) -> Markup:
    parts: list[Any] = ["…" if example.cut[0] else None]
    for i, (token, value) in enumerate(zip(example.tokens, example.values)):
        peak = i == example.peak
        if not value and not peak:
            parts.append(_text(token))
            continue
        share = min(abs(value) / max(largest, 1e-30), 1.0)
        parts.append(
            el(
                "span",
                _text(token),
                class_="peak" if peak else None,
                style=f"--a:{share:.2f}",
                title=f"{value:.3f}",
            )
        )
    parts.append("…" if example.cut[1] else None)
    return el("div", parts, class_="ctx", title=example.where)


def _text(token: str) -> Markup:
    """A token's text; spaces, tabs and line ends as pale marks."""
    return join([el("i", MARKS[c]) if c in MARKS else c for c in token])


def _config(config: Mapping[str, Any]) -> Markup | None:
    if not config:
        return None
    lines = [el("tr", el("th", key, scope="row"), el("td", value)) for key, value in _flat(config)]
    table = el("div", el("table", el("tbody", lines), class_="config"), class_="scroll")
    return el("details", el("summary", f"{len(lines)} fields"), table)


def _flat(config: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    out = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out += _flat(value, f"{path}{key}.")
        else:
            out.append((f"{path}{key}", value if isinstance(value, str) else repr(value)))
    return out
