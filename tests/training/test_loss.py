import pytest
import torch
import torch.nn.functional as F

import smolseek.training.loss
from smolseek.training.loss import IGNORED, has_fused_entropy, next_token_loss


@pytest.mark.parametrize("chunk_logits", [2**25, 50 * 16, 1])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 2.5), (1.0, 0.5)])
@pytest.mark.parametrize("fused", [True, False])
def test_chunks_give_the_plain_loss_and_gradients(monkeypatch, chunk_logits, weight, temperature, fused):
    monkeypatch.setattr(smolseek.training.loss, "_MAX_CHUNK_LOGITS", chunk_logits)
    if not fused:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    torch.manual_seed(0)
    hidden, head = torch.randn(37, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(37, 6), torch.randn(50, 6)
    labels = torch.randint(50, (37,))
    loss, entropy = next_token_loss(
        hidden,
        head,
        labels,
        teacher_hidden_ND=teacher_hidden,
        teacher_head_VD=teacher_head,
        distill_weight=weight,
        temperature=temperature,
    )
    got = torch.autograd.grad(loss, (hidden, head))
    logits = hidden @ head.T
    plain_entropy = F.cross_entropy(logits, labels)
    target = (teacher_hidden @ teacher_head.T / temperature).log_softmax(-1)
    student = (logits / temperature).log_softmax(-1)
    divergence = temperature**2 * (target.exp() * (target - student)).sum(-1).mean()
    plain = (1 - weight) * plain_entropy + weight * divergence
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(entropy, plain_entropy.detach())
    for ours, wanted in zip(got, torch.autograd.grad(plain, (hidden, head)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_logits", [2**25, 50 * 4])
def test_ignored_labels_have_no_part_in_loss_or_gradient(monkeypatch, chunk_logits):
    monkeypatch.setattr(smolseek.training.loss, "_MAX_CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(20, 6), torch.randn(50, 6)
    labels, kept = torch.randint(50, (20,)), torch.arange(20) % 3 == 0
    options = {"teacher_head_VD": teacher_head, "distill_weight": 0.5}
    masked = next_token_loss(hidden, head, labels.where(kept, IGNORED), teacher_hidden_ND=teacher_hidden, **options)
    alone = next_token_loss(hidden[kept], head, labels[kept], teacher_hidden_ND=teacher_hidden[kept], **options)
    torch.testing.assert_close(masked, alone)
    assert torch.autograd.grad(masked[0], hidden)[0][~kept].eq(0).all()


def test_a_batch_without_labels_teaches_nothing():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
    loss, entropy = next_token_loss(hidden, head, torch.full((4,), IGNORED))
    assert loss.item() == entropy.item() == 0
    assert torch.autograd.grad(loss, hidden)[0].eq(0).all()


def test_torchs_own_chunks_are_for_fp32_alone():
    hidden, head = torch.randn(37, 8), torch.randn(50, 8)
    there = hasattr(F, "linear_cross_entropy")
    assert has_fused_entropy(hidden, head) == there
    assert not has_fused_entropy(hidden.bfloat16(), head.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not has_fused_entropy(hidden, head)


def test_no_more_than_a_chunk_of_the_teachers_logits_is_held(monkeypatch):
    monkeypatch.setattr(smolseek.training.loss, "_MAX_CHUNK_LOGITS", 50 * 4)
    sizes, linear = [], F.linear

    def seen(*arguments):
        out = linear(*arguments)
        sizes.append(len(out))
        return out

    monkeypatch.setattr(F, "linear", seen)
    hidden, head = torch.randn(37, 8, requires_grad=True), torch.randn(50, 8)
    teacher = {"teacher_hidden_ND": torch.randn(37, 6), "teacher_head_VD": torch.randn(50, 6)}
    next_token_loss(hidden, head, torch.randint(50, (37,)), **teacher, distill_weight=0.5)[0].backward()
    assert max(sizes) == 4
