"""The balancing comparison on a tiny model: its measurements, an interruption, its report."""

import dataclasses
import json

import balance
import pytest
import torch
from balance import START, Comparison, compare, report, routers, shuffled_routing, train_settings

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from smolseek.training.loop import Interrupted, Trainer, Watcher
from tests.factories import random_ids, tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories

METHODS = ("nothing", "sign:2e-2", "quantile", "loss:1e-2")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balance")
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), folder / "tiny", tokenizer_from=tiny_tokenizer())
    texts = [(str(write_stories(folder / f"{name}.txt", seed=seed)),) for seed, name in enumerate(("train", "held"))]
    return Comparison(
        str(folder / "tiny"),
        *texts,
        methods=METHODS,
        seeds=(0,),
        steps=4,
        batch_windows=4,
        window_tokens=32,
        text_tokens=500,
        refine_steps=2,
        pictures=(),
        out="tiny",
        results=folder / "results",
        work=folder / "work",
    )


@pytest.fixture(scope="module")
def rows(mine):
    return compare(mine)


def test_every_method_is_measured_once_from_the_same_unbalanced_start(rows):
    assert [row["method"] for row in rows.rows] == [START, *METHODS]
    assert rows.rows[0]["maxvio"] > 0.2
    for row in rows.rows[1:]:
        assert len(row["curve"]) == 4 and row["loss"] > 0 and row["tokens_per_second"] > 0
        assert row["curve"][0] == rows.rows[1]["curve"][0], "the first batch is routed before anything is balanced"
    assert len({row["loss"] for row in rows.rows[1:]}) == len(METHODS)


def test_an_interrupted_comparison_goes_on_within_the_run(mine, rows, monkeypatch):
    text = rows.path.read_text()
    rows.path.write_text("\n".join(text.splitlines()[:-1]) + "\n")
    fit, begun = Trainer.fit, []

    def interrupted(trainer, watcher):
        return fit(trainer, Watcher(should_stop=lambda: trainer.step == 2))

    monkeypatch.setattr(Trainer, "fit", interrupted)
    with pytest.raises(Interrupted):
        compare(mine)
    monkeypatch.setattr(Trainer, "fit", lambda trainer, watcher: (begun.append(trainer.step), fit(trainer, watcher)))
    compare(mine)
    assert begun == [2]
    again, whole = (json.loads(lines.splitlines()[-1]) for lines in (rows.path.read_text(), text))
    assert again | {"tokens_per_second": 0} == whole | {"tokens_per_second": 0}
    rows.path.write_text(text)


def test_other_settings_under_the_same_name_are_refused(mine, rows):
    with pytest.raises(ValueError, match=r"another steps; name another --out"):
        compare(dataclasses.replace(mine, steps=5))


@pytest.mark.parametrize("method", ["none", "loss", "loss:0", "sign:x", "nothing:1", "sequence"])
def test_methods_that_cannot_be(mine, method):
    with pytest.raises(ValueError, match=f"methods {method}: is none of"):
        train_settings(method, mine)


def test_methods_are_settings(mine):
    assert train_settings("nothing", mine).balance_update_speed == 0
    assert train_settings("quantile", mine).balance_update_speed is None
    sequence = train_settings("sequence:1e-4", mine)
    assert (sequence.balance_rule, sequence.balance_loss, sequence.balance_loss_weight) == ("sign", "sequence", 1e-4)


def test_shuffled_routing_is_random_and_put_back():
    model, ids = tiny_v3(n_group=4, topk_group=1, num_experts_per_tok=2), random_ids(4, 40)
    with torch.no_grad():
        before = model(ids)
        with shuffled_routing(model):
            assert not torch.allclose(model(ids), before)
            router = routers(model)[0]
            groups = router.choose(torch.zeros(500, 8)).sort(-1).values
        assert (groups[:, 0] % 2 == 0).all() and (groups[:, 1] == groups[:, 0] + 1).all()
        assert len(groups[:, 0].unique()) == 4
        assert torch.equal(model(ids), before)


def test_the_report_has_a_line_for_every_method(mine, rows, tmp_path):
    text = report(rows, mine, "the command")
    assert all(f"| {method} |" in text for method in (START, *METHODS)) and "the command" in text
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra")
    balance.plot(rows, mine, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
