"""Every tensor of a folder has its name in torchtitan's DeepSeek-V3, by the list in docs/torchtitan.md."""

import re
from pathlib import Path

import pytest

from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.hub import save
from tests.factories import tiny_v3

PAGE = (Path(__file__).parents[2] / "docs" / "torchtitan.md").read_text(encoding="utf-8")
NAMES = dict(re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", PAGE, re.MULTILINE))


def pattern(name):
    return re.sub(r"(?<=layers\.)\d+|(?<=experts\.)\d+", "{}", name)


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_every_tensor_has_a_place_and_every_place_a_tensor(tmp_path, q_lora_rank):
    model = tiny_v3(q_lora_rank=q_lora_rank, tie_word_embeddings=False)
    names = TensorFolder(save(model, tmp_path / "out")).names()
    other = "self_attn.q_a_|self_attn.q_b_" if q_lora_rank is None else "self_attn.q_proj"
    wanted = {name for name in NAMES if not re.search(other, name)}
    assert {pattern(name) for name in names} == wanted
    places = [
        (NAMES[pattern(name)], *re.findall(r"layers\.(\d+)", name), *re.findall(r"experts\.(\d+)", name))
        for name in names
    ]
    assert len(set(places)) == len(names) and len(set(NAMES.values())) == len(NAMES)
