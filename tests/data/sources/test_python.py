from smolseek.data.sources import open_source


def test_python_carries_reference_and_sources():
    documents = [document for _, document in open_source("builtin:python").documents(None)]
    names = {document.name for document in documents}
    assert {"topic assignment", "module json.decoder", "module argparse"} <= names
    assert not [name for name in names if ".test" in name or "encodings" in name]
    assert sum(len(document.text) for document in documents) > 5_000_000
