"""How a dense MLP is divided: upcycled and carved sizes, and refusals that name what would fit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolseek.config import ConvertSettings
from smolseek.conversion.expert_sizes import mlp_fields, padded_width
from smolseek.conversion.target import target_config
from smolseek.formats.dense import read_source
from tests.configs import TINY


@pytest.mark.parametrize(
    ("neurons", "expected"),
    [(96, (4, 16, 4, 16, 4, 4.0)), (172, (2, 8, 2, 48, 4, 2.0))],
)
def test_upcycle_defaults(neurons: int, expected: tuple[float, ...]) -> None:
    config = mlp_fields(neurons, 2, ConvertSettings(experts="upcycle"))
    fields = (
        "n_shared_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_group",
        "routed_scaling_factor",
    )
    assert tuple(config[name] for name in fields) == expected
    assert (config["topk_group"], config["first_k_dense_replace"]) == (1, 0)


@given(
    shared=st.none() | st.integers(0, 6),
    chosen=st.none() | st.integers(1, 6),
    copies=st.none() | st.integers(1, 3),
    width=st.none() | st.integers(1, 100),
)
def test_upcycled_experts_meet_the_dense_neurons_or_are_refused(
    shared: int | None, chosen: int | None, copies: int | None, width: int | None
) -> None:
    settings = ConvertSettings(
        experts="upcycle",
        n_shared_experts=shared,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        n_routed_experts=None if copies is None or chosen is None else copies * chosen,
    )
    try:
        config = mlp_fields(96, 2, settings)
    except ValueError as error:
        assert "\n" not in str(error)
        sizes = (shared, chosen, width)
        assert any(size is not None for size in sizes), "the defaults always fit 96 neurons"
        if None not in sizes:
            assert chosen < 2 or (shared + chosen) * width != 96  # type: ignore[operator]
        return
    per_token = config["num_experts_per_tok"]
    assert 96 % (config["n_shared_experts"] + per_token) == 0
    assert config["moe_intermediate_size"] == padded_width(96 // (config["n_shared_experts"] + per_token))
    assert config["n_routed_experts"] == config["n_group"] * per_token and per_token >= 2
    for name, value in (
        ("n_shared_experts", shared),
        ("num_experts_per_tok", chosen),
        ("moe_intermediate_size", width and padded_width(width)),
    ):
        assert value is None or config[name] == value


@pytest.mark.parametrize(
    ("neurons", "fields", "expected"),
    [
        (1536, {}, (8, 24, 16, 48)),
        (1536, {"active": 0.5}, (8, 24, 8, 48)),
        (768, {"active": 0.375}, (8, 24, 4, 24)),
        (172, {}, (6, 16, 10, 8)),
        (768, {"n_routed_experts": 12}, (4, 12, 8, 48)),
        (768, {"n_shared_experts": 0}, (0, 32, 24, 24)),
        (768, {"moe_intermediate_size": 24, "num_experts_per_tok": 5}, (8, 24, 5, 24)),
        (96, {"n_shared_experts": 1, "n_routed_experts": 5}, (1, 5, 3, 16)),
    ],
)
def test_carved_sizes(neurons: int, fields: dict[str, Any], expected: tuple[int, ...]) -> None:
    source = read_source({**TINY, "intermediate_size": neurons})
    config = target_config(source, ConvertSettings(experts="carve", **fields))
    names = ("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    assert tuple(config[name] for name in names) == expected
    assert (config["n_group"], config["topk_group"], config["norm_topk_prob"]) == (1, 1, True)
    assert config["routed_scaling_factor"] == expected[2]


@given(
    neurons=st.integers(16, 3000),
    shared=st.none() | st.integers(0, 8),
    routed=st.none() | st.integers(0, 40),
    chosen=st.none() | st.integers(0, 20),
    width=st.none() | st.integers(1, 100),
    active=st.none() | st.floats(-0.1, 1.1),
)
def test_carved_experts_are_the_dense_neurons_or_are_refused(
    neurons: int, shared: int | None, routed: int | None, chosen: int | None, width: int | None, active: float | None
) -> None:
    settings = ConvertSettings(
        experts="carve",
        active=active,
        n_shared_experts=shared,
        n_routed_experts=routed,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
    )
    try:
        config = mlp_fields(neurons, 2, settings)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    shared, routed = config["n_shared_experts"], config["n_routed_experts"]
    assert 1 <= config["num_experts_per_tok"] <= routed >= 2
    assert config["moe_intermediate_size"] % 8 == 0
    assert (shared + routed) * config["moe_intermediate_size"] >= neurons
    if active is not None:
        met = (shared + config["num_experts_per_tok"]) / (shared + routed)
        assert abs(met - active) <= 0.5 / (shared + routed) + 1e-9


@pytest.mark.parametrize("experts", ["upcycle", "carve"])
def test_first_layers_stay_dense(experts: Any) -> None:
    config = mlp_fields(96, 2, ConvertSettings(experts=experts, first_k_dense_replace=1))
    assert config["first_k_dense_replace"] == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"first_k_dense_replace": 1}, "first_k_dense_replace 1.*upcycle"),
    ({"experts": "carve", "first_k_dense_replace": 2}, "first_k_dense_replace 2.*0 to 1"),
    ({"experts": "upcycle", "first_k_dense_replace": -1}, "first_k_dense_replace -1"),
    ({"active": 0.5}, "active 0.5.*carve"),
    ({"experts": "carve", "active": 0.1}, "active 0.1.*use 0."),
    ({"experts": "carve", "active": 2.0}, "active 2.0"),
    ({"experts": "carve", "active": 0.5, "num_experts_per_tok": 2}, "num_experts_per_tok"),
    ({"experts": "carve", "num_experts_per_tok": 13}, "num_experts_per_tok 13.*1 to 9"),
    ({"experts": "carve", "n_shared_experts": 1, "n_routed_experts": 4, "moe_intermediate_size": 9}, "be 11"),
    ({"experts": "carve", "moe_intermediate_size": 49}, "use 1 to 48"),
    ({"n_routed_experts": 4}, "n_routed_experts 4.*upcycle"),
    ({"experts": "upcycle", "moe_intermediate_size": 7}, "moe_intermediate_size 7.*1, 2, 3, 4, 6"),
    ({"experts": "upcycle", "n_routed_experts": 6}, "n_routed_experts 6.*4"),
    ({"experts": "upcycle", "num_experts_per_tok": 1}, "num_experts_per_tok 1: .*; use 2 to"),
    ({"experts": "upcycle", "num_experts_per_tok": 99}, "num_experts_per_tok 99: .*; use 2 to"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace -1: .*0 to 1"),
    ({"experts": "upcycle", "n_routed_experts": 4 * 10**9}, "up to 4,096"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_experts_that_do_not_fit_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        mlp_fields(96, 2, ConvertSettings(**fields))
    assert "\n" not in str(refusal.value)


def test_neurons_without_a_divisor_name_those_there_are() -> None:
    with pytest.raises(ValueError, match="intermediate_size 86; use one of 1, 2, 43"):
        mlp_fields(86, 2, ConvertSettings(experts="upcycle"))
