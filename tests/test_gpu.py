"""What only a CUDA device can show: the CPU's numbers there, training in bf16 and compiled, FSDP, decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smolseek.checkpoint.hub import load, load_stock, save
from smolseek.config import DataSettings, ParallelSettings, Recipe, SampleSettings, TrainSettings
from smolseek.conversion.pipeline import convert
from smolseek.generation import generate
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.decoding import DecodeStep, has_fixed_steps
from smolseek.model.experts import MixtureOfExperts
from smolseek.training.objective import window_loss
from smolseek.training.processes import TorchrunProcesses
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher
from tests.factories import enliven, random_ids, tiny_llama, tiny_v3, tiny_v3_config
from tests.text import ENTRIES, tiny_tokenizer, write_stories

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

CONVERSIONS: dict[str, dict[str, Any]] = {
    "closed form": {"refine_steps": 0},
    "refined": {"refine_steps": 30},
    "end-to-end KL": {"refine_steps": 10, "distill_steps": 30},
    "carve": {"refine_steps": 30, "experts": "carve", "active": 0.75},
    "upcycle": {"refine_steps": 0, "experts": "upcycle"},
    "exact": {"exact": True},
    "spilled moments": {"refine_steps": 0},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_stories(tmp_path_factory.mktemp("text") / "stories.txt"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), folder, tokenizer_from=tiny_tokenizer())
    return folder


def converted(source: Path, out: Path, text: str, device: str, **changes: Any) -> Path:
    settings = {"calibration": text, "calibration_windows": 12, "calibration_window_tokens": 32, "distill_steps": 0}
    sizes = {} if changes.get("exact") else {"kv_lora_rank": 12, "qk_rope_head_dim": 4}
    return convert(source, out, device=device, **(settings | sizes | changes))


def recipe_of(text: str, **train: Any) -> Recipe:
    plain = {"steps": 60, "batch_windows": 4, "window_tokens": 16, "learning_rate": 1e-2, "warmup_steps": 2}
    return Recipe(
        source="unused",
        data=DataSettings(train=(text,), shuffle_windows=8, held_out_share=0.2),
        train=TrainSettings(**(plain | train)),
        sample=SampleSettings(max_new_tokens=5),
    )


def test_logits_and_greedy_tokens_are_the_cpus():
    model, ids = tiny_v3(), random_ids(2, 20)
    on_cpu, tokens = model(ids), generate(model, ids, max_new_tokens=20)
    model = model.cuda()
    torch.testing.assert_close(model(ids.cuda()).cpu(), on_cpu, rtol=0, atol=1e-3)
    assert torch.equal(generate(model, ids.cuda(), max_new_tokens=20).cpu(), tokens)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_loses_what_it_loses_on_the_cpu(kind, source, text, tmp_path, monkeypatch):
    if kind == "spilled moments":
        monkeypatch.setattr("smolseek.conversion.collect.SPILL_BYTES", 0)
    losses = {}
    for device in ("cpu", "cuda"):
        out = converted(source, tmp_path / device, text, device, **CONVERSIONS[kind])
        losses[device] = json.loads((out / "conversion.json").read_text())["losses"]
        ids = random_ids(2, 20)
        logits = load_stock(out)(ids)
        if kind in ("exact", "upcycle"):
            same = load_stock(source if kind == "exact" else tmp_path / "cpu")(ids)
            torch.testing.assert_close(logits, same, rtol=0, atol=1e-3 if kind == "exact" else 0.1)
    assert losses["cuda"].keys() == losses["cpu"].keys()
    for stage, loss in losses["cpu"].items():
        assert losses["cuda"][stage] == pytest.approx(loss, rel=0.02), stage


@pytest.mark.parametrize("changes", [{"precision": "float32"}, {"precision": "bfloat16"}, {"compile": True}])
def test_training_learns(changes, text, tmp_path):
    recipe = recipe_of(text, **changes)
    trainer = Trainer(tiny_v3(vocab_size=ENTRIES).cuda(), tiny_tokenizer(), recipe, tmp_path / "run")
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before - 1


@pytest.mark.parametrize("experts", ["carve", "upcycle"])
def test_converted_experts_heal(experts, source, text, tmp_path):
    out = converted(source, tmp_path / "out", text, "cuda", experts=experts, refine_steps=5)
    recipe = recipe_of(text, distill_weight=0.9, steps=40, learning_rate=3e-3)
    teacher = load_stock(source, device="cuda")
    trainer = Trainer(load(out, device="cuda"), tiny_tokenizer(), recipe, tmp_path / "run", teacher=teacher)
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before


def test_fsdp_on_one_device(text, tmp_path):
    """FSDP over one device still shards, gathers and saves as over several."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        processes = TorchrunProcesses(ParallelSettings(), "cuda")
        model = tiny_v3(vocab_size=ENTRIES).cuda()
        trainer = Trainer(model, tiny_tokenizer(), recipe_of(text), tmp_path / "run", processes=processes)
        before = trainer.evaluate().loss
        assert trainer.fit(Watcher()).loss < before - 1
        assert load(trainer.save_model("model")).config.vocab_size == ENTRIES
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_packed_documents_and_checkpointed_blocks_learn(optimizer, text, tmp_path):
    """All at once: documents apart by FlexAttention, activations computed again, blocks compiled."""
    changes = {"mask_documents": True, "activation_checkpointing": True, "compile": True, "optimizer": optimizer}
    recipe = recipe_of(text, precision="bfloat16", **changes)
    trainer = Trainer(tiny_v3(vocab_size=ENTRIES).cuda(), tiny_tokenizer(), recipe, tmp_path / "run")
    before = trainer.evaluate().loss
    assert trainer.fit(Watcher()).loss < before - 1


