"""LoRA by PEFT on a stock folder: which targets take effect, and the folder that a merged model is saved to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

import smolseek
from smolseek.cli import main
from tests.export.folders import ids, tiny_folder
from tests.factories import logits_of

peft = pytest.importorskip("peft", reason="needs PEFT: pip install -e '.[dev]'")
PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
PROMPT = ids(24).view(2, 12)

ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IN_ATTENTION = {f"self_attn.{name}.weight" for name in ATTENTION}
ROUTED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED = {f"mlp.shared_experts.{name}.weight" for name in MLP}
DENSE = {f"mlp.{name}.weight" for name in MLP}


def with_lora(folder: Path, **targets: Any) -> Any:
    """Returns the folder's model with LoRA whose weights are large enough to change the logits."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    return stirred(peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets)))


@torch.no_grad()
def stirred(model: Any) -> Any:
    """Returns the model, in eval mode, with noise in place of LoRA's zeros."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def changed(folder: Path, model: Any) -> set[str]:
    """Returns the names, without their layer's, of the weights that differ from the folder's once LoRA is merged."""
    before = DeepseekV3ForCausalLM.from_pretrained(folder).state_dict()
    after: dict[str, Tensor] = model.merge_and_unload().state_dict()
    assert set(after) == set(before)
    return {re.sub(r"model\.layers\.\d+\.", "", name) for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize(
    ("targets", "take_effect"),
    [
        ({"target_modules": ATTENTION}, IN_ATTENTION),
        ({"target_modules": [], "target_parameters": sorted(ROUTED)}, ROUTED),
        ({"target_modules": [], "target_parameters": sorted(SHARED)}, SHARED),
        ({"target_modules": [], "target_parameters": sorted(DENSE)}, DENSE),
        ({"target_modules": ["gate"]}, {"mlp.gate.weight"}),
        # PEFT takes these names for routed experts, and leaves shared experts and dense MLPs out.
        ({"target_modules": MLP}, ROUTED),
        ({"target_modules": [f"shared_experts.{name}" for name in MLP]}, ROUTED),
        ({"target_modules": [*ATTENTION, *MLP]}, IN_ATTENTION | ROUTED),
        ({"target_modules": "all-linear"}, IN_ATTENTION | ROUTED | {"mlp.gate.weight"}),
    ],
)
@pytest.mark.filterwarnings("ignore:The following")
def test_which_weights_a_target_reaches(tmp_path, targets, take_effect):
    tiny_folder(tmp_path / "m")
    assert changed(tmp_path / "m", with_lora(tmp_path / "m", **targets)) == take_effect


def test_both_halves_of_a_query_latent_are_reached(tmp_path):
    tiny_folder(tmp_path / "m", q_lora_rank=16)
    model = with_lora(tmp_path / "m", target_modules=["q_a_proj", "q_b_proj"])
    assert changed(tmp_path / "m", model) == {"self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight"}


@pytest.mark.filterwarnings("ignore:The following")
def test_a_model_without_experts_needs_target_parameters_for_its_mlp(tmp_path):
    tiny_folder(tmp_path / "m", first_k_dense_replace=3)
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        model = with_lora(tmp_path / "m", target_modules=["q_proj", *MLP])
    assert changed(tmp_path / "m", model) == {"self_attn.q_proj.weight"}
    model = with_lora(tmp_path / "m", target_modules=["q_proj"], target_parameters=sorted(DENSE))
    assert changed(tmp_path / "m", model) == {"self_attn.q_proj.weight"} | DENSE


def page_blocks() -> list[str]:
    """Returns the page's Python blocks about PEFT: the LoRA config, and the merge."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return [block for block in blocks if "LoraConfig(" in block or "merge_and_unload" in block]


@pytest.mark.parametrize("sizes", [{}, {"first_k_dense_replace": 3}], ids=["experts", "dense"])
def test_the_page_s_lines_make_a_stock_folder(tmp_path, monkeypatch, capsys, sizes):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "runs" / "quickstart" / "model"
    tiny_folder(source, **sizes)
    configure, merge = page_blocks()
    names: dict[str, Any] = {}
    exec(configure, names)
    stirred(names["model"])
    with torch.inference_mode():
        trained = logits_of(names["model"], PROMPT)
    exec(merge, names)
    stock = DeepseekV3ForCausalLM.from_pretrained("merged").eval()
    with torch.inference_mode():
        assert (trained - logits_of(smolseek.load(source).eval(), PROMPT)).abs().max() > 0.5
        torch.testing.assert_close(logits_of(stock, PROMPT), trained, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits_of(smolseek.load("merged").eval(), PROMPT), trained, atol=1e-4, rtol=0)
    assert main(["check", "merged", "--runtime", "transformers", "llama.cpp"]) == 0
    assert capsys.readouterr().out.count(" loads") == 2
    assert json.loads(Path("merged/config.json").read_text())["num_nextn_predict_layers"] == 0
    before = DeepseekV3ForCausalLM.from_pretrained(source).state_dict()
    after: dict[str, Tensor] = stock.state_dict()
    reached = {name.split(".", 3)[-1] for name in after if not torch.equal(after[name], before[name])}
    assert reached == IN_ATTENTION | DENSE | (set() if sizes else ROUTED | SHARED)


def test_dropout_is_refused_with_target_parameters(tmp_path):
    tiny_folder(tmp_path / "m")
    with pytest.raises(ValueError, match="lora_dropout"):
        with_lora(tmp_path / "m", target_modules=[], target_parameters=sorted(ROUTED), lora_dropout=0.1)


def test_a_merge_in_half_precision_leaves_the_bias_in_single(tmp_path):
    tiny_folder(tmp_path / "m", moe_intermediate_size=24)
    stock = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    biases = dict(stock.named_buffers())
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=ATTENTION, target_parameters=sorted(ROUTED))
    merged = stirred(peft.get_peft_model(stock, config)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert again.lm_head.weight.dtype == torch.bfloat16
    found = {name: bias for name, bias in again.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(found) == 2 and all(bias.dtype == torch.float32 for bias in found.values())
    assert all(torch.equal(bias, biases[name]) for name, bias in found.items())
