"""Small charts as inline SVG: text stays text, colours come from the page's CSS, the same input gives the same bytes.

Classes that the page styles: `axis`, `grid`, `tick`, `label`; `s0`, `s1`, `s2` for the series, each with a dash pattern
of its own, so that they differ without colour; `bar` with `gain`, `loss` or `same`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 10, 40
_MAX_POINTS = 400  # a line with more is averaged over groups of neighbours


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, and its points in order of x."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Scale:
    """Where on the page a value stands: low at start, high at end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:  # noqa: D102 (the class says it)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    series: Sequence[Series], *, title: str, description: str, x_label: str, y_label: str, marks: bool, from_zero: bool
) -> str:
    """Draw up to three lines; marks puts a dot on every point, from_zero starts the y axis at 0."""
    lines = [_thinned(one) for one in series]
    xs = [x for one in lines for x in one.xs]
    ys = [y for one in lines for y in one.ys]
    if not xs:
        raise ValueError(f"chart {title!r} has no points; at least one is needed")
    x_scale, x_ticks = axis(min(xs), max(xs), start=_LEFT, end=WIDTH - _RIGHT, tight=True)
    low = min(0.0, *ys) if from_zero else min(ys)
    y_scale, y_ticks = axis(low, max(ys), start=HEIGHT - _BOTTOM, end=_TOP, tight=False)
    parts = [_frame(x_scale, x_ticks, y_scale, y_ticks, x_label=x_label, y_label=y_label)]
    for index, one in enumerate(lines):
        points = [(x_scale(x), y_scale(y)) for x, y in zip(one.xs, one.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
        if marks:
            parts += [f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    return _svg(parts, title=title, description=description)


def histogram_lines(samples: dict[str, Sequence[float]], *, edges: Sequence[float]) -> list[Series]:
    """Turn samples into outlines of histograms over common bins, as shares of each sample."""
    outlines = []
    for label, values in samples.items():
        counts, _ = np.histogram(np.asarray(values, dtype=np.float64), bins=np.asarray(edges))
        shares = counts / max(1, len(values))
        xs = [float(edge) for edge in np.repeat(edges, 2)]
        ys = [0.0, *(float(share) for share in np.repeat(shares, 2)), 0.0]
        outlines.append(Series(label, xs, ys))
    return outlines


def change_bars(
    edges: Sequence[float], counts: Sequence[int], *, title: str, description: str, x_label: str, y_label: str
) -> str:
    """Draw a histogram of changes, its bins coloured by their sign: losses, no change, gains."""
    x_scale, x_ticks = axis(edges[0], edges[-1], start=_LEFT, end=WIDTH - _RIGHT, tight=True)
    y_scale, y_ticks = axis(0, max(*counts, 1), start=HEIGHT - _BOTTOM, end=_TOP, tight=False)
    parts = [_frame(x_scale, x_ticks, y_scale, y_ticks, x_label=x_label, y_label=y_label)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        kind = "gain" if low > 0 else "loss" if high < 0 else "same"
        left, right, height = x_scale(low) + 1, x_scale(high) - 1, y_scale(0) - y_scale(count)
        parts.append(
            f'<rect class="bar {kind}" x="{left:.1f}" y="{y_scale(count):.1f}" width="{right - left:.1f}" '
            f'height="{height:.1f}"><title>{low:+.2f} to {high:+.2f}: {count}</title></rect>'
        )
    return _svg(parts, title=title, description=description)


def points_per_mark(count: int) -> int:
    """How many neighbouring points of a long line are averaged into one that is drawn."""
    return -(-count // _MAX_POINTS)


def _thinned(one: Series) -> Series:
    size = points_per_mark(len(one.xs))
    if size <= 1 or len(set(one.xs)) < len(one.xs):  # an outline has two points at each edge
        return one
    # Groups of one size: were some larger, their part of the line would look calmer than it is.
    groups = [slice(start, start + size) for start in range(0, len(one.xs), size)]
    xs, ys = np.asarray(one.xs, dtype=np.float64), np.asarray(one.ys, dtype=np.float64)
    return Series(one.label, [float(xs[g].mean()) for g in groups], [float(ys[g].mean()) for g in groups])


def axis(low: float, high: float, *, start: float, end: float, tight: bool) -> tuple[Scale, list[float]]:
    """Choose round ticks; the axis ends at the data where it is tight, else at a tick."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if not tight:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    return Scale(low, high, start, end), [index * step for index in range(first, last + 1)]


def _frame(
    x_scale: Scale, x_ticks: list[float], y_scale: Scale, y_ticks: list[float], *, x_label: str, y_label: str
) -> str:
    floor = HEIGHT - _BOTTOM
    parts = []
    for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        parts.append(f'<text class="tick" x="{x_scale(tick):.1f}" y="{floor + 15}" text-anchor="middle">{text}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{WIDTH - _RIGHT}" y2="{floor}"/>')
    parts.append(f'<text class="label" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    upright = f'x="12" y="{(floor + _TOP) / 2:.1f}" transform="rotate(-90 12 {(floor + _TOP) / 2:.1f})"'
    parts.append(f'<text class="label" {upright} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Write all ticks of an axis in one way: powers of ten where numbers are tiny or huge."""
    largest = max(abs(tick) for tick in ticks)
    if largest and (largest < 1e-3 or largest >= 1e6):
        power = math.floor(math.log10(largest))
        return [f"{tick / 10**power:g}e{power}" if abs(tick) > 1e-9 * largest else "0" for tick in ticks]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = next((d for d in range(6) if abs(round(step, d) - step) < 1e-9 * abs(step)), 6)
    return [f"{0.0 if abs(tick) < step / 2 else tick:,.{digits}f}" for tick in ticks]


def _svg(parts: Sequence[str], *, title: str, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}. {escape(description)}">'
        f"{''.join(parts)}</svg>"
    )
