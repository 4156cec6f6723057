"""One bar at a time: where work has phases, that of the phase that has news."""

from contextlib import contextmanager

from qjax.cli.progress import bytes_bar, in_turn


def test_a_bar_is_drawn_from_its_first_news_until_anothers():
    """Two bars open at once would show one frozen and one that knows no total."""
    seen = []

    @contextmanager
    def bar(name):
        seen.append(f"{name} opens")
        yield lambda *args: seen.append((name, *args))
        seen.append(f"{name} closes")

    with in_turn(bar("bytes"), bar("steps")) as (progress, walked):
        assert seen == []
        progress("a", 1, 2)
        progress("b", 2, 2)
        walked("step")
    assert seen == [
        *("bytes opens", ("bytes", "a", 1, 2), ("bytes", "b", 2, 2), "bytes closes"),
        *("steps opens", ("steps", "step"), "steps closes"),
    ]


def test_with_a_real_bar(capsys):
    with in_turn(bytes_bar("quantize x")) as (progress,):
        progress("a", 10, 20)
    assert "0/?" not in capsys.readouterr().err
