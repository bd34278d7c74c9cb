"""How reports show the command that wrote them."""

import pytest
from circumstances import without_folders


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/me/texts/a.txt", "a.txt"),
        ("prose=/home/me/a b.txt", "prose=a b.txt"),
        ("prose=texts/a.txt", "prose=texts/a.txt"),
        ("owner/model", "owner/model"),
        ("--sizes", "--sizes"),
        ("--tasks=/data/tasks/", "--tasks=tasks"),
    ],
)
def test_absolute_paths_are_cut_to_their_names(argument, shown):
    assert without_folders(argument) == shown
