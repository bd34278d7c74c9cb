import json
import random

from smolseek.data.documents import Document
from smolseek.data.sources.base import ChainedSources, Source
from tests.data.sources.reading import texts

LONG = "\n".join(f"line {number} of a long text" for number in range(8000))


class Listed(Source):
    """Documents of a list; a position is a number."""

    def __init__(self, documents, size=None):
        self.listed, self.bytes = documents, size

    def whole_records(self, position):
        for index in range(position or 0, len(self.listed)):
            yield index + 1, self.listed[index]

    def size(self):
        return self.bytes


def numbered(count, name="document"):
    return [Document(f"{name} {n}", f"{name} {n:05} ") for n in range(count)]


def test_long_texts_are_cut_and_reading_continues_at_every_part():
    source = Listed(
        [Document("first", "one"), Document(LONG, LONG), None, Document("last", "two"), Document(LONG, LONG)]
    )
    everything = list(source.records(None))
    assert len(everything) > 10
    assert [position for position, _ in everything[:2]] == [1, {"before": 1, "parts": 1}]
    read = [document for _, document in everything]
    assert read[0] == Document("first", "one") and read.count(None) == 1
    assert "".join(document.text for document in read if document) == "one" + LONG + "two" + LONG
    assert [document.ends for document in read[1:4]] == [False] * 3
    assert sum(document.ends for document in read if document) == 4
    assert all(document.name == document.text for document in read if document and not document.ends)
    for number, (position, _) in enumerate(everything, start=1):
        assert list(source.records(json.loads(json.dumps(position)))) == everything[number:]


def test_a_chain_continues_at_every_part():
    source = ChainedSources([Listed([Document("a", LONG)]), Listed([Document("b", LONG), Document("c", "end")])])
    everything = list(source.records(None))
    for number, (position, _) in enumerate(everything, start=1):
        rest = [document for _, document in source.records(json.loads(json.dumps(position)))]
        assert rest == [document for _, document in everything[number:]]


def test_a_sample_comes_from_the_whole_source_in_random_order():
    source = Listed(numbered(5000))
    drawn = source.sample(15 * 300, seed=1)
    assert len(drawn) == 300 and len(set(drawn)) == 300
    numbers = [int(document.name.split()[1]) for document in drawn]
    quarters = [sum(number // 1250 == quarter for number in numbers) for quarter in range(4)]
    assert min(quarters) > 45 and numbers != sorted(numbers)
    assert drawn == source.sample(15 * 300, seed=1) != source.sample(15 * 300, seed=2)


def test_a_sample_is_as_long_as_asked_and_of_what_is_kept():
    source = Listed([*numbered(50), None])
    assert [len(source.sample(c, seed=0)) for c in (0, 1, 15, 16, 10**6)] == [0, 1, 1, 2, 50]
    even = source.sample(10**6, seed=0, keep=lambda document: int(document.name.split()[1]) % 2 == 0)
    assert len(even) == 25
    assert source.sample(75, seed=0) == source.sample(90, seed=0)[:5]


def test_a_sample_holds_no_more_than_it_returns():
    """Counts the documents that are alive while the source is read."""
    alive, most = set(), 0

    class Text(str):
        def __del__(self):
            alive.discard(int(self[:6]))

    class Counting(Listed):
        def whole_records(self, position):
            nonlocal most
            for number in range(2000):
                alive.add(number)
                yield number, Document("", Text(f"{number:06} words"))
                most = max(most, len(alive))

    assert len(Counting([]).sample(12 * 20, seed=0)) == 20
    assert most <= 23


def test_documents_leave_malformed_records_out():
    listed = numbered(20)
    listed.insert(random.Random(0).randrange(20), None)
    assert len(texts(Listed(listed))) == 20
