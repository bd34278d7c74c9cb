"""The page in headless Chromium: it fits a phone, its read-outs show the table's numbers, its script is allowed."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from smolseek.reporting.page import render
from smolseek.reporting.read import read_folders
from tests.reporting.folders import write_conversion, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

DRIVER = """
{
const said = { width: innerWidth, reach: document.documentElement.scrollWidth, errors: window.errors };
const all = (within, selector) => [...within.querySelectorAll(selector)];
const chart = (title) => all(document, ".chart").find((c) => c.querySelector("h3").textContent === title);
const move = (plot, x, y) => {
  const box = plot.getBoundingClientRect();
  const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  plot.dispatchEvent(new PointerEvent("pointermove", at));
};
const legend = (c) => all(c, ".legend output").map((o) => o.textContent);
const loss = chart("Training loss"), plot = loss.querySelector(".plot");
const at = () => loss.querySelector(".at").textContent;
said.before = [at(), ...legend(loss)];
move(plot, 0, 0.5);
said.first = [at(), ...legend(loss)];
plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
said.second = [at(), ...legend(loss)];
plot.dispatchEvent(new PointerEvent("pointerleave"));
said.after = [at(), ...legend(loss)];
const heat = chart("Load of every expert");
move(heat.querySelectorAll(".plot")[1], 0.99, 0.99);
said.heat = heat.querySelector(".readout").textContent;
const ground = () => getComputedStyle(document.body).backgroundColor;
said.grounds = [ground()];
document.getElementById("theme").click();
said.grounds.push(ground());
said.labels = all(document, ".xs b, .ys b").filter((b) => {
  const box = b.getBoundingClientRect();
  return box.left < 0 || box.right > innerWidth;
}).length;
parent.document.title = JSON.stringify(said);
}
"""


def browse(page, tmp_path, *options, width=1280):
    """Returns what the driver script finds in a page; the script replaces the page's own content security policy.

    The page is in a frame of the given width, because Chromium's own windows are never as narrow as a phone.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    listen = "<script>window.errors = []; addEventListener('error', (e) => errors.push(e.message));</script>"
    text = text.replace("<body>", f"<body>{listen}").replace("</body>", f"<script>{DRIVER}</script></body>")
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{escape(text)}"></iframe>'
    (tmp_path / "driven.html").write_text(f"<!doctype html><title></title>{frame}", encoding="utf-8")
    dumped = chromium(tmp_path, "--dump-dom", *options, tmp_path / "driven.html")
    title = re.search(r"<title>(\{.*?)</title>", dumped, re.DOTALL)
    assert title is not None, dumped[-2000:]
    return json.loads(unescape(title[1]))


def chromium(tmp_path, *options):
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    *options, page = options
    command = [str(CHROMIUM), *flags, *options, page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return ran.stdout + ran.stderr


@pytest.fixture
def page(tmp_path):
    folders = [write_run(tmp_path / "first"), write_run(tmp_path / "second", loss=2.0, steps=8)]
    return render(*read_folders([*folders, write_conversion(tmp_path / "small", numbers=24)]))


def test_it_fits_a_phone_and_a_desk(page, tmp_path):
    for width in (360, 1280):
        said = browse(page, tmp_path, width=width)
        assert said["reach"] <= said["width"] == width and said["labels"] == 0 and said["errors"] == []


def test_the_readouts_tell_the_numbers(page, tmp_path):
    said = browse(page, tmp_path)
    assert said["before"] == said["after"] == ["at the end", "2.95", "1.93"]
    assert said["first"] == ["step 0", "3", "2"] and said["second"] == ["step 1", "2.99", "1.99"]
    assert said["heat"] == "layer 2, step 5, expert 0: 0.00 times its fair share"


def test_light_and_dark(page, tmp_path):
    light = browse(page, tmp_path, "--blink-settings=preferredColorScheme=1")["grounds"]
    dark = browse(page, tmp_path, "--blink-settings=preferredColorScheme=0")["grounds"]
    assert light == dark[::-1] and light[0] != light[1]


def test_its_own_policy_lets_its_script_run_and_no_other(page, tmp_path):
    refused = []
    for text in (page, page.replace("sha256-", "sha256-A")):
        (tmp_path / "report.html").write_text(text, encoding="utf-8")
        said = chromium(tmp_path, "--enable-logging=stderr", "--dump-dom", tmp_path / "report.html")
        assert said.count("<figure") == page.count("<figure")
        refused.append("Content Security Policy" in said)
    assert refused == [False, True]
