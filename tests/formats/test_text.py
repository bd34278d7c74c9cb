import logging

import pytest

from smolseek.formats import text
from smolseek.formats.text import open_text, read_text

WORDS = "Änne saw a ball.\nBen, too.\n"


def read_opened(path):
    with open_text(path) as file:
        return file.read()


@pytest.mark.parametrize("read", [read_text, read_opened])
@pytest.mark.parametrize(
    "content", [WORDS.encode(), WORDS.encode("utf-8-sig"), WORDS.replace("\n", "\r\n").encode(), b""]
)
def test_utf8_is_read_with_and_without_a_mark(tmp_path, read, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt") == (WORDS if content else "")


@pytest.mark.parametrize("read", [read_text, read_opened])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WORDS.encode("utf-16"), ["seems to be UTF-16,", "iconv -f UTF-16 -t UTF-8"]),
        (WORDS.encode("utf-16-le"), ["seems to be UTF-16LE,", "iconv -f UTF-16LE"]),
        (WORDS.encode("utf-16-be"), ["seems to be UTF-16BE,", "iconv -f UTF-16BE"]),
        (WORDS.encode("utf-32"), ["seems to be UTF-32,", "iconv -f UTF-32"]),
        (b"\xef\xbb\xbfcaf\xe9 noir", ["not UTF-8 at byte 6", "iconv -f LATIN1"]),
        (b"caf\xc3", ["not UTF-8 at byte 3"]),
        (b"words and \0 more", ["no text (byte 10 is NUL)"]),
        (bytes(range(256)), ["no text (byte 0 is NUL)"]),
    ],
)
def test_other_files_are_one_line_with_the_remedy(tmp_path, read, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("read", [read_text, read_opened])
def test_a_file_that_is_gone_or_closed_to_the_reader(tmp_path, read):
    with pytest.raises(ValueError, match=r"gone\.txt: cannot be read \(No such file"):
        read(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory"):
        read(tmp_path)


def test_bytes_broken_behind_the_head_are_replaced_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(text, "_HEAD_BYTES", 5)  # it ends inside the second ä
    (tmp_path / "a.txt").write_bytes("aäaä".encode() + b"b\xe9b\xffb")
    with caplog.at_level(logging.WARNING):
        assert read_opened(tmp_path / "a.txt") == "aäaäb\ufffdb\ufffdb"
    assert len(caplog.records) == 1 and "a.txt" in caplog.text
    assert read_opened(tmp_path / "a.txt").endswith("b") and len(caplog.records) == 2  # once for each opening


def test_an_error_of_the_disk_while_reading_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"a\.txt: cannot be read \(disk gone\)"), open_text(tmp_path / "a.txt"):
        raise OSError("disk gone")