def test_an_expert_without_tokens_has_zero_gradient():
    """PyTorch #172439: on a B200 grouped_mm gives it another one."""
    moe = MixtureOfExperts(tiny_v3_config(hidden_size=64, moe_intermediate_size=32))
    enliven(moe)
    moe = moe.to("cuda", torch.bfloat16)
    moe.gate.e_score_correction_bias[2:5] = -10
    torch.empty(2**28, device="cuda").fill_(torch.nan)  # what a kernel forgets to write is then no zero
    moe(torch.randn(2, 90, 64, device="cuda", dtype=torch.bfloat16)).float().pow(2).sum().backward()
    assert moe.gate.expert_counts[2:5].tolist() == [0, 0, 0]
    for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj):
        assert parameter.grad.isfinite().all() and (parameter.grad[2:5] == 0).all()
        assert (parameter.grad[[0, 1, 5, 6, 7]].flatten(1).norm(dim=1) > 0).all()


@pytest.fixture
def no_waiting():
    """Makes it an error to wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def bf16_model(**sizes):
    """Returns a model whose experts are computed without reading their sizes: in bf16, of aligned sizes."""
    model = DeepseekV3(tiny_v3_config(hidden_size=64, moe_intermediate_size=32, **sizes))
    enliven(model)
    return model.to("cuda", torch.bfloat16)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10), reason="no grouped product"
)
def test_forward_and_backward_wait_for_nothing(request):
    model, windows = bf16_model().train(), random_ids(4, 33).int()
    for _ in range(2):  # the first time kernels are compiled and chosen
        window_loss(model, windows, TrainSettings())[0].backward()
    request.getfixturevalue("no_waiting")
    window_loss(model, windows, TrainSettings())[0].backward()


@pytest.mark.parametrize("experts", [True, False])
def test_steps_as_graphs_decode_what_plain_steps_do(experts, monkeypatch):
    sizes = {} if experts else {"first_k_dense_replace": 3}
    model = bf16_model(max_position_embeddings=700, **sizes).eval()
    if not has_fixed_steps(model):
        pytest.skip("no grouped product here")
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (250, 7)]
    graphs = generate(model, prompts, max_new_tokens=40)  # across two sizes of the cache
    monkeypatch.setattr("smolseek.generation.has_fixed_steps", lambda model: False)
    plain = generate(model, prompts, max_new_tokens=40)
    same = sum(a == b for one, other in zip(graphs, plain, strict=True) for a, b in zip(one, other, strict=True))
    assert same > 257 + 40  # rounding in bf16 may turn a choice, and then the text goes another way


def test_a_step_as_a_graph_gives_the_plain_logits():
    model = DeepseekV3(tiny_v3_config(first_k_dense_replace=3))
    enliven(model)
    model, ids = model.cuda().eval(), random_ids(2, 20).cuda()
    with torch.inference_mode():
        expected = model(ids)
        cache = model.new_cache(2, 20)
        model(ids[:, :5], cache=cache)
        step = DecodeStep(model, cache)
        for position in range(5, 20):
            logits_BV = step(ids[:, position : position + 1])
            torch.testing.assert_close(logits_BV, expected[:, position], rtol=0, atol=1e-3)
