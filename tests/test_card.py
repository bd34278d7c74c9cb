import tomllib
from pathlib import Path

import pytest
import yaml

from smolseek.card import Card, Training
from smolseek.config import DataSettings, Recipe
from smolseek.formats.deepseek_v3 import disk_config
from tests.factories import tiny_v3_config

ROOT = Path(__file__).parent.parent
CONVERSION = {
    "source": "owner/dense",
    "settings": {"cache": 0.5, "exact": False, "seed": 0},
    "cache": {
        "source_numbers_per_token": 320,
        "source_bytes_per_token": 640,
        "numbers_per_token": 160,
        "bytes_per_token": 320,
    },
    "calibration": {"judged_tokens": 4096, "window_tokens": 256, "tokens_sha256": "ab"},
    "losses": {"dense": 1.5, "closed_form": 1.7},
    "layers": [{"bias_energy_lost": 0.1}, {"bias_energy_lost": 0.3}],
    "versions": {"smolseek": "0.1.0", "torch": "2", "transformers": "5"},
    "seconds": 3.0,
}
V3 = disk_config(tiny_v3_config().to_dict())


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_converted_models_card():
    card = Card("small", V3, {"license": "mit"}, CONVERSION).render()
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v3", "mla", "smolseek"],
        "base_model": "owner/dense",
        "license": "mit",
    }
    for words in (
        "# small\n\nowner/dense, converted to a stock",
        "| closed form | 1.7000 | 5.474 |",
        "| of this model | 160 | 320 |",
        'AutoModelForCausalLM.from_pretrained("small")',
        "| vllm | refuses: kv_lora_rank",
        "up to 0.3 of their energy is lost",
        "That of owner/dense: mit.",
        "cache: 0.5",
    ):
        assert words in card
    assert "vllm serve" not in card and "smolseek train" in card


def test_an_exact_conversion_is_no_approximation_and_has_learned_nothing():
    exact = CONVERSION["settings"] | {"exact": True, "experts": "upcycle"}
    card = Card("small", V3, {}, CONVERSION | {"settings": exact}).render()
    assert "It computes what its source computes" in card and "It knows what its source knows" in card
    for words in ("approximation", "error of every layer", "learned from the dense", "smolseek train"):
        assert words not in card
    training = Training(Recipe(name="heal"), 100, 5000)
    for conversion, trained in (({"settings": exact | {"experts": "carve"}}, None), ({"settings": exact}, training)):
        card = Card("small", V3, {}, CONVERSION | conversion, trained).render()
        assert "It is an approximation of its source" in card and "computes what" not in card


def test_commands_name_the_attention_backend_where_one_alone_takes_the_sizes():
    sizes = {"kv_lora_rank": 256, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128}
    card = Card("small", V3 | sizes | {"qk_head_dim": 128, "tie_word_embeddings": False}, {}, CONVERSION).render()
    assert "--model-path small --attention-backend triton`" in card
    assert "`vllm serve small --attention-backend TRITON_MLA`" in card


def test_a_healed_models_card_has_both_recipes_and_the_runs_numbers():
    training = Training(Recipe(name="heal", source="small-v3"), 100, 5000, {"dense": 1.0, "healed": 1.1})
    card = Card("heal", V3, {}, CONVERSION, training).render()
    for words in ("100 steps, 5,000 tokens of builtin:python", "| healed | 1.1000 |", "cache: 0.5", "name: heal"):
        assert words in card
    assert "dense came with no card that names a licence; its licence files" in card and "smolseek train" not in card
    assert card.index("Settings of the conversion") < card.index("Recipe of the training")


def test_local_paths_are_not_shown(tmp_path):
    source = tmp_path / "my-model"
    source.mkdir()
    card = Card("small", V3, {}, CONVERSION | {"source": str(source)}).render()
    assert "my-model, converted" in card and str(tmp_path) not in card and "base_model" not in front_matter(card)


def test_random_weights_and_softmax_routers():
    training = Training(Recipe(name="scratch"), 3, 30)
    card = Card("scratch", V3 | {"scoring_func": "softmax", "model_type": "smolseek_v3_softmax"}, {}, None, training)
    text = card.render()
    assert "from random weights" in text and "not stock" in text and 'smolseek.load("scratch")' in text
    assert "Not measured" in text and "| vllm" not in text
    dense = Card("dense", {"model_type": "llama", "max_position_embeddings": 64}, {}, None, training).render()
    assert 'from_pretrained("dense")' in dense and "64 tokens" in dense and "mla" not in front_matter(dense)["tags"]


def test_the_project_is_apache_licensed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_a_card_says_what_was_read_without_paths():
    calibration = {
        "judged_tokens": 100,
        "judged_apart": False,
        "window_tokens": 256,
        "tokens_sha256": "ab",
        "sources": [
            {"source": "/home/me/a.txt", "windows": 12, "documents": 1500},
            {"source": "hub:o/d", "windows": 9, "documents": 9},
        ],
    }
    conversion = CONVERSION | {
        "source": "owner/dense",
        "source_commit": "c" * 40,
        "settings": CONVERSION["settings"] | {"calibration": ["/home/me/a.txt", "hub:o/d"]},
        "calibration": calibration,
    }
    recipe = Recipe(
        source=f"owner/dense@{'c' * 40}", teacher="/home/me/dense", data=DataSettings(train=("/home/me/b.txt",))
    )
    card = Card("small", V3, {}, conversion, Training(recipe, 1, 2)).render()
    assert "a.txt: 12 windows of 1,500 documents; hub:o/d: 9 windows of 9 documents; all of that text" in card
    assert "100 tokens of the calibration text that it learned from" in card
    assert f"source_commit: {'c' * 40}" in card and "2 tokens of b.txt" in card
    assert "/home/me" not in card
    assert front_matter(Card("small", V3, {}, None, Training(recipe, 1, 2)).render())["base_model"] == "owner/dense"


def test_a_card_shows_the_texts_that_the_conversion_was_judged_on():
    judged = {"source": "/home/me/a.txt", "tokens": 8176, "dense_perplexity": 8.0, "perplexity": 9.0}
    judged |= {"ratio": 1.125, "kl": 0.0512, "agreement": 0.875}
    card = Card("small", V3, {}, CONVERSION | {"judged": [judged]}).render()
    assert "| a.txt | 8,176 | 8.000 | 9.000 | 1.125 | 0.0512 | 87.5% |" in card and "/home/me" not in card
    with pytest.raises(ValueError, match=r"^conversion\.json: not as smolseek writes it"):
        Card("small", V3, {}, CONVERSION | {"judged": [{"source": "a.txt"}]}).render()


def test_a_loss_without_bounds_has_a_card():
    card = Card("small", V3, {}, CONVERSION | {"losses": {"dense": 1.5, "closed_form": 1e9}}).render()
    assert "| closed form | 1000000000.0000 |" in card


def test_a_conversion_of_other_values_is_one_line():
    for field in ("cache", "losses", "layers", "versions", "settings", "source"):
        with pytest.raises(ValueError, match=r"^conversion\.json: not as smolseek writes it"):
            Card("small", V3, {}, CONVERSION | {field: 3}).render()
