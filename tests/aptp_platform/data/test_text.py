"""A caption is what a person can read."""

import pytest

from aptp_platform.data.text import LONGEST_CAPTION, decode_text, first_captions


@pytest.mark.parametrize(
    ("given", "captions"),
    [
        (["\ufeffa cat"], ("a cat",)),
        ([" \u200b ", None, "", ["", "a cat", None], "unused"], ("a cat",)),
        (["\ufe0f\u3164\u00ad"], ()),
        (["\U0001faea \u0301", "unused"], ("\U0001faea \u0301",)),  # an emoji that Python does not know yet
        ([b"\xef\xbb\xbfK\xc3\xa4se"], ("K\u00e4se",)),
        (["Haus".encode("utf-16"), "unused"], ("Haus",)),
        (["two\nlines\tand\x85more"], ("two\nlines\tand\x85more",)),
    ],
)
def test_captions_are_the_first_that_print_something(given, captions):
    assert first_captions(given) == captions


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("\ud83d cut emoji", r"is damaged: it holds U\+D83D at character 0"),
        ("cat\0", r"is damaged: it holds U\+0000"),
        ("it\x92s", r"is damaged: it holds U\+0092"),  # Windows-1252 read as Latin-1
        ("K\ufffdse", r"is damaged: it holds U\+FFFD"),
        (b"K\xe4se", r"is not utf-8 \(byte e4 at 1\); convert it to UTF-8"),
        ("Haus".encode("utf-16")[:-1], "is not utf-16"),
        ("Haus".encode("utf-16-le"), r"is damaged: it holds U\+0000"),
        ("a" * (LONGEST_CAPTION + 1), "has 10001 characters"),
        ({"raw": "a cat"}, "is of type dict; it must be a string or a list of strings"),
        (["a cat", 7], "is of type int"),
    ],
)
def test_what_is_damaged_is_told(given, reason):
    with pytest.raises(ValueError, match=reason):
        first_captions([given])


def test_utf_32_is_not_taken_for_utf_16():
    assert decode_text("Haus".encode("utf-32")) == "Haus"
