"""Every stage's forward computation on fake CUDA tensors: an operation on two devices is an error there."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from smolseek.conversion import carve, collect, upcycle
from smolseek.conversion.distill import dense_states, distillation_loss
from smolseek.conversion.mla.exact import exact_tensors
from smolseek.conversion.mla.folding import fold_bias, fold_norms
from smolseek.conversion.mla.heads import fit_heads, query_encoder
from smolseek.conversion.mla.latent import compress, fit_latent
from smolseek.conversion.mla.layout import low_rank_tensors
from smolseek.conversion.mla.plans import rope_plans
from smolseek.conversion.mla.weights import HeadSizes, Projections
from smolseek.conversion.moments import LayerMoments
from smolseek.conversion.probe import Probe, ProbedAttention, probed_attention
from smolseek.conversion.refine import attention_error, attention_loss
from smolseek.conversion.residual_stream import ResidualStream
from smolseek.conversion.running_sum import OuterSum
from smolseek.conversion.student import layers_of
from smolseek.model import DeepseekV3
from tests.factories import tiny_v3_config
from tests.fake_cuda import CUDA, fake_cuda

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, NEURONS, VOCAB = 32, 4, 2, 8, 48, 96


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with fake_cuda():
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def weights(entries: int = HIDDEN) -> Projections:
    k = KV_HEADS * HEAD_DIM
    return Projections(
        numbers(HEADS * HEAD_DIM, entries), numbers(k, entries), numbers(k, entries), numbers(HIDDEN, HEADS * HEAD_DIM)
    )


def moments(entries: int = HIDDEN, **more: Any) -> LayerMoments:
    k = KV_HEADS * HEAD_DIM
    inputs = lambda: [(torch.empty(10, entries), torch.empty(10, 1))]  # noqa: E731  (files are read on the CPU)
    return LayerMoments(numbers(entries, entries), numbers(4, k, 4, k), inputs=inputs, **more)


def dense_model(model_type: str) -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    config = AutoConfig.for_model(model_type, **sizes, **heads, max_position_embeddings=64)
    with CUDA:
        return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def converted_model() -> DeepseekV3:
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = tiny_v3_config(hidden_size=HIDDEN, vocab_size=VOCAB, num_hidden_layers=1, **heads)
    with CUDA:
        return DeepseekV3(config).eval().requires_grad_(False)


def dense_mlp() -> dict[str, Tensor]:
    shapes = {"gate_proj": (NEURONS, HIDDEN), "up_proj": (NEURONS, HIDDEN), "down_proj": (HIDDEN, NEURONS)}
    return {name: numbers(*shape, dtype=torch.float32) for name, shape in shapes.items()}


def no_ids(windows: int, device: Any = "cpu") -> Tensor:
    return torch.zeros(windows, 16, dtype=torch.int64, device=device)


def devices(*tensors: Tensor) -> set[str]:
    return {tensor.device.type for tensor in tensors}


def test_fake_tensors_refuse_two_devices() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        numbers(3) + torch.empty(3, dtype=torch.float64)


@pytest.mark.parametrize("rope_dim", [2, 4, 8, 12])
def test_closed_form(rope_dim: int) -> None:
    dense, measured, sizes = weights(), moments(), HeadSizes(HEAD_DIM, 6, 4)
    for plan in rope_plans(HEAD_DIM, rope_dim):
        compression = compress(dense, measured, plan, HEAD_DIM)
        latent = fit_latent(compression.encode, compression.target_YX, compression.fisher_YY, measured, 6)
        heads = fit_heads(dense, compression, latent, sizes, measured.input_XX)
        query = query_encoder(heads, dense, compression, latent.normed_CC, measured.input_XX, 5)
        tensors = low_rank_tensors(dense, compression, latent, heads, HEAD_DIM)
        assert devices(query, *tensors.values()) == {"cuda"}


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("entries", [HIDDEN, HIDDEN + 1])
def test_exact_form(entries: int, rotates: bool) -> None:
    tensors = exact_tensors(weights(entries), HEAD_DIM, HEAD_DIM, rotates=rotates)
    assert devices(*tensors.values()) == {"cuda"}


def test_norms_and_biases_are_folded() -> None:
    channels = (HEADS + KV_HEADS) * HEAD_DIM
    heads = {"heads_ZX": numbers(channels, HIDDEN), "heads_energy_Z": numbers(channels)}
    normed, biased = fold_norms(weights(), moments(**heads)), fold_bias(weights(HIDDEN + 1), moments(HIDDEN + 1))
    assert devices(normed[0].key, biased[0].key, biased[1].input_XX) == {"cuda"}


def test_sums_lie_where_the_tokens_are() -> None:
    cross, symmetric = OuterSum(), OuterSum()
    cross.add(numbers(2, 5, 7), numbers(2, 5, 3))
    symmetric.add(numbers(3, 600))
    for total in (cross, symmetric):
        total.end()
    assert devices(cross.read(), symmetric.read()) == {"cuda"}


def test_labels_and_loss_gradient() -> None:
    generator = torch.Generator()
    labels = collect.sample_labels(numbers(4, VOCAB, dtype=torch.float32), generator)
    hidden, head = (numbers(*shape, dtype=torch.float32) for shape in ((2, 4, HIDDEN), (VOCAB, HIDDEN)))
    assert devices(labels, collect._loss_gradient(hidden, head, generator)) == {"cuda"}


@pytest.mark.parametrize("qk_norms", [False, True])
def test_probes(qk_norms: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "keep_inputs", lambda self, x: assert_on_cpu(x))
    model = dense_model("qwen3" if qk_norms else "llama")
    angles = numbers(HEAD_DIM // 2, dtype=torch.float32)
    probes = [Probe(angles, tmp_path / str(i), spills=False, qk_norms=qk_norms) for i in range(2)]
    pairs = zip(model.model.layers, probes, strict=True)
    hooks: list[tuple[nn.Module, Any]] = [hook for layer, probe in pairs for hook in probe.hooks(layer.self_attn)]
    with collect.hooked(hooks), probed_attention(model, probes):
        out = model.base_model(input_ids=no_ids(2, CUDA), use_cache=False).last_hidden_state
    probe = probes[0]
    probe.unrotated_BGTd = probe.slot_BGTd = numbers(2, KV_HEADS, 16, HEAD_DIM, dtype=torch.float32)
    probe.add(probe.value_BTk, probe.key)
    assert devices(out, probe.inputs.read(), probe.gradients.read()) == {"cuda"}


def test_the_probes_backward_pass() -> None:
    """The backward pass is written by hand, so it can be called as a function."""
    query, key = (numbers(2, heads, 16, HEAD_DIM, dtype=torch.float32) for heads in (HEADS, KV_HEADS))
    probe = SimpleNamespace(slot_angles_F=numbers(HEAD_DIM // 2, dtype=torch.float32))
    context = SimpleNamespace(saved_tensors=(query, key, key, query, query), scaling=1.0, probe=probe)
    gradients = ProbedAttention.backward(context, query)[:3]
    assert devices(*gradients, probe.unrotated_BGTd, probe.slot_BGTd) == {"cuda"}


def assert_on_cpu(x: Tensor) -> None:
    assert devices(x) == {"cpu"}  # it is written to a file


def test_refinement_and_the_end_to_end_stage() -> None:
    dense, student = dense_model("llama"), converted_model()
    stream = ResidualStream(dense.model, no_ids(6))
    stream.enter(0)
    block, rope = layers_of(student)[0].self_attn, student.model.rope(16)
    x, target = stream.attention(torch.tensor([1, 2]))
    loss = attention_loss(block, rope, x, target, target.square().sum())
    attention_error(block, rope, stream)
    stream.pass_attention(partial(block, rope=rope))
    samples = stream.mlp_samples()
    stream.pass_mlp(layers_of(student)[0].mlp)
    head_VD, states = dense.get_output_embeddings().weight, dense_states(dense, no_ids(2), [0])
    divergence = distillation_loss(student, head_VD, states.of(torch.tensor([1])))
    streams = (
        stream.hidden_BTD,
        stream.converted_BTD,
        stream.final_states(),
        states.final_BTD,
        *states.behind_BTD.values(),
    )
    assert devices(loss, *samples[0], *samples[1], *streams, divergence) == {"cuda"}


def test_carving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carve, "split", lambda *_: [list(range(8 * part, 8 * part + 8)) for part in range(6)])
    monkeypatch.setattr(carve, "move_neurons", lambda routed, *_: routed)
    x_ND = numbers(100, HIDDEN, dtype=torch.float32)
    sample = carve.MlpSample(x_ND, x_ND, carve.error_weights(x_ND))
    names = ("n_shared_experts", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size")
    carving = carve.carve(dense_mlp(), sample, dict(zip(names, (2, 2, 4, 8), strict=True)))
    loss, counts_E = carve.carving_loss(carving, sample, 2)
    assert devices(*carving, loss, counts_E) == {"cuda"}


def test_balanced_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carve, "_fill_clusters", lambda alike: alike.argmax(1))  # the real one reads numbers
    assert devices(carve.balanced_clusters(numbers(40, 100, dtype=torch.float32), 4)) == {"cuda"}


def test_upcycling() -> None:
    inputs_BTD = numbers(3, 20, HIDDEN, dtype=torch.float32)
    rows_gD = upcycle.router_rows(inputs_BTD, 3, torch.Generator())
    bias_g = upcycle.balancing_bias(inputs_BTD.flatten(0, 1), rows_gD)
    sizes = {"num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    config = sizes | {"intermediate_size": NEURONS, "n_routed_experts": 6}
    assert devices(*dict(upcycle.upcycle(dense_mlp(), config, rows_gD, bias_g)).values()) == {"cuda"}


def test_mlp_inputs() -> None:
    for model in (dense_model("llama"), converted_model()):
        assert devices(*collect.collect_mlp_inputs(model, no_ids(3), 8)) == {"cuda"}
