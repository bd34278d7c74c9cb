"""TRL's SFTTrainer with BalanceCallback on a stock folder, with all weights and with LoRA."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

import smolseek
from smolseek.cli import main
from smolseek.integrations import BalanceCallback
from tests.export.folders import ids, tiny_folder
from tests.factories import logits_of
from tests.text import stories

trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[dev]'")
PROMPT = ids(24).view(2, 12)


def trained(folder: Path, out: Path, **options: Any) -> Any:
    """Returns an SFTTrainer that has trained the folder's model for three steps, with finite losses."""
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_length": 32,
        "packing": True,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = trl.SFTTrainer(
        model=DeepseekV3ForCausalLM.from_pretrained(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_dict({"text": stories(32)}),
        args=trl.SFTConfig(**settings),
        callbacks=[BalanceCallback(0.01)],
        **options,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(math.isfinite(entry["loss"]) and entry["maxvio"] > 0 for entry in logged)
    trainer.model.eval()
    return trainer


def biases_of(model: Any) -> list[Tensor]:
    """Returns the biases of the routers in use: not of those that PEFT keeps beside its copies."""
    named = model.named_buffers()
    return [b for name, b in named if name.endswith("e_score_correction_bias") and "original_module" not in name]


@torch.inference_mode()
def assert_loads(folder: Path, wanted: Tensor, biases: list[Tensor]) -> None:
    """Checks that transformers, smolseek and `smolseek check` read the folder of a model with these logits."""
    stock = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits_of(stock, PROMPT), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(smolseek.load(folder).eval(), PROMPT), wanted, atol=1e-4, rtol=0)
    assert all(torch.equal(mine, bias) for mine, bias in zip(biases_of(stock), biases, strict=True))
    assert main(["check", str(folder), "--runtime", "transformers", "llama.cpp"]) == 0


def test_all_weights(tmp_path):
    tiny_folder(tmp_path / "m")
    trainer = trained(tmp_path / "m", tmp_path / "run")
    before = biases_of(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "m"))
    after = biases_of(trainer.model)
    assert all((b - a).abs().max() > 0.005 and b.dtype == torch.float32 for a, b in zip(before, after, strict=True))
    trainer.save_model(str(tmp_path / "saved"))
    with torch.inference_mode():
        assert_loads(tmp_path / "saved", logits_of(trainer.model, PROMPT), after)
    text = stories(1)[0]
    saved, source = (AutoTokenizer.from_pretrained(tmp_path / name)(text)["input_ids"] for name in ("saved", "m"))
    assert saved == source


@pytest.mark.parametrize("keeps_router", [True, False])
def test_lora_and_what_an_adapter_keeps_of_the_bias(tmp_path, keeps_router):
    """A merged model keeps the bias in any case; an adapter only if PEFT saves the routers with it."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install -e '.[dev]'")
    tiny_folder(tmp_path / "m")
    config = peft.LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["gate"] if keeps_router else None,
    )
    trainer = trained(tmp_path / "m", tmp_path / "run", peft_config=config)
    before, after = biases_of(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "m")), biases_of(trainer.model)
    assert all((b - a).abs().max() > 0.005 for a, b in zip(before, after, strict=True))
    with torch.inference_mode():
        wanted = logits_of(trainer.model, PROMPT)
    trainer.save_model(str(tmp_path / "adapter"))
    for adapter in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-3"):
        again = peft.PeftModel.from_pretrained(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "m"), adapter).eval()
        with torch.inference_mode():
            assert torch.allclose(logits_of(again, PROMPT), wanted, atol=1e-4) == keeps_router
        assert all(torch.equal(*pair) == keeps_router for pair in zip(biases_of(again), after, strict=True))
    after = [bias.clone() for bias in after]
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_loads(tmp_path / "merged", wanted, after)
