"""What Git leaves in place of a large file is named by every reader of such files."""

import pytest

from smolseek.checkpoint.source import check_tokenizer, read_json
from smolseek.data.documents import Columns
from smolseek.data.sources.files import FileSource
from smolseek.formats.foreign import check_no_pointer
from smolseek.formats.gguf_source import read_gguf
from smolseek.formats.headers import read_headers
from smolseek.formats.text import open_text, read_text

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def opened(path):
    with open_text(path) as file:
        return file.read()


READERS = {
    "model.safetensors": lambda path: read_headers(path.parent),
    "model.safetensors.index.json": lambda path: read_headers(path.parent),
    "config.json": read_json,
    "tokenizer.json": lambda path: check_tokenizer(path.parent, "it"),
    "tokenizer.model": lambda path: check_tokenizer(path.parent, "it"),
    "model.gguf": read_gguf,
    "a.txt": read_text,
    "b.txt": opened,
    "a.jsonl": lambda path: list(FileSource([path], Columns(), "|").whole_records(None)),
    "a.parquet": lambda path: list(FileSource([path], Columns(), "|").whole_records(None)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_refused_with_the_command_that_fetches_the_file(name, tmp_path):
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(
        ValueError, match="a Git LFS pointer, not the file itself; in its folder, run: git lfs pull"
    ) as said:
        READERS[name](path)
    assert str(said.value).startswith(f"{path}: ") and "\n" not in str(said.value)


def test_other_files_are_no_pointers(tmp_path):
    (tmp_path / "about.txt").write_text(POINTER + "Such lines stand in for a large file.\n" * 40)
    (tmp_path / "empty.txt").write_text("")
    for name in ("about.txt", "empty.txt", "gone.txt", "."):
        check_no_pointer(tmp_path / name)
