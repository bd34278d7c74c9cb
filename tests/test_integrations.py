"""BalanceCallback in the real transformers Trainer, on a stock model."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, Trainer, TrainingArguments

from smolseek.integrations import BalanceCallback
from smolseek.model.balance import next_bias
from tests.factories import VOCAB, enliven, tiny_v3_config

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install -e '.[dev]'")
ROOT = Path(__file__).parents[1]


def skewed_model(**overrides: Any) -> DeepseekV3ForCausalLM:
    """Returns a stock model whose biases push most tokens to the same experts."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(tiny_v3_config(**overrides))
    enliven(model)
    for router in routers_of(model):
        router.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    return model


def routers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


def biases_of(model: Any) -> list[Tensor]:
    return [router.e_score_correction_bias.clone() for router in routers_of(model)]


def examples(count: int, tokens: int = 24) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCAB, (count, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: Any, folder: Path, *callbacks: Any, count: int = 64, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**(settings | options))
    data = examples(count)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:16], callbacks=list(callbacks))


def test_an_unbalanced_router_is_balanced_and_saved_with_its_biases(tmp_path):
    model, untouched = skewed_model(), skewed_model()
    trainer = trainer_of(
        model,
        tmp_path,
        BalanceCallback(0.05, freeze_share=0.2),
        max_steps=40,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=10,
    )
    trainer.train()
    maxvio = [entry["maxvio"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(maxvio) == 40 and maxvio[0] > 1
    assert maxvio[-1] < 0.35, maxvio
    alone = trainer_of(untouched, tmp_path, max_steps=2)
    alone.train()
    assert all(torch.equal(*pair) for pair in zip(biases_of(untouched), biases_of(skewed_model()), strict=True))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "saved")
    for mine, theirs in zip(biases_of(model), biases_of(loaded), strict=True):
        assert torch.equal(mine, theirs) and mine.abs().max() > 0 and abs(float(mine.mean())) < 1e-6


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_counts_are_those_of_the_global_step(tmp_path, reentrant):
    """Two micro-batches are one update; evaluation and recomputed activations do not count."""
    model, counted = skewed_model(), []

    class Spy(BalanceCallback):
        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            counted.append([counts.clone() for counts in self._counts.values()])
            super().on_step_end(*arguments, **kwargs)

    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    before = biases_of(model)
    trainer = trainer_of(
        model,
        tmp_path,
        Spy(0.01),
        max_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        **({} if reentrant is None else checkpointing),
    )
    trainer.train()
    trainer.evaluate()
    assert [int(counts_E.sum()) for counts_E in counted[0]] == [2 * 4 * 24 * 3] * 2
    for bias, was, counts_E in zip(biases_of(model), before, counted[0], strict=True):
        torch.testing.assert_close(bias, next_bias(was, counts_E, 0.01))
    assert not any(router._forward_hooks for router in routers_of(model))


def test_a_bias_in_half_precision_becomes_single(tmp_path):
    model = skewed_model().bfloat16()
    trainer_of(model, tmp_path, BalanceCallback(1e-4, rule="proportional")).train()
    assert all(bias.dtype == torch.float32 for bias in biases_of(model))


def test_a_router_that_does_not_run_is_left_alone(tmp_path):
    """PEFT's modules_to_save trains a copy of a router and keeps the original in the model."""
    model = skewed_model()
    model.spare = copy.deepcopy(routers_of(model)[0])
    *before, spare = biases_of(model)
    trainer_of(model, tmp_path, BalanceCallback(0.01)).train()
    *after, spare_after = biases_of(model)
    assert torch.equal(spare, spare_after)
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_model_without_routers_is_refused(tmp_path):
    model = skewed_model(first_k_dense_replace=3)
    with pytest.raises(ValueError, match="no router"):
        trainer_of(model, tmp_path, BalanceCallback()).train()


WORKER = """
import json, sys
from pathlib import Path
import torch
from smolseek.integrations import BalanceCallback
from tests.test_integrations import biases_of, skewed_model, trainer_of

torch.set_num_threads(1)
model, folder = skewed_model(), Path(sys.argv[1])
trainer = trainer_of(model, folder, BalanceCallback(0.01), **json.loads(sys.argv[2]))
trainer.train()
biases = [bias.tolist() for bias in biases_of(model)]
(folder / f"{trainer.args.process_index}.json").write_text(json.dumps(biases))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_counts_of_all_processes_are_added(tmp_path, monkeypatch):
    """Pretends that another process routed 1,000 tokens of every layer to expert 0."""
    model, reduced = skewed_model(), []

    def all_reduce(counts_E):
        counts_E[0] += 1000
        reduced.append(counts_E.clone())

    class Distributed(BalanceCallback):
        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(torch.distributed, "is_initialized", lambda: True)
                patch.setattr(torch.distributed, "all_reduce", all_reduce)
                super().on_step_end(*arguments, **kwargs)

    before = biases_of(model)
    trainer_of(model, tmp_path, Distributed(0.01), max_steps=1).train()
    assert [int(counts_E.sum()) for counts_E in reduced] == [8 * 24 * 3 + 1000] * 2
    for bias, was, counts_E in zip(biases_of(model), before, reduced, strict=True):
        torch.testing.assert_close(bias, next_bias(was, counts_E, 0.01))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_add_up(tmp_path):
    """Two processes with half the batch each move the biases like one process with the whole batch."""
    options: dict[str, Any] = {"count": 16, "max_steps": 1, "per_device_train_batch_size": 16}
    alone = skewed_model()
    trainer_of(alone, tmp_path, BalanceCallback(0.01), **options).train()
    options |= {"per_device_train_batch_size": 8, "ddp_backend": "gloo"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(options)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=500) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        biases = json.loads((tmp_path / f"{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(biases), torch.stack(biases_of(alone)))
