from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peg.evaluate import charts
from peg.evaluate.charts import Series, change_bars, histogram_lines, line_chart

FRAME = {"title": "T", "description": "D", "x_label": "x", "y_label": "y"}
NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x)


def draw(series: list[Series], *, marks: bool = False, from_zero: bool = False) -> ET.Element:
    return ET.fromstring(line_chart(series, **FRAME, marks=marks, from_zero=from_zero))  # noqa: S314


def points(svg: ET.Element, index: int = 0) -> list[tuple[float, float]]:
    line = next(e for e in svg.iter("polyline") if e.get("class") == f"line s{index}")
    return [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]  # type: ignore[misc]


def ticks(svg: ET.Element, anchor: str) -> dict[str, float]:
    place = "y" if anchor == "end" else "x"
    found = (e for e in svg.iter("text") if e.get("class") == "tick" and e.get("text-anchor") == anchor)
    return {str(e.text): float(e.get(place, "nan")) - (4 if anchor == "end" else 0) for e in found}


def test_points_stand_where_the_ticks_say() -> None:
    svg = draw([Series("a", [0, 50, 100], [0.1, 0.2, 0.4])], marks=True, from_zero=True)
    found = points(svg)
    xs, ys = ticks(svg, "middle"), ticks(svg, "end")
    assert [x for x, _ in found] == pytest.approx([xs["0"], (xs["0"] + xs["100"]) / 2, xs["100"]], abs=0.11)
    assert [y for _, y in found] == pytest.approx([ys["0.1"], ys["0.2"], ys["0.4"]], abs=0.11)
    assert len(list(svg.iter("circle"))) == 3


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30), st.booleans())
def test_every_point_and_tick_stays_inside_the_frame(rows: list[tuple[float, float]], from_zero: bool) -> None:
    rows = sorted(rows)
    svg = draw([Series("a", [x for x, _ in rows], [y for _, y in rows])], from_zero=from_zero)
    for x, y in points(svg):
        assert charts._LEFT - 0.1 <= x <= charts.WIDTH - 11.9 and 9.9 <= y <= charts.HEIGHT - 39.9
    for anchor in ("middle", "end"):
        texts = [e.text for e in svg.iter("text") if e.get("class") == "tick" and e.get("text-anchor") == anchor]
        assert len(texts) == len(set(texts)) <= 12
    assert len(ticks(svg, "end")) >= 2


def test_a_long_line_is_averaged_over_groups_of_one_size() -> None:
    count = charts._MAX_POINTS * 3 - 2
    values = np.random.default_rng(0).normal(size=count)
    found = points(draw([Series("a", list(range(count)), list(values))]))
    assert charts.points_per_mark(count) == 3 and len(found) == charts._MAX_POINTS
    wanted = values[: 3 * 10].reshape(10, 3).mean(axis=1)
    assert np.corrcoef([-y for _, y in found[:10]], wanted)[0, 1] > 0.9999


def test_histogram_outlines_hold_each_sample_s_shares() -> None:
    (one,) = histogram_lines({"a": [0.1, 0.1, 0.6, 0.9]}, edges=[0.0, 0.5, 1.0])
    assert list(zip(one.xs, one.ys, strict=True)) == [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 0.5), (1, 0.5), (1, 0)]


def test_bars_are_coloured_by_the_sign_of_the_change() -> None:
    svg = ET.fromstring(change_bars([-1, -0.1, 0.1, 1], [2, 8, 4], **FRAME))  # noqa: S314
    bars = [(e.get("class"), float(e.get("height", "nan"))) for e in svg.iter("rect")]
    assert [kind for kind, _ in bars] == ["bar loss", "bar same", "bar gain"]
    assert bars[1][1] == pytest.approx(4 * bars[0][1], abs=0.3) and bars[2][1] == pytest.approx(2 * bars[0][1], abs=0.3)


def test_texts_are_escaped() -> None:
    frame = dict.fromkeys(FRAME, "<script>&\"'")
    svg = line_chart([Series("a", [1], [1])], **frame, marks=False, from_zero=False)
    assert "<script" not in svg and ET.fromstring(svg).get("aria-label") == "<script>&\"'. <script>&\"'"  # noqa: S314


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="'T' has no points"):
        draw([Series("a", [], [])])


def test_tiny_numbers_are_written_with_a_power() -> None:
    svg = draw([Series("a", [0, 1], [0, 2e-5])], from_zero=True)
    assert list(ticks(svg, "end")) == ["0", "0.5e-5", "1e-5", "1.5e-5", "2e-5"]
