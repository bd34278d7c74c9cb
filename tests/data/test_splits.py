import dataclasses

from smolseek.data.documents import Document
from smolseek.data.sources import open_source
from smolseek.data.splits import held_out_documents, is_held_out
from tests.text import stories, write_stories


def test_a_tenth_is_held_out_by_name():
    documents = [document for _, document in open_source("builtin:python").documents(None)]
    held_out = [document for document in documents if is_held_out(document, 0.1)]
    assert 0.05 < len(held_out) / len(documents) < 0.15
    assert is_held_out(Document("topic assignment", "any text"), 0.1)
    assert not is_held_out(Document("module argparse", ""), 0.1)
    assert not is_held_out(documents[0], 0.0) and is_held_out(documents[0], 1.0)


def test_own_held_out_sources_free_the_whole_training_text(settings, tmp_path):
    other = write_stories(tmp_path / "b.txt", 5, seed=9)
    settings = dataclasses.replace(settings, held_out=(str(other),))
    assert [document.text for document in held_out_documents(settings)] == stories(5, seed=9)
