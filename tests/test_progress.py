import io

from peg.progress import Progress


def lines(total: int, counts: list[int], *, every_s: float) -> list[str]:
    stream = io.StringIO()
    with Progress("encode", total=total, unit="texts", every_s=every_s, stream=stream) as progress:
        for count in counts:
            progress.advance(count, note="note")
    return stream.getvalue().splitlines()


def test_the_end_is_said_once_and_quiet_steps_are_not() -> None:
    (line,) = lines(10, [4, 6], every_s=60)
    assert line.startswith("encode: 10/10 texts (100%), ")
    assert "in all" in line


def test_every_step_is_said_with_rate_and_time_left_when_asked() -> None:
    first, last = lines(10, [4, 6], every_s=0)
    assert first.startswith("encode: 4/10 texts (40%), ")
    assert "left" in first
    assert first.endswith("note")
    assert last.startswith("encode: 10/10")


def test_nothing_to_do_is_said_too() -> None:
    assert lines(0, [], every_s=60)[0].startswith("encode: 0/0 texts (100%)")
