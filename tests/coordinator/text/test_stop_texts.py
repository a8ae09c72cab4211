import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.text.stop_texts import StopTexts
from protos.errors import InvalidArgument

ALPHABET = "ab"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read the text letter by letter until one of the stop texts is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def feed(stops: list[str], chunks: list[str]) -> tuple[list[str], bool]:
    watcher = StopTexts(stops)
    emitted = []
    for chunk in chunks:
        text, stopped = watcher.push(chunk)
        emitted.append(text)
        if stopped:
            return emitted, True
    return [*emitted, watcher.flush()], False


@given(chunks=st.lists(st.text(ALPHABET, max_size=6), max_size=12), stops=STOPS)
@settings(max_examples=1000, deadline=None)
def test_any_cutting_of_a_text_gives_what_reading_it_letter_by_letter_gives(chunks: list[str], stops: list[str]) -> None:
    emitted, stopped = feed(stops, chunks)
    assert ("".join(emitted), stopped) == oracle("".join(chunks), stops)


@given(chunks=st.lists(st.text(ALPHABET, max_size=6), max_size=12), stops=STOPS)
@settings(max_examples=500, deadline=None)
def test_no_more_is_held_back_than_could_begin_a_stop_text(chunks: list[str], stops: list[str]) -> None:
    watcher = StopTexts(stops)
    seen = emitted = ""
    for chunk in chunks:
        text, stopped = watcher.push(chunk)
        seen, emitted = seen + chunk, emitted + text
        if stopped:
            return
        held = seen.removeprefix(emitted)
        wanted = [n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert len(held) == max(wanted, default=0)


def test_the_stop_text_that_is_complete_first_wins() -> None:
    assert feed(["abcd", "bc"], ["xa", "bcd"]) == (["x", "a"], True)


def test_of_two_complete_at_once_the_longer_wins() -> None:
    assert feed(["bc", "abc"], ["xab", "c"]) == (["x", ""], True)


def test_nothing_comes_after_a_stop_text() -> None:
    watcher = StopTexts(["."])
    assert watcher.push("a.b") == ("a", True)
    assert watcher.push("c") == ("", True)
    assert watcher.flush() == ""


def test_a_stop_text_across_surrogate_free_unicode() -> None:
    assert feed(["🎉\n"], ["x🎉", "\ny"]) == (["x", ""], True)


def test_a_long_stop_text_does_not_make_pushing_slow() -> None:
    watcher = StopTexts(["a" * 100_000 + "b"])
    emitted = "".join(watcher.push("a" * 10)[0] for _ in range(20_000))
    assert len(emitted) == 200_000 - 100_000
    assert watcher.flush() == "a" * 100_000


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        StopTexts(["x", ""])
