"""The whole measurement on a tiny model: every stage, an interruption, its report."""

import dataclasses
import json
from pathlib import Path

import pytest
import smollm2
from smollm2 import SVD, TRANSMLA, RealModel, measure, read_size
from smollm2_report import plot, ratios, render

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer, write_stories

STAGES = ["dense", "closed", "converted", "healed", "healed", SVD, TRANSMLA]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), folder / "tiny", tokenizer_from=tiny_tokenizer())
    calibration, prose, heal = (
        str(write_stories(folder / f"{name}.txt", seed=seed))
        for seed, name in enumerate(("calibration", "prose", "heal"))
    )
    return RealModel(
        source=str(folder / "tiny"),
        texts=(f"prose={prose}",),
        calibration=(calibration,),
        sizes=("16+8",),
        heal_text=(heal,),
        heal_tokens=(512, 1024),
        tasks=Path("tasks"),
        tokens=200,
        long_tokens=100,
        calibration_windows=8,
        calibration_window_tokens=32,
        refine_steps=2,
        distill_steps=2,
        out="tiny",
        results=folder / "results",
        work=folder / "work",
    )


@pytest.fixture(scope="module", autouse=True)
def answers():
    """Stands in for lm-eval, which tests/benchmarks/test_zero_shot.py runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "write_tasks", lambda documents, out, rows: "manager")
        patch.setattr(smollm2, "answer", lambda model, *_: {"piqa acc_norm": "0111", "winogrande acc": "01"})
        yield


@pytest.fixture(scope="module")
def bench(mine):
    return measure(mine)


def test_every_stage_has_its_row_in_order(bench):
    rows = bench.kept.rows
    assert [row["stage"] for row in rows] == STAGES
    assert [row["tokens"] for row in rows] == [0, 0, 0, 512, 1024, 0, 0]
    assert ratios(rows[0]) == [1.0] and all(ratios(row)[0] != 1 for row in rows[1:])
    assert {row["cache"] for row in rows[1:]} == {24 / 32}
    for row in rows:
        short, long = (row["windows"][size]["prose"] for size in ("512", "2048"))
        assert short["tokens"] > long["tokens"] and short["kl"] >= -1e-6 and 0 <= short["agreement"] <= 1


def test_a_healed_folder_and_a_converted_one_stay_and_no_other_model(bench):
    assert {path.name for path in bench.work.iterdir()} == {"16+8-converted", "16+8-healed-all-0.0001-0.9"}
    assert (bench.work / "16+8-healed-all-0.0001-0.9" / "model" / "config.json").is_file()


def test_an_interrupted_measurement_goes_on(bench, monkeypatch):
    lines = bench.kept.path.read_text().splitlines()
    bench.kept.path.write_text("\n".join(lines[:-1]) + "\n")
    measured = []
    monkeypatch.setattr(smollm2.Rows, "add", lambda self, **row: measured.append(row["stage"]))
    measure(dataclasses.replace(bench.mine, stages=("healed", "baselines")))
    bench.kept.path.write_text("\n".join(lines) + "\n")
    assert measured == [TRANSMLA]


def test_nothing_that_is_kept_names_a_folder(bench):
    first = json.loads(bench.kept.path.read_text().splitlines()[0])
    assert (first["source"], first["texts"], first["calibration"]) == ("tiny", ["prose=prose.txt"], ["calibration.txt"])
    assert str(bench.mine.results.parent) not in bench.kept.path.read_text()


def test_healing_of_attention_alone(mine, tmp_path):
    two = {"stages": ("healed",), "heal_text": mine.heal_text * 2, "heal_tokens": (512,), "heal_trains": "attention"}
    bench = measure(dataclasses.replace(mine, **two, results=tmp_path, work=tmp_path))
    (run,) = bench.work.glob("16+8-healed-attention-*")
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert (recipe["train"]["trains"], recipe["data"]["weights"]) == ("attention", [1.0, 1.0])
    assert "| healed, distillation 0.9, attention alone | 512 |" in render("tiny", "", bench.kept.rows)


def test_the_report_and_the_plot(bench, tmp_path):
    rows = bench.kept.rows
    text = render("tiny", "`the command`", rows)
    for words in (
        "# tiny: what",
        "`the command`",
        "| 16+8 | 75.0% (16+8) | healed, distillation 0.9 | 1,024 |",
        "## Published conversions",
    ):
        assert words in text
    assert "| 62.50 | +0.00 ± 0.00 |" in text and "| 75.0 (+0.00 ± 0.00) | 50.0 (+0.00 ± 0.00) |" in text
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra")
    plot("tiny", rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_experts_on_request(mine, tmp_path):
    sizes, stages = ("carve 75%", "upcycle + 50%", "dense"), ("converted", "healed", "baselines")
    changes = {"sizes": sizes, "stages": stages, "heal_tokens": (512,), "tasks": None, "out": "experts"}
    bench = measure(dataclasses.replace(mine, **changes))
    assert [(row["size"], row["stage"]) for row in bench.kept.rows] == [
        ("", "dense"),
        *((size, stage) for size in sizes[:2] for stage in ("converted", "healed")),
        ("dense", "trained"),
    ]
    assert ratios(bench.kept.rows[-1]) != [1.0]
    report = render("tiny", "", bench.kept.rows)
    assert "| carve 75% |" in report and "| dense | 100.0% | trained | 512 |" in report
    alone = {"sizes": sizes[1:2], "stages": ("healed",), "heal_distill_weight": 0.0}
    bench = measure(dataclasses.replace(mine, **changes | alone))
    assert [row["size"] for row in bench.kept.rows if row["stage"] == "trained"] == ["dense", "upcycle + 50%"]
    run = json.loads((bench.work / "upcycle+50-trained-all-0.0001-0" / "run.json").read_text())
    assert run["recipe"]["teacher"] is None and run["recipe"]["train"]["distill_weight"] == 0
    plot("tiny", bench.kept.rows, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": ("prose.txt",)}, "must be NAME=FILE each"),
        ({"texts": ("prose=a.txt",), "heal_text": ("a.txt",)}, "a.txt: is calibrated or trained on too"),
        ({"heal_text": ()}, "no text to heal on"),
        ({"sizes": ("half",)}, r"must be SHARE% or RANK\+ROPE"),
        ({"tokens": 300}, "another tokens; name another --out"),
    ],
)
def test_mistakes(bench, changes, words):
    with pytest.raises(ValueError, match=words):
        measure(dataclasses.replace(bench.mine, **changes))


def test_sizes():
    assert read_size("31.25%", 32) == {"cache": 0.3125}
    assert read_size("16+8", 32) == {"kv_lora_rank": 16, "qk_rope_head_dim": 8}
    for wrong in ("0%", "101%", "x%", "30+8", "16+0", "16", "-1+8", ""):
        with pytest.raises(ValueError, match="at most 32 in all"):
            read_size(wrong, 32)


def test_parts_of_a_long_text_are_one_document(tmp_path):
    text = " ".join(f"Anna sees {number}." for number in range(6000))
    (tmp_path / "long.txt").write_text(f"{text}\n<|endoftext|>\nBen", encoding="utf-8")
    ids = smollm2.read_tokens(tiny_tokenizer(), str(tmp_path / "long.txt"), 10**6).tolist()
    assert len(text) > 65_536 and ids.count(tiny_tokenizer().eos_token_id) == 2
