"""lm-eval's own way is the oracle: the same log-likelihoods, whether contexts are shared or not."""

import random

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs pip install 'smolseek[eval]'")

from lm_eval.models.huggingface import HFLM

from smolseek.checkpoint.hub import load_stock, save
from smolseek.evaluation import shared_contexts
from smolseek.evaluation.shared_contexts import SharedContexts
from smolseek.model import StockModel
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer


@pytest.fixture(params=["llama", "v3"])
def folder(request, tmp_path):
    model = StockModel(tiny_llama(vocab_size=ENTRIES)) if request.param == "llama" else tiny_v3(vocab_size=ENTRIES)
    return save(model, tmp_path / request.param, tokenizer_from=tiny_tokenizer())


def drawn_requests(longest: int) -> list[tuple[None, list[int], list[int]]]:
    """Returns requests of which some have the same context; the last one is longer than the model's window."""
    draw = random.Random(0)
    tokens = lambda count: [draw.randrange(ENTRIES) for _ in range(count)]  # noqa: E731
    contexts = [tokens(draw.randint(1, 12)) for _ in range(5)]
    requests = [(None, draw.choice(contexts), tokens(draw.randint(1, 6))) for _ in range(17)]
    return [*requests, (None, tokens(longest), tokens(3))]


def test_log_likelihoods_are_lm_evals(folder, monkeypatch):
    stock = load_stock(folder)
    plain, shared = (
        kind(pretrained=stock.model, tokenizer=tiny_tokenizer(), batch_size=4) for kind in (HFLM, SharedContexts)
    )
    requests = drawn_requests(plain.max_length)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    monkeypatch.setattr(shared_contexts, "_BATCH_TOKENS", 60)
    monkeypatch.setattr(shared_contexts, "_POSITIONS_AT_ONCE", 7)
    found = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    torch.testing.assert_close([score for score, _ in found], [score for score, _ in expected], rtol=1e-4, atol=1e-4)
    assert [best for _, best in found] == [best for _, best in expected]


def test_a_context_runs_once(folder):
    stock = load_stock(folder)
    model = SharedContexts(pretrained=stock.model, tokenizer=tiny_tokenizer(), batch_size=4)
    seen = []
    handle = stock.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model._loglikelihood_tokens([(None, [1, 2, 3, 4], [5, 6]), (None, [1, 2, 3, 4], [7]), (None, [1, 2, 3, 4], [6, 5])])
    handle.remove()
    assert seen == [6]
