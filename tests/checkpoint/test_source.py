import json

import pytest

from smolseek.checkpoint.source import read_end_tokens


def _write(folder, config, generation):
    for name, named in (("config.json", config), ("generation_config.json", generation)):
        if named is not None:
            (folder / name).write_text(json.dumps(named))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        (None, {"eos_token_id": [7, 5]}, (7, 5)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 0, 7]}, (5, 7, 0)),
        ({"eos_token_id": [4, 3]}, {"eos_token_id": 3}, (4, 3)),
        ({"eos_token_id": None}, {}, ()),
        (None, None, ()),
    ],
)
def test_end_tokens_of_both_files(tmp_path, config, generation, ends):
    _write(tmp_path, config, generation)
    assert read_end_tokens(tmp_path) == ends


@pytest.mark.parametrize("named", ["</s>", 2.0, True, [2, None], {"id": 2}])
def test_an_end_token_that_is_no_number_is_refused(tmp_path, named):
    _write(tmp_path, {"eos_token_id": 2}, {"eos_token_id": named})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id .* is no whole number; name") as said:
        read_end_tokens(tmp_path)
    assert "\n" not in str(said.value)
    _write(tmp_path, {"eos_token_id": named}, None)
    with pytest.raises(ValueError, match=r"/config\.json: eos_token_id"):
        read_end_tokens(tmp_path)
