"""Text from token bytes: torn characters, stop strings across tokens, think spans."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from engine.chat.protocol import Done, Failed, Loaded, Ok, Token, from_line, to_line
from engine.chat.stream import TextStream, opens_thinking


def run(pieces: list[bytes], stop: tuple[str, ...] = (), thinking: bool = False) -> tuple[str, TextStream]:
    stream = TextStream(stop, thinking)
    return "".join([stream.push(piece) for piece in pieces] + [stream.finish()]), stream


@given(st.text(max_size=40), st.lists(st.integers(0, 200), max_size=12))
def test_any_cut_of_utf8_gives_the_text_back(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "replace")
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    assert run(pieces)[0] == data.decode()


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_never_raise(data: bytes) -> None:
    assert run([data[i : i + 1] for i in range(len(data))])[0] == data.decode("utf-8", "replace")


@given(st.text("<|im_end>ab", max_size=40), st.integers(1, 5))
def test_the_stop_string_ends_the_text_wherever_it_is_cut(text: str, step: int) -> None:
    data = text.encode()
    shown, stream = run([data[i : i + step] for i in range(0, len(data), step)], ("<|im_end|>", "b<"))
    marks = [at for at in (text.find("<|im_end|>"), text.find("b<")) if at >= 0]
    assert shown == (text[: min(marks)] if marks else text)
    assert stream.stopped == bool(marks)


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop_string() -> None:
    stream = TextStream(("<|im_end|>",))
    assert [stream.push(piece) for piece in (b"a", b"b<", b"|im", b"x", b"<|im_end|>", b"more")] == [
        "a", "b", "", "<|imx", "", "",
    ]  # fmt: skip
    assert stream.stopped and stream.finish() == ""


def test_think_tokens() -> None:
    _, one_token_tags = run([b"<think>", b"a", b"b", b"</think>", b"c"])
    assert one_token_tags.think_tokens == 2 and not one_token_tags.thinking
    _, torn_tags = run([b"x<", b"think", b">a", b"b", b"c</thi", b"nk>", b"d"])
    assert torn_tags.think_tokens == 2  # "b" and "c</thi"; ">a" opened it
    _, prefilled = run([b"a", b"b", b"</think>", b"c"], thinking=True)
    assert prefilled.think_tokens == 2
    _, never_closed = run([b"<think>", b"a", b"b"])
    assert never_closed.think_tokens == 2 and never_closed.thinking
    _, twice = run([b"<think>", b"a", b"</think>", b"<think>", b"b", b"</think>"])
    assert twice.think_tokens == 2
    assert opens_thinking("<|im_start|>assistant\n<think>\n") and not opens_thinking(
        "<think>\n\n</think>\n\n"
    )


def test_events_survive_the_wire() -> None:
    import json

    for event in (
        Loaded("n", "d", 1, 2, 3, ("a",), True, False, 0.5, {"x": 1}),
        Token("é\n\x00"),
        Done("end", 1, 2.0, 3, 4, 0.1, 5),
        Failed("m", "h", 2),
        Ok(7),
    ):
        assert from_line(json.loads(json.dumps(to_line(9, event)))) == (9, event)
