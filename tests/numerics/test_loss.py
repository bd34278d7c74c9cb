import pytest
import torch
import torch.nn.functional as F

import smolseek.numerics.loss
from smolseek.numerics.loss import IGNORED, divergence, next_token_loss


@pytest.fixture
def set_chunk(monkeypatch):
    """Returns a function that limits a chunk to a number of fp32 logits, and a block of KL to half of it."""

    def set_(logits):
        monkeypatch.setattr(smolseek.numerics.loss, "_MAX_CHUNK_BYTES", 4 * logits)
        monkeypatch.setattr(smolseek.numerics.loss, "_BLOCK_LOGITS", {"cpu": logits // 2})

    return set_


@pytest.mark.parametrize("chunk_logits", [2**25, 50 * 16, 1])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 2.5), (1.0, 0.5)])
def test_chunks_give_the_plain_loss_and_gradients(set_chunk, chunk_logits, weight, temperature):
    set_chunk(chunk_logits)
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
def test_ignored_labels_have_no_part_in_loss_or_gradient(set_chunk, chunk_logits):
    set_chunk(chunk_logits)
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(20, 6), torch.randn(50, 6)
    labels, kept = torch.randint(50, (20,)), torch.arange(20) % 3 == 0
    options = {"teacher_head_VD": teacher_head, "distill_weight": 0.5}
    masked = next_token_loss(hidden, head, labels.where(kept, IGNORED), teacher_hidden_ND=teacher_hidden, **options)
    alone = next_token_loss(hidden[kept], head, labels[kept], teacher_hidden_ND=teacher_hidden[kept], **options)
    torch.testing.assert_close(masked, alone)
    assert torch.autograd.grad(masked[0], hidden)[0][~kept].eq(0).all()


def test_a_batch_without_labels_has_loss_and_gradient_zero():
    """The head has a gradient as well: FSDP waits for the same ones from all processes."""
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss, entropy = next_token_loss(hidden, head, torch.full((4,), IGNORED))
    assert loss.item() == entropy.item() == 0 and not entropy.requires_grad
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, (hidden, head)))


def relative_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("sureness", [0.3, 4.0, 9.0])
@pytest.mark.parametrize("setting", ["autocast", "weights"])
@pytest.mark.parametrize("counts_sure", [True, False])
def test_bf16_is_as_near_to_fp64_as_the_plain_path(set_chunk, sureness, setting, counts_sure, monkeypatch):
    """Loss and gradients, from a model that is unsure of the label to one that gives it probability 0.999.

    A GPU does not count the labels that the model is sure of."""
    set_chunk(300 * 16)
    monkeypatch.setattr(smolseek.numerics.loss, "_COUNTS_SURE", {"cpu"} if counts_sure else set())
    torch.manual_seed(0)
    dtype = torch.float32 if setting == "autocast" else torch.bfloat16
    head = (torch.randn(300, 64) / 8).to(dtype).requires_grad_()
    labels = torch.randint(300, (64,))
    hidden = (torch.randn(64, 64) + sureness * head.detach()[labels].float()).to(dtype).requires_grad_()
    exact = F.cross_entropy(hidden.double() @ head.double().T, labels)
    wanted = torch.autograd.grad(exact, (hidden, head))
    wanted = [gradient.double() for gradient in wanted]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
        plain = F.cross_entropy(F.linear(hidden, head).float(), labels)
        ours, entropy = next_token_loss(hidden, head, labels)
    assert ours.item() == entropy.item() == pytest.approx(exact.item(), rel=5e-3)
    gots, plains = (torch.autograd.grad(loss, (hidden, head)) for loss in (ours, plain))
    for got, plain_got, true in zip(gots, plains, wanted, strict=True):
        assert got.dtype == dtype and relative_error(got, true) < 1.5 * relative_error(plain_got, true)


def test_a_share_of_the_loss_scales_its_gradients():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (9,))
    whole = torch.autograd.grad(next_token_loss(hidden, head, labels)[0], (hidden, head))
    share = torch.autograd.grad(next_token_loss(hidden, head, labels)[0] * 0.25, (hidden, head))
    torch.testing.assert_close([4 * gradient for gradient in share], list(whole))


def test_a_head_that_does_not_learn_gets_no_gradient():
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8)
    next_token_loss(hidden, head, torch.randint(50, (9,)))[0].backward()
    assert hidden.grad is not None and head.grad is None
    with torch.no_grad():
        assert not next_token_loss(hidden, head, torch.randint(50, (9,)))[0].requires_grad


def test_divergence_is_the_kl_alone(set_chunk):
    set_chunk(50 * 4)
    torch.manual_seed(0)
    hidden, head = torch.randn(37, 8, requires_grad=True), torch.randn(50, 8)
    teacher_hidden, teacher_head = torch.randn(37, 6), torch.randn(50, 6)
    got = divergence(hidden, head, teacher_hidden, teacher_head)
    target = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    plain = F.kl_div((hidden @ head.T).log_softmax(-1), target, reduction="batchmean", log_target=True)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (got, plain)))


def test_no_more_than_a_chunk_of_the_teachers_logits_is_held(monkeypatch, set_chunk):
    set_chunk(50 * 4)
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
