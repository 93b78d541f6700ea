"""Figures of what the weighting does: hardness against weight and gradient, at three moments of a training.

Three columns (start, middle, end) of two panels: above, how many negatives (or queries) lie where, and what they weigh;
below, what share of the gradient they give. All panels of a row have one scale, so that they can be compared.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from peg.errors import InputError
from peg.evaluate.charts import Scale, axis, tick_texts
from peg.model.bins import BINS_PER_UNIT, Bin

MOMENTS = ("start", "middle", "end")
_WIDTH, _HEIGHT = 1000, 372
_LEFT, _RIGHT, _GAP = 62, 58, 22
_UPPER, _LOWER = (28, 178), (210, 326)  # top and floor of the panels
_MOST_BINS = 45  # of a panel
_MERGES = (1, 2, 5, 10, 20)  # widths of bins, in the table's
_NEGLIGIBLE = 5e-4  # bins at the ends with less of everything are not drawn
_LEAST_LOG_WEIGHTS = (math.log10(0.5), math.log10(2))  # the weight axis spans at least these
_MOST_TICKS = 8

Tables = dict[str, list[Bin]]
"""Bins of one kind, by moment."""


@dataclass(frozen=True)
class Figure:
    """A drawing and the words around it."""

    title: str
    caption: str
    svg: str


def read_weighting(path: Path) -> dict[str, Tables]:
    """The tables of weighting.csv by kind and moment; none where there is no such file, or nothing in it."""
    tables: dict[str, Tables] = {}
    if not path.is_file():
        return tables
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(file):
                kind, moment = row["kind"], row["moment"]
                numbers = [float(row[key]) for key in ("bin_low", "bin_high", "share", "weight", "gradient_share")]
                one = Bin("negatives" if kind == "negatives" else "queries", *numbers)
                tables.setdefault(kind, {}).setdefault(moment, []).append(one)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not training's table ({error}); run the stage `train` again") from error
    return tables


def figures(tables: Mapping[str, Tables]) -> list[Figure]:
    """A figure of negatives and one of queries; none of a kind that has no table."""
    plans = {
        "negatives": (
            "What negatives weigh",
            "Bars: where the negatives of a batch lie, by how much more similar to the query they are than its "
            "positive. Line: their mean weight; 1 is plain InfoNCE. Below: the share of the gradient that they give; "
            "those above the positive give {told}.",
            "cosine of the negative minus the positive's",
        ),
        "queries": (
            "What queries weigh",
            "The same by query: on the left those with easy negatives, on the right those whose negatives come near "
            "the positive, or above it; these, from 0 on, give {told}.",
            "difficulty of the query: soft maximum of its negatives, minus the positive's cosine",
        ),
    }
    return [
        _figure(tables[kind], title=title, caption=caption.format(told=_told(tables[kind])), x_label=x_label, what=kind)
        for kind, (title, caption, x_label) in plans.items()
        if tables.get(kind)
    ]


def _told(tables: Tables) -> str:
    when = {"start": "at the start", "middle": "in the middle", "end": "at the end"}
    shares = {moment: sum(one.gradient_share for one in table if one.low >= 0) for moment, table in tables.items()}
    return ", ".join(f"{shares[moment]:.0%} {when[moment]}" for moment in MOMENTS if moment in shares)


@dataclass(frozen=True)
class _Row:
    """One of the two rows of panels: what its bars show, and where it stands."""

    bar: str
    value: Callable[[Bin], float]
    top: float
    floor: float
    y: Scale
    ticks: list[float]

    @classmethod
    def of(cls, bins: Sequence[Bin], bar: str, value: Callable[[Bin], float], *, top: float, floor: float) -> "_Row":
        y, ticks = axis(0, max(map(value, bins)), start=floor, end=top, tight=False)
        return cls(bar, value, top, floor, y, ticks)


def _figure(tables: Tables, *, title: str, caption: str, x_label: str, what: str) -> Figure:
    drawn = _merged({moment: _without_ends(table) for moment, table in tables.items()})
    bins = [one for table in drawn.values() for one in table]
    rows = [
        _Row.of(bins, "share", lambda one: one.share, top=_UPPER[0], floor=_UPPER[1]),
        _Row.of(bins, "push", lambda one: one.gradient_share, top=_LOWER[0], floor=_LOWER[1]),
    ]
    weights = [*(math.log10(one.weight) for one in bins if one.weight > 0), *_LEAST_LOG_WEIGHTS]
    weight = Scale(min(weights), max(weights), _UPPER[1], _UPPER[0])
    span = min(one.low for one in bins), max(one.high for one in bins)
    width = (_WIDTH - _LEFT - _RIGHT - _GAP * (len(MOMENTS) - 1)) / len(MOMENTS)
    parts = []
    for index, moment in enumerate(MOMENTS):
        left = _LEFT + index * (width + _GAP)
        parts += _panels(drawn.get(moment, []), rows, weight, moment, span=span, left=left, right=left + width)
    parts += _sides(rows, weight, what=what)
    parts.append(_text("label", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, anchor="middle"))
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}. {escape(caption)}">'
        f"{''.join(parts)}</svg>"
    )
    return Figure(title, caption, svg)


def _panels(
    table: Sequence[Bin],
    rows: Sequence[_Row],
    weight: Scale,
    moment: str,
    *,
    span: tuple[float, float],
    left: float,
    right: float,
) -> list[str]:
    """One moment: its panel in each row, and the line of weights in the upper one."""
    x, ticks = axis(*span, start=left, end=right, tight=True)
    parts = [_text("moment", left, _UPPER[0] - 12, moment if table else f"{moment}: not reached", anchor="start")]
    for row in rows:
        parts += [_rule("grid", left, right, row.y(tick)) for tick in row.ticks]
        if span[0] < 0 < span[1]:
            parts.append(f'<line class="grid" x1="{x(0):.1f}" y1="{row.top}" x2="{x(0):.1f}" y2="{row.floor}"/>')
        parts += [_bar(row, x, one) for one in table]
        parts.append(_rule("axis", left, right, row.floor))
    parts.append(_rule("unit", left, right, weight(0)))
    points = [((one.low + one.high) / 2, math.log10(one.weight)) for one in table if one.weight > 0]
    if points:
        path = " ".join(f"{x(middle):.1f},{weight(power):.1f}" for middle, power in points)
        parts.append(f'<polyline class="line s1" points="{path}"/>')
    texts = zip(ticks, tick_texts(ticks), strict=True)
    return parts + [_text("tick", x(tick), _LOWER[1] + 15, text, anchor="middle") for tick, text in texts]


def _sides(rows: Sequence[_Row], weight: Scale, *, what: str) -> list[str]:
    """Ticks and labels of the vertical axes: shares on the left, weights on the right."""
    right = _WIDTH - _RIGHT
    parts = [
        _text("tick", _LEFT - 6, row.y(tick) + 4, f"{100 * tick:.3g}%", anchor="end")
        for row in rows
        for tick in row.ticks
    ]
    parts += [
        _text("tick weight", right + 6, weight(power) + 4, f"{10**power:.3g}", anchor="start")
        for power in _powers(weight)
    ]
    parts.append(_upright("label", 12, sum(_UPPER) / 2, f"share of {what}"))
    parts.append(_upright("label", 12, sum(_LOWER) / 2, "of gradient"))
    parts.append(_upright("label weight", _WIDTH - 6, sum(_UPPER) / 2, "mean weight"))
    return parts


def _without_ends(table: Sequence[Bin]) -> list[Bin]:
    """Without the bins at both ends that hold next to nothing."""
    seen = [i for i, one in enumerate(table) if max(one.share, one.gradient_share) >= _NEGLIGIBLE]
    return list(table[seen[0] : seen[-1] + 1])


def _merged(tables: Tables) -> Tables:
    """Neighbouring bins put together, by the same grid in all tables, until a panel has few enough."""
    bins = [one for table in tables.values() for one in table]
    span = (max(one.high for one in bins) - min(one.low for one in bins)) * BINS_PER_UNIT
    size = next((merge for merge in _MERGES if span / merge <= _MOST_BINS), _MERGES[-1])
    return {moment: _merge(table, size=size) for moment, table in tables.items()}


def _merge(table: Sequence[Bin], *, size: int) -> list[Bin]:
    groups: dict[int, list[Bin]] = {}
    for one in table:
        groups.setdefault(math.floor(round(one.low * BINS_PER_UNIT) / size), []).append(one)
    merged = []
    for index, group in groups.items():
        share = sum(one.share for one in group)
        merged.append(
            Bin(
                kind=group[0].kind,
                low=index * size / BINS_PER_UNIT,
                high=(index + 1) * size / BINS_PER_UNIT,
                share=share,
                weight=sum(one.weight * one.share for one in group) / share,
                gradient_share=sum(one.gradient_share for one in group),
            )
        )
    return merged


def _powers(scale: Scale) -> list[float]:
    """Logarithms at which the weight axis has ticks: at most eight of 1, 2 and 5 times the powers of ten, or fewer."""
    for factors, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        exponents = range(every * math.floor(scale.low / every), math.ceil(scale.high) + 1, every)
        ticks = [exponent + math.log10(factor) for exponent in exponents for factor in factors]
        inside = [tick for tick in ticks if scale.low <= tick <= scale.high]
        if len(inside) <= _MOST_TICKS:
            break
    return inside


def _bar(row: _Row, x: Scale, one: Bin) -> str:
    left, right, value = x(one.low) + 0.5, x(one.high) - 0.5, row.value(one)
    says = f"{one.share:.2%}, weight {one.weight:.3g}, {one.gradient_share:.2%} of the gradient"
    return (
        f'<rect class="bar {row.bar}" x="{left:.1f}" y="{row.y(value):.1f}" width="{right - left:.1f}" '
        f'height="{row.y(0) - row.y(value):.1f}"><title>{one.low:+.2f} to {one.high:+.2f}: {says}</title></rect>'
    )


def _rule(kind: str, left: float, right: float, y: float) -> str:
    return f'<line class="{kind}" x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _upright(kind: str, x: float, y: float, text: str) -> str:
    turned = f'x="{x}" y="{y:.1f}" transform="rotate(-90 {x} {y:.1f})"'
    return f'<text class="{kind}" {turned} text-anchor="middle">{escape(text)}</text>'
