import pytest
import torch

from smolseek.model import StockModel
from tests.factories import random_ids, tiny_llama


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_cached_step_gives_the_same_logits_and_no_warning() -> None:
    model = StockModel(tiny_llama()).eval()
    ids = random_ids(2, 9)
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([5, 4], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)
