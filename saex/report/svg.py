"""Charts as inline SVG: lines for curves, bars for the histogram. Colours come from the page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from saex.report.html import Markup, el, join

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22
LINEAR = ("lr", "learning_rate")  # falls to 0 at the end


def curve(steps: Sequence[Any], values: Sequence[Any], label: str, points: int = 240) -> Markup:
    """A line over steps, averaged to ``points`` points; a wide range is logarithmic."""
    x, y = thinned(np.asarray(steps, float), np.asarray(values, float), points)
    log = bool(y.min() > 0 and y.max() > 30 * y.min()) and label not in LINEAR
    place = np.log10(y) if log else y
    low, high = float(place.min()), float(place.max())
    if high - low < 1e-9 * abs(high) or high == low:  # a constant: between 0 and twice as much
        low, high = sorted((0.0, 2 * high or 1.0))
    across = (x - x.min()) / max(float(np.ptp(x)), 1e-12) * (WIDTH - LEFT - RIGHT) + LEFT
    down = HEIGHT - BOTTOM - (place - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down))
    ends = [10**v if log else v for v in (low, high)]
    words = f"{label}: from {short(y[0])} to {short(y[-1])} over steps {x[0]:.0f} to {x[-1]:.0f}"
    return _figure(
        words,
        _frame(),
        _text(LEFT - 4, TOP + 8, short(ends[1]), "end"),
        _text(LEFT - 4, HEIGHT - BOTTOM, short(ends[0]), "end"),
        _text(LEFT, HEIGHT - 6, short(x[0]), "start"),
        _text(WIDTH - RIGHT, HEIGHT - 6, f"step {short(x[-1])}", "end"),
        _text(WIDTH / 2, HEIGHT - 6, "log scale", "middle") if log else None,
        el("polyline", points=line, class_="line"),
        el("circle", cx=f"{across[-1]:.1f}", cy=f"{down[-1]:.1f}", r="2.5", class_="dot"),
    )


def bars(edges: Sequence[Any], counts: Sequence[int], dead: int, rows: int) -> Markup:
    """Latents by log10 density; those that never fired in a bar of their own at the left."""
    width, height, gap = 640, 220, 44
    top = max([dead, *counts, 1])
    left, base = 44, height - 34
    step = (width - left - gap - 8) / max(len(counts), 1)

    def bar(x: float | int, count: int, w: float | int, kind: str, words: str) -> Markup | None:
        if not count:
            return None
        tall = max(count / top * (base - 12), 1.0)
        box = {"x": f"{x:.1f}", "y": f"{base - tall:.1f}", "height": f"{tall:.1f}"}
        return el("rect", el("title", words), width=f"{w:.1f}", class_=kind, **box)

    shown = [
        bar(
            left + gap + i * step,
            int(count),
            step * 0.9,
            "bar",
            f"{int(count)} latents fire in 1 of {10 ** -edges[i + 1]:,.0f} to "
            f"1 of {10 ** -edges[i]:,.0f} rows",
        )
        for i, count in enumerate(counts)
    ]
    ticks = []
    for decade in range(math.ceil(edges[0]), 1):
        x = left + gap + (decade - edges[0]) / (edges[-1] - edges[0]) * step * len(counts)
        ticks.append(_text(x, base + 14, "1" if decade == 0 else f"1e{decade}", "middle"))
    return el(
        "svg",
        bar(left, dead, gap - 20, "dead", f"{dead} latents never fired in {rows:,} rows"),
        shown,
        el("line", x1=left, x2=width - 8, y1=base, y2=base, class_="axis"),
        ticks,
        _text(left + (gap - 20) / 2, base + 14, "dead", "middle"),
        _text(left - 4, 16, str(top), "end"),
        _text(left - 4, base, "0", "end"),
        _text((left + width) / 2, height - 4, "share of rows in which a latent fires", "middle"),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"histogram of latents by density: {sum(map(int, counts))} alive, {dead} dead",
    )


def thinned(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages over equal runs where there are more than ``points``; the last value stays."""
    if len(x) <= points:
        return x, y
    cuts = np.linspace(0, len(x), points + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, len(x)))
    x, last = np.add.reduceat(x, cuts) / sizes, (x[-1], y[-1])
    y = np.add.reduceat(y, cuts) / sizes
    return np.append(x, last[0]), np.append(y, last[1])


def short(value: float | int) -> str:
    """A number in about three digits."""
    value = float(value)
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure(words: str, *children: object) -> Markup:
    box = f"0 0 {WIDTH} {HEIGHT}"
    return el("svg", el("title", words), children, viewBox=box, role="img", aria_label=words)


def _frame() -> Markup:
    path = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    return el("path", d=path, class_="axis")


def _text(x: float | int, y: float | int, words: str, anchor: str) -> Markup:
    return join(el("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor))
