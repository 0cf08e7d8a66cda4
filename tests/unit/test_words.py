import os

import pytest

from spheres.cli import make_parser
from spheres.words import cut, encodable, raised


def test_a_file_name_that_is_no_utf_8_can_be_written_and_still_be_recognized():
    name = os.fsdecode(b"/data/caf\xe9.npz")
    with pytest.raises(UnicodeEncodeError):
        name.encode()
    assert encodable(name) == cut(name, 100) == "/data/caf\\udce9.npz"
    assert encodable("für") == "für"


@pytest.mark.parametrize("text", ["x" * 1_000, "ü" * 500, "\u20ac" * 400, "\udce9" * 200])
@pytest.mark.parametrize("most", [97, 98, 99, 100])
def test_text_is_cut_by_bytes_and_never_within_a_character(text, most):
    """Up to three bytes of a character that is cut are dropped."""
    for end in (False, True):
        found = cut(text, most, end=end)
        assert most - 3 <= len(found.encode()) <= most
        part = found if end else found.removesuffix(" ...")
        assert part in encodable(text)
        assert found.endswith(" ...") != end
    for size in (len(encodable(text).encode()), 10_000):
        assert cut(text, size) == cut(text, size, end=True) == encodable(text)


def test_an_exception_without_words_is_named():
    class NoWordsError(Exception):
        def __str__(self):
            return self.args[0]

    assert raised(NoWordsError()) == "NoWordsError"
    assert raised(ValueError("of this kind")) == "ValueError: of this kind"


@pytest.mark.parametrize("flag", ["--zone", "--host", "--control", "--listen", "--advertise"])
def test_words_for_other_nodes_are_refused_where_they_are_no_utf_8(flag, capsys):
    words = {"--control": "control:1", flag: os.fsdecode(b"caf\xe9:1")}
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["start", *(word for pair in words.items() for word in pair)])
    assert f"argument {flag}: 'caf\\udce9:1' is no UTF-8" in capsys.readouterr().err
