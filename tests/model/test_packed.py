"""FlexAttention over packed windows gives the mask's numbers: on the CPU its plain form, on a GPU its kernel."""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import flex_attention

from smolseek.model import DeepseekV3, packed, transformer
from smolseek.model.packed import document_blocks, has_kernel
from tests.factories import layers_of, random_ids, tiny_v3

SEGMENTS = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5, [0] * 24])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The blocks that were made, where FlexAttention runs uncompiled on the CPU, which has only the plain form."""
    made: list[object] = []

    def counted(segment_ids: Tensor) -> object:
        made.append(document_blocks(segment_ids))
        return made[-1]

    monkeypatch.setattr(packed, "_compiled", lambda function: function)
    monkeypatch.setattr(transformer, "has_kernel", lambda *_: True)
    monkeypatch.setattr(transformer, "document_blocks", counted)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # it refuses gradients on a CPU
    yield made


def numbers_of(model: DeepseekV3, ids: Tensor, segments: Tensor) -> list[Tensor]:
    """Returns logits and all gradients of a training forward."""
    model.train()
    logits = model(ids, segment_ids=segments)
    direction = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).sin().view_as(logits).to(logits)
    gradients = torch.autograd.grad((logits * direction).sum(), list(model.parameters()))
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_give_the_masks_logits_and_gradients(eager: list[object], checkpointing: bool) -> None:
    model, ids = tiny_v3(q_lora_rank=20, num_hidden_layers=2), random_ids(2, 24)
    model.model.activation_checkpointing = checkpointing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "has_kernel", lambda *_: False)
        expected = numbers_of(model, ids, SEGMENTS)
    assert not eager
    for got, wanted in zip(numbers_of(model, ids, SEGMENTS), expected, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6
    assert len(eager) == 1  # one for all layers


@pytest.mark.parametrize("layers_too", [False, True])
def test_other_documents_compile_nothing_anew(
    eager: list[object], layers_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here without the code that a compiler would make: the functions are traced, whole, and traced once."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = functools.cache(lambda function: torch.compile(function, fullgraph=True, backend=counter))
    monkeypatch.setattr(packed, "_compiled", compiled)
    model, ids = tiny_v3(num_hidden_layers=2, first_k_dense_replace=2), random_ids(2, 24)
    expected = [numbers_of(model, ids, SEGMENTS.roll(shift, 0)) for shift in (0, 1)]
    assert counter.frame_count == 2 and len(eager) == 2  # the blocks, and attention to them in both layers
    if layers_too:
        layers = layers_of(model)
        model.model.compiled_layers = [torch.compile(layer, dynamic=False, backend=counter) for layer in layers]
        counts = []
        for shift, wanted in enumerate(expected):
            for got, want in zip(numbers_of(model, ids, SEGMENTS.roll(shift, 0)), wanted, strict=True):
                assert (got - want).norm() <= 1e-5 * want.norm() + 1e-6
            counts.append(counter.frame_count)
        assert 2 < counts[0] == counts[1]


def test_sharded_layers_take_blocks(eager: list[object]) -> None:
    model, ids = tiny_v3(num_hidden_layers=2), random_ids(2, 24)
    model.train()(ids, segment_ids=SEGMENTS).sin().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(ids, segment_ids=SEGMENTS).sin().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.to_local(), expected[name])  # type: ignore[union-attr]
    finally:
        torch.distributed.destroy_process_group()
    assert len(eager) == 2


def test_the_mask_stays_where_blocks_are_no_use(eager: list[object]) -> None:
    model, ids = tiny_v3(num_hidden_layers=2), random_ids(2, 24)
    with torch.no_grad():
        model(ids, segment_ids=SEGMENTS)
    model(ids)
    model.config.attention_dropout = 0.1
    model.train()(ids, segment_ids=SEGMENTS)
    assert not eager
    assert not has_kernel(torch.device("cpu"), torch.float32, 64, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("sizes", [{}, {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_gives_the_masks_logits_and_gradients(
    sizes: dict[str, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, segments = tiny_v3(**sizes).cuda(), random_ids(2, 300).cuda(), SEGMENTS.repeat_interleave(13, 1).cuda()
    model.config.max_position_embeddings = 312
    ids, segments = ids[:, :300], segments[:, :300]
    assert has_kernel(ids.device, torch.float32, model.config.qk_head_dim, model.config.v_head_dim)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "has_kernel", lambda *_: False)
        expected = numbers_of(model, ids, segments)
    if compiled:
        model.model.compile_for_training()
    for got, wanted in zip(numbers_of(model, ids, segments), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("widths", [(96, 64), (128, 64), (128, 128), (192, 128)])
def test_heads_of_converted_models_have_a_kernel_or_a_mask(widths: tuple[int, int]) -> None:
    """The last one, of a source with heads of 128, has none where a block has little shared memory."""
    assert has_kernel(torch.device("cuda"), torch.bfloat16, *widths) or widths[0] > 128
