import pytest

from smolseek.checkpoint.licence import licence_fields, licence_files


@pytest.mark.parametrize(
    ("card", "fields"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("", {}),
    ],
)
def test_the_front_matter_names_the_licence(tmp_path, card, fields):
    (tmp_path / "README.md").write_text(card)
    assert licence_fields(tmp_path) == fields


def test_a_folder_without_a_card(tmp_path):
    assert licence_fields(tmp_path) == {} and licence_files(tmp_path) == []


def test_licence_files_are_found_by_name(tmp_path):
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "config.json"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in licence_files(tmp_path)] == ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"]
