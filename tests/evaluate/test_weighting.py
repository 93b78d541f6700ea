import csv
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from peg.errors import InputError
from peg.evaluate import weighting
from peg.evaluate.weighting import MOMENTS, figures, read_weighting
from peg.model.bins import Bin
from peg.train.moments import COLUMNS, table_rows


def bins(kind: str, shift: int = 0, *, count: int = 9) -> list[Bin]:
    """Bins from (shift - count + 3)/100 on; a share of 1/count each, weights that double, gradient at the end."""
    lows = [(index - count + 3 + shift) / 100 for index in range(count)]
    total = count * (count + 1) / 2
    return [
        Bin(kind, low, (round(100 * low) + 1) / 100, 1 / count, 2.0 ** (index - 4), (index + 1) / total)  # type: ignore[arg-type]
        for index, low in enumerate(lows)
    ]


def draw(table: list[Bin], **others: list[Bin]) -> ET.Element:
    (found,) = figures({table[0].kind: {"start": table, **others}})
    return ET.fromstring(found.svg)  # noqa: S314


def bars(svg: ET.Element, kind: str) -> list[ET.Element]:
    return [one for one in svg.iter("rect") if one.get("class") == f"bar {kind}"]


def number(element: ET.Element, name: str) -> float:
    return float(element.get(name, "nan"))


def test_what_training_writes_is_what_is_read(tmp_path: Path) -> None:
    tables = {
        kind: {moment: bins(kind, shift) for shift, moment in enumerate(MOMENTS)} for kind in ("negatives", "queries")
    }
    with (tmp_path / "weighting.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for kind in tables:
            for moment in MOMENTS:
                writer.writerows(table_rows(tables[kind][moment], step=1, progress=0.0, moment=moment))
    assert read_weighting(tmp_path / "weighting.csv") == tables


def test_no_table_no_figures(tmp_path: Path) -> None:
    assert read_weighting(tmp_path / "absent.csv") == {} and figures({}) == []
    (tmp_path / "empty.csv").write_text(",".join(COLUMNS) + "\n")
    assert read_weighting(tmp_path / "empty.csv") == {}


@pytest.mark.parametrize(
    "text",
    ["step,loss\n1,2\n", "kind,moment,bin_low,bin_high,share,weight,gradient_share\nnegatives,start,x,1,1,1,1\n"],
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "weighting.csv").write_text(text)
    with pytest.raises(InputError, match="run the stage `train` again"):
        read_weighting(tmp_path / "weighting.csv")


def test_heights_are_shares_and_weights_stand_on_a_logarithmic_line() -> None:
    table = bins("negatives")
    svg = draw(table)
    share, push = bars(svg, "share"), bars(svg, "push")
    assert len(share) == len(push) == len(table)
    assert {number(one, "height") for one in share} == {number(share[0], "height")}
    unit = number(push[0], "height")
    assert [number(one, "height") / unit for one in push] == pytest.approx(range(1, 10), rel=0.06)
    (line,) = [one for one in svg.iter("polyline") if one.get("points")]
    ys = [float(point.split(",")[1]) for point in line.get("points", "").split()]
    steps = [one - other for one, other in pairwise(ys)]
    assert steps == pytest.approx([steps[0]] * 8, abs=0.2) and steps[0] > 0  # each weight is twice the one before
    (one_at,) = {number(rule, "y1") for rule in svg.iter("line") if rule.get("class") == "unit"}
    assert ys[4] == pytest.approx(one_at, abs=0.11)


def test_all_moments_share_their_axes() -> None:
    svg = draw(bins("negatives"), end=bins("negatives", shift=6))
    share = bars(svg, "share")
    width = {round(number(one, "width"), 1) for one in share}
    assert max(width) - min(width) < 0.15
    panel = (weighting._WIDTH - weighting._LEFT - weighting._RIGHT - 2 * weighting._GAP) / 3 + weighting._GAP
    by_low = {str(one[0].text).split()[0] + str(i // 9): number(one, "x") for i, one in enumerate(share)}
    assert by_low["+0.021"] - by_low["+0.020"] == pytest.approx(2 * panel, abs=0.2)
    texts = [one.text for one in svg.iter("text") if one.get("class") == "moment"]
    assert texts == ["start", "middle: not reached", "end"]


def test_nothing_is_drawn_outside() -> None:
    svg = draw(bins("queries", count=60), end=bins("queries", shift=-150, count=3))
    for one in svg.iter("rect"):
        assert number(one, "x") >= weighting._LEFT - 0.1 and number(one, "y") >= weighting._UPPER[0] - 0.1
        assert number(one, "x") + number(one, "width") <= weighting._WIDTH - weighting._RIGHT + 0.1
        assert number(one, "y") + number(one, "height") <= weighting._LOWER[1] + 0.1
    for line in svg.iter("polyline"):
        for point in line.get("points", "").split():
            assert weighting._UPPER[0] - 0.1 <= float(point.split(",")[1]) <= weighting._UPPER[1] + 0.1
    assert len({one.text for one in svg.iter("text") if one.get("class") == "tick weight"}) >= 2


def test_many_bins_are_put_together_and_nothing_is_lost() -> None:
    table = bins("negatives", count=100)
    merged = weighting._merged({"start": table})["start"]
    assert len(merged) <= weighting._MOST_BINS
    assert sum(one.share for one in merged) == pytest.approx(1)
    assert sum(one.gradient_share for one in merged) == pytest.approx(1)
    for one in merged:
        inside = [part for part in table if one.low <= part.low < one.high]
        assert one.weight == pytest.approx(sum(part.weight for part in inside) / len(inside))
        assert one.gradient_share == pytest.approx(sum(part.gradient_share for part in inside))


def test_ends_that_hold_next_to_nothing_are_left_out_and_gaps_stay() -> None:
    def one(low: float, share: float, push: float) -> Bin:
        return Bin("negatives", low, low + 0.01, share, 1.0, push)

    table = [one(-0.9, 1e-4, 1e-5), one(-0.3, 0.6, 0.1), one(-0.2, 1e-5, 1e-5), one(0.1, 1e-5, 0.9), one(0.5, 1e-5, 0)]
    assert weighting._without_ends(table) == table[1:4]


def test_the_words_say_what_comes_from_above_the_positive() -> None:
    (found,) = figures({"negatives": {"start": bins("negatives"), "end": bins("negatives", shift=-3)}})
    assert "give 53% at the start, 0% at the end." in found.caption  # the last 3 of 9 bins: (7 + 8 + 9)/45
    assert found.caption in str(ET.fromstring(found.svg).get("aria-label"))  # noqa: S314


def test_weights_of_zero_and_of_one_alone_can_be_drawn() -> None:
    plain = [Bin("negatives", 0.0, 0.01, 0.5, 1.0, 0.5), Bin("negatives", 0.01, 0.02, 0.5, 0.0, 0.5)]
    svg = draw(plain)
    assert len(bars(svg, "share")) == 2
    ticks = [one.text for one in svg.iter("text") if one.get("class") == "tick weight"]
    assert ticks == ["0.5", "1", "2"]
