import pytest
import torch

from tests.factories import random_ids, tiny_v3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_latents_and_one_key(dtype: torch.dtype) -> None:
    model = tiny_v3().to(dtype)
    cache = model.new_cache(2, 10)
    per_token = model.config.num_hidden_layers * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert cache.nbytes == 2 * 10 * per_token * dtype.itemsize == sum(tensor.nbytes for tensor in tensors)


def test_it_keeps_what_it_is_given_in_order() -> None:
    cache = tiny_v3().new_cache(2, 5)
    latent, key = torch.randn(2, 3, 24), torch.randn(2, 3, 8)
    cache.write(1, latent, key)
    cache.length = 3
    entries = cache.write(1, latent[:, :2] + 1, key[:, :2] + 1)
    torch.testing.assert_close(entries[:, :3], torch.cat([latent, key], dim=-1))
    torch.testing.assert_close(entries[:, 3:], torch.cat([latent, key], dim=-1)[:, :2] + 1)
    assert (cache.entries_LBSW[0] == 0).all()


def test_length_follows_the_tokens_and_capacity_is_a_limit() -> None:
    model = tiny_v3()
    cache = model.new_cache(1, 6)
    with torch.no_grad():
        model(random_ids(1, 4), cache=cache)
        assert cache.length == 4
        with pytest.raises(ValueError, match=r"4 tokens held \+ 3 new exceed the cache's capacity of 6"):
            model(random_ids(1, 3), cache=cache)
        model(random_ids(1, 2), cache=cache)
    assert cache.length == 6
