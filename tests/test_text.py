"""Text that streams: stop strings cut it, and what may become one is held back."""

import itertools

import pytest

from flexijax.engine.text import RunningText

pytestmark = pytest.mark.any_jax


class Characters:
    """A tokenizer whose token ids are code points; `late` ids appear one push later."""

    def __init__(self, late=()):
        self.late = late

    def stream(self):
        return _CharacterStream(self.late)


class _CharacterStream:
    def __init__(self, late):
        self.late, self.held = late, ""

    def push(self, token_id):
        text = self.held + chr(token_id)
        self.held = text if token_id in self.late else ""
        return "" if self.held else text

    def flush(self):
        rest, self.held = self.held, ""
        return rest


def run(text, stop, tokenizer=None):
    """(pieces, the rest at the end, the text itself) of a text pushed character by character."""
    running = RunningText(tokenizer or Characters(), stop)
    pieces = [running.push(ord(character)) for character in text]
    return pieces, running.finish(), running


def test_without_stop_strings_nothing_is_held_back():
    pieces, rest, running = run("abc", ())
    assert (pieces, rest, running.text, running.stopped) == (["a", "b", "c"], "", "abc", False)


def test_what_may_become_a_stop_string_is_held_back():
    pieces, rest, running = run("a##b###c", ("###",))
    assert pieces == ["a", "", "", "##b", "", "", "", ""]
    assert (rest, running.text, running.stopped) == ("", "a##b", True)


def test_what_was_held_back_is_shown_at_the_end():
    pieces, rest, running = run("ab#", ("###",))
    assert (pieces, rest, running.text, running.stopped) == (["a", "b", ""], "#", "ab#", False)


def test_the_stop_string_that_comes_first_cuts():
    _, _, running = run("one two three", ("three", "two"))
    assert (running.text, running.stopped) == ("one ", True)


def test_the_beginnings_of_several_stop_strings_overlap():
    _, _, running = run("xabab!", ("abac", "bab!"))
    assert (running.text, running.stopped) == ("xa", True)


def test_a_stop_string_that_comes_with_the_last_characters():
    running = RunningText(Characters(late={ord("d")}), ("nd",))
    assert [running.push(ord(character)) for character in "and"] == ["a", "", ""]
    assert running.finish() == ""
    assert (running.text, running.stopped) == ("a", True)


def test_nothing_follows_a_stop_string():
    running = RunningText(Characters(), ("b",))
    assert [running.push(ord(character)) for character in "abcab"] == ["a", "", "", "", ""]
    assert (running.finish(), running.text) == ("", "a")


def test_a_model_without_a_tokenizer_has_no_text():
    running = RunningText(None, ())
    assert (running.push(3), running.finish(), running.text) == ("", "", "")


@pytest.mark.parametrize("stop", [("aab",), ("aab", "ba"), ("abab", "b" * 3), ("a",)])
def test_every_short_text_is_cut_where_searching_the_whole_would_cut_it(stop):
    """And pieces join to the text, of which none is ever taken back."""
    for characters in itertools.product("ab", repeat=7):
        text = "".join(characters)
        pieces, rest, running = run(text, stop)
        # The first character that completes a stop string ends it; the earliest of those it
        # completes cuts.
        ends = [n for n in range(1, 8) if any(text[:n].endswith(s) for s in stop)]
        expected = text
        if ends:
            seen = text[: ends[0]]
            expected = seen[: min(seen.find(s) for s in stop if s in seen)]
        assert running.text == expected == "".join(pieces) + rest
        assert running.stopped == bool(ends)
