import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smolseek.reporting import page
from smolseek.reporting.page import render
from smolseek.reporting.read import read_folders
from tests.reporting.folders import NASTY, step_line, write_conversion, write_run

CSS = Path(page.__file__).with_name("page.css").read_text()


@pytest.fixture
def one(tmp_path):
    return render(*read_folders([write_run(tmp_path / "first")]))


@pytest.fixture
def several(tmp_path):
    folders = [write_run(tmp_path / "first"), write_run(tmp_path / "second", loss=2.5, learning_rate=7e-4)]
    return render(*read_folders([*folders, write_conversion(tmp_path / "small", numbers=24)]))


class Elements(HTMLParser):
    """Collects every element with its attributes and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        self.open.append(len(self.found) - 1)

    def handle_data(self, data):
        if self.open:
            self.found[self.open[-1]][2] += data

    def texts(self, tag):
        return [text.strip() for name, _, text in self.found if name == tag]


def test_it_loads_nothing(several):
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(", several.replace("// ", ""))
    for tag, attributes, _ in Elements(several).found:
        assert tag not in ("link", "img", "iframe", "object") and "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'" in several


def test_text_of_samples_names_and_prompts_is_only_text(tmp_path):
    text = render(*read_folders([write_run(tmp_path / "<i>first", ended=False)]))
    elements = Elements(text)
    assert len(elements.texts("script")) == 1 and "<script>alert" not in text
    assert any(NASTY in pre for pre in elements.texts("pre"))
    assert "<i>first" not in text and "<b>" not in text.replace("<b>0", "").replace("<b>5", "").replace("<b style", "")


def test_it_says_the_numbers(one):
    cells = Elements(one).texts("td")
    for number in ("2.95", "3.123", "1,234", "0.0005", "2.00", "0.00", "0.31", "0.11", "2.8000", "1,234,567", "640"):
        assert number in cells, number
    for words in ("98,304 tokens", "held-out loss 3.1234", "0.187", "9.8.7", "learning_rate: 0.001", "says converted"):
        assert words in one, words
    for title in ("Training loss", "Held-out loss", "Learning rate", "Tokens per second", "Load of every expert"):
        assert title in Elements(one).texts("h3")
    assert "as converted" in one and "dense source" in one


def test_several_runs_share_charts_with_a_legend(several):
    elements = Elements(several)
    titles = elements.texts("h3")
    assert titles.count("Training loss") == 1 and titles.count("Load of every expert") == 2
    assert "tiny: perplexity against cache kept" in titles and "small: attention error by layer" in titles
    assert elements.texts("span").count("first") >= 4 and elements.texts("span").count("second") >= 4
    assert "What differs" in several and "train.learning_rate" in several and "0.0007" in elements.texts("td")


def test_a_run_that_goes_on(tmp_path):
    folder = write_run(tmp_path / "first", ended=False)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    text = render(*read_folders([folder]))
    assert "at step 5, going on or interrupted; held-out loss 3.1234 after step 5." in text
    (folder / "metrics.jsonl").write_text("")
    text = render(*read_folders([folder]))
    assert "before its first step" in text and "Training loss" not in text


def test_it_stays_small_and_every_chart_has_its_table(tmp_path):
    import json

    folder = write_run(tmp_path / "long")
    lines = []
    for step in range(0, 12001, 10):
        line = step_line(step, 3.0, experts=64)
        for key in ("maxvio", "load"):
            line[key] = {str(layer): line[key]["1"] for layer in range(30)}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    text = render(*read_folders([folder]))
    assert len(text) < 1_000_000
    assert text.count("<figure") == text.count('<details><summary>Numbers</summary><div class="scroll"><table>')


def test_a_conversion_without_calibration_or_experts(tmp_path):
    folder = write_conversion(tmp_path / "exact", losses={}, layers=[{"layer": 0}, {"layer": 1}])
    text = render(*read_folders([folder]))
    assert "50.0%" in text and "<figure" not in text


def test_the_texts_that_a_conversion_was_judged_on(tmp_path):
    numbers = {"tokens": 8176, "dense_perplexity": 8.0, "perplexity": 9.0, "ratio": 1.125, "kl": 0.0512}
    judged = [{"source": f"/home/{user}/<a>.txt", "agreement": 0.875} | numbers for user in ("me", "you")]
    text = render(*read_folders([write_conversion(tmp_path / "small", judged=judged)]))
    row = "<td>&lt;a&gt;.txt<td>8,176<td>8.000<td>9.000<td>1.125<td>0.0512<td>87.5%"
    assert text.count(row) == 2 and "/home/" not in text


def luminance(color):
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return sum(
        w * (p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4)
        for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stand_out(theme):
    """WCAG 2 asks for a contrast of 4.5 for text and of 3 for lines."""
    colors = {m[0]: m[1 + theme] for m in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", CSS)}
    for ground in ("paper", "panel"):
        for name in ("ink", "muted", "link"):
            assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
        for name in [n for n in colors if n.startswith("hue")]:
            assert contrast(colors[name], colors[ground]) >= 3, (name, ground)
    for name in ("rank0", "rank1"):
        assert contrast(colors[name], colors["panel"]) >= 2.5, name
