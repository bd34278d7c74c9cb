from smolseek.data.sources import open_source


def test_python_carries_reference_and_sources():
    documents = [document for _, document in open_source("builtin:python").whole_records(None)]
    names = {document.name for document in documents}
    assert {"topic assignment", "module json.decoder", "module argparse"} <= names
    assert not [name for name in names if ".test" in name or "encodings" in name]
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert all(document.text.strip() for document in documents)


def test_long_modules_are_cut():
    source = open_source("builtin:python")
    whole = {document.text for _, document in source.whole_records(None)}
    parts = [document for _, document in source.documents(None)]
    assert len(parts) > len(whole) and max(len(document.text) for document in parts) <= 65_536
    assert "".join(document.text for document in parts) == "".join(
        document.text for _, document in source.whole_records(None)
    )
    whole_names = [document.name for _, document in source.whole_records(None)]
    assert list(dict.fromkeys(document.name for document in parts)) == whole_names  # the model that comes along was
    # trained on whole modules: no part of one of them may be held out now


def test_the_size_is_that_of_all_text():
    source = open_source("builtin:python")
    size = sum(len(document.text.encode()) for _, document in source.documents(None))
    assert size <= source.size() < size + 1000  # empty modules
