import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.text import stories, write_stories


@pytest.fixture
def files(tmp_path):
    """A folder with the same stories as .txt, .jsonl and .parquet."""
    lines = stories(10)
    write_stories(tmp_path / "a.txt", 10)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "a.parquet")
    return tmp_path
