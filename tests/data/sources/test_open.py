import itertools
import json

import pytest

from smolseek.data.sources import open_source, open_sources
from tests.data.sources.reading import texts
from tests.text import stories


def test_several_sources_are_one(files):
    source = open_sources([str(files / "a.txt"), str(files / "a.jsonl")])
    assert texts(source) == stories(10) * 2
    position, _ = next(itertools.islice(source.documents(None), 11, None))
    assert texts(source, json.loads(json.dumps(position))) == stories(10)[2:]


@pytest.mark.parametrize(
    ("spec", "words"),
    [("nowhere.txt", "no such file"), ("builtin:java", "builtin:python")],
)
def test_sources_that_are_not_there(spec, words):
    with pytest.raises(ValueError, match=words):
        open_source(spec)
