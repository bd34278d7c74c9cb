import dataclasses

import pytest

from smolseek.config import Recipe, check_data, load_recipe, recipes_folder


def recipe_of(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_every_recipe_of_the_project_loads():
    names = [path.stem for path in recipes_folder().glob("*.yaml")]
    assert {"quickstart", "smollm2-135m", "scratch-135m", "base-python"} <= set(names)
    for name in names:
        assert load_recipe(recipes_folder() / f"{name}.yaml").name == name


def test_described_runs_are_as_described():
    for name in ("smollm2-135m", "scratch-135m"):
        recipe = load_recipe(recipes_folder() / f"{name}.yaml")
        assert recipe.train.steps == 12_001
        assert recipe.sample.every == 2_000
        assert recipe.sample.prompts == ("Solar system is a",)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    recipe = recipe_of(tmp_path, "train: {learning_rate: 3e-4, steps: 10}\nmodel: {rms_norm_eps: 1e-5}")
    assert recipe.train.learning_rate == 3e-4
    assert recipe.model["rms_norm_eps"] == 1e-5


def test_a_key_beside_a_merged_mapping_that_has_it_too(tmp_path):
    text = "train:\n  stages:\n  - &b {steps: 3}\n  - {<<: *b, steps: 4}"
    assert [stage.steps for stage in recipe_of(tmp_path, text).train.stages] == [3, 4]


def test_name_is_the_files_unless_given(tmp_path):
    assert recipe_of(tmp_path, "").name == "mine"
    assert recipe_of(tmp_path, "name: other").name == "other"


def test_one_source_may_be_written_without_a_list(tmp_path):
    assert recipe_of(tmp_path, "data: {train: a.txt}").data.train == ("a.txt",)


@pytest.mark.parametrize(
    "text",
    [
        "data: {weights: null, held_out: null}",
        "train: {trackers: null, stages: null, learning_rate_factors: null}",
        "model: null",
        "convert: null",
        "train:\n  # steps: 3\ndata:\nsample:\nparallel:",
    ],
)
def test_null_is_nothing_given(tmp_path, text):
    assert recipe_of(tmp_path, text) == Recipe(name="mine")


def test_null_among_the_items_of_a_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train: None is not of type str"):
        recipe_of(tmp_path, "data: {train: [a.txt, null]}")


def test_a_recipe_needs_a_source_of_text(tmp_path):
    for sources in ("null", "[]"):
        with pytest.raises(ValueError, match=r"data\.train: names no source; name one"):
            check_data(recipe_of(tmp_path, f"data: {{train: {sources}}}").data)


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
"""A list of lists of lists ... by aliases: 9 ** 11 texts."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {step: 3}", ["train.step", "train.steps"]),
        ("trian: {}", ["trian", "train"]),
        ("convert: {kv_lora_rnk: 3}", ["convert.kv_lora_rnk", "convert.kv_lora_rank"]),
        ("train: {steps: many}", ["train.steps", "many", "int"]),
        ("train: {steps: 1.5}", ["train.steps", "1.5", "int"]),
        ("train: {steps: true}", ["train.steps", "True", "int"]),
        (f"seed: {2**64}", ["seed: 18446744073709551616 is no number of 64 bits"]),
        ("train: {precision: fp8}", ["train.precision", "fp8", "bfloat16"]),
        ("train: [1]", ["train", "mapping"]),
        ("- a", ["mapping"]),
        ("a: [", ["not YAML"]),
        (
            "train: {steps: 4}\nseed: 1\ntrain:\n  batch_windows: 2",
            ["mine.yaml: key train is in line 1 and again in line 3; write it once"],
        ),
        ("train: {steps: 4, steps: 5}", ["key steps is in line 1 and again in line 1"]),
        ("{a: " * 3000, ["mine.yaml: not YAML"]),
        ("name: 2020-13-45", ["mine.yaml: not YAML", "month"]),
        (f"name: [{'x' * 5000}]", ["name", "xxx...", "str"]),
        (f"train: {{learning_rate: {10**400}, x: 1}}", ["train.x"]),
        (LAUGHS, ["mine.yaml: more than 100,000 entries"]),
        ("model: &m {a: *m}", ["mine.yaml: more than 100,000 entries"]),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError) as raised:
        recipe_of(tmp_path, text)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize(("encoding", "words"), [("latin-1", "not UTF-8 at byte 8"), ("utf-16", "seems to be UTF-16")])
def test_a_recipe_in_another_encoding_is_named_in_one_line(tmp_path, encoding, words):
    (tmp_path / "mine.yaml").write_bytes("name: Zoë\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"mine\.yaml: {words}") as raised:
        load_recipe(tmp_path / "mine.yaml")
    assert "\n" not in str(raised.value)


def test_a_recipe_with_a_byte_order_mark(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("name: Zoë".encode("utf-8-sig"))
    assert load_recipe(tmp_path / "mine.yaml").name == "Zoë"


@pytest.mark.parametrize("line", ['name: "\\ud800"', 'data: {train: ["a", "\\udc00.txt"]}'])
def test_half_a_surrogate_pair_is_no_text(tmp_path, line):
    (tmp_path / "mine.yaml").write_text(line)
    with pytest.raises(ValueError, match=r"recipe key [\w.]+: '\\ud[8c]00.* is no text that UTF-8 can write"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_missing_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="quickstart"):
        load_recipe("nowhere.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="is a folder and no recipe; a checkpoint is named by --source"):
        load_recipe(tmp_path)


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().name = "x"  # type: ignore[misc]
