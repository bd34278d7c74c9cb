"""Loss-less load balancing (DeepSeek-V3, section 2.1.2; Wang et al. 2024, arXiv:2408.15664), outside autograd.

Shapes: E routed experts, C copies that could be one another's, P the numbers in one of them, V vocabulary.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smolseek.config import TrainSettings
from smolseek.model.experts import MixtureOfExperts, TopkRouter
from smolseek.model.transformer import DecoderLayer

BalanceRule = Literal["sign", "proportional", "quantile"]
UPDATE_SPEEDS = {"sign": 1e-3, "proportional": 1e-3, "quantile": 0.1}
"""u where a recipe names none."""
LAST_SIGN_SPEED = 0.2
"""Share of u that the sign rule ends at."""


def _blocks(model: nn.Module) -> dict[int, MixtureOfExperts]:
    layers = (module for module in model.modules() if isinstance(module, DecoderLayer))
    return {layer.layer_index: layer.mlp for layer in layers if isinstance(layer.mlp, MixtureOfExperts)}


def _routers(model: nn.Module) -> dict[int, TopkRouter]:
    return {layer: block.gate for layer, block in _blocks(model).items()}


def take_expert_counts(model: nn.Module) -> list[tuple[int, Tensor]]:
    """(layer index, tokens each expert received (E,), int64) of every forward since the last call, and starts afresh;
    empty for a model without routers."""
    counts = [(index, router.expert_counts.clone()) for index, router in _routers(model).items()]
    for router in _routers(model).values():
        router.expert_counts.zero_()
    return counts


def quantile_sums(model: nn.Module) -> list[Tensor]:
    """What the routers have gathered for the quantile rule since the last update, for processes to add up."""
    return [router.quantile_sums for router in _routers(model).values() if router.gathers_quantiles]


def set_balance(model: nn.Module, settings: TrainSettings) -> None:
    """Make the model's routers gather what `settings.balance_rule` and `.balance_loss_weight` need while they train.

    The loss is taken in every micro-batch, weighed so that the global batch has its mean.

    Raises:
        ValueError: a share, speed or weight out of range, or the quantile rule for routing that takes some experts of
            some groups.
    """
    _check(settings)
    for router in _routers(model).values():
        router.gathers_quantiles = settings.balance_rule == "quantile"
        router.quantile_sums.zero_()  # not in checkpoints: a loaded model has whatever stood in memory
        if router.gathers_quantiles and router.topk_group < router.n_group and not router.chooses_whole_groups:
            raise ValueError(
                "train.balance_rule quantile: knows routing without groups (n_group 1) or to whole groups, and this "
                "model takes some experts of some groups; use sign"
            )
        router.loss_weight = settings.balance_loss_weight / settings.gradient_accumulation
        router.loss_over_batch = settings.balance_loss == "batch"


def _check(settings: TrainSettings) -> None:
    if not 0 <= settings.balance_freeze_share <= 1:
        raise ValueError(f"train.balance_freeze_share {settings.balance_freeze_share}: must be between 0 and 1")
    for name in ("balance_update_speed", "balance_loss_weight"):
        if (getattr(settings, name) or 0) < 0:
            raise ValueError(f"train.{name} {getattr(settings, name)}: must not be negative; 0 switches it off")


def balance_speed(step: int, settings: TrainSettings, decay: float) -> float:
    """u at a step: 0 in the last `balance_freeze_share` of the run (DeepSeek-V3, section 4.2, for its last 3%).

    The sign rule's steps do not shrink near balance by themselves: as the learning rate falls to `decay` of its peak
    and routers settle, u falls with it, to `LAST_SIGN_SPEED` at last (DeepSeek-V3 keeps it).
    """
    if step >= settings.steps * (1 - settings.balance_freeze_share):
        return 0.0
    given, rule = settings.balance_update_speed, settings.balance_rule
    speed = UPDATE_SPEEDS[rule] if given is None else given
    return speed * (LAST_SIGN_SPEED + (1 - LAST_SIGN_SPEED) * decay) if rule == "sign" else speed


def signed_bias(bias_E: Tensor, counts_E: Tensor, update_speed: float) -> Tensor:
    """b + u · sign(mean load - load) (DeepSeek-V3, section 2.1.2; Wang et al. 2024, algorithm 1)."""
    load_E = counts_E.to(bias_E)
    return bias_E + update_speed * torch.sign(load_E.mean() - load_E)


def proportional_bias(bias_E: Tensor, counts_E: Tensor, update_speed: float) -> Tensor:
    """b + u · (mean load - load) / mean load (Wang et al. 2024's other rule, there of absolute loads)."""
    load_E = counts_E.to(bias_E)
    return bias_E + update_speed * (1 - load_E / load_E.mean().clamp(min=1e-9))


def next_bias(bias_E: Tensor, counts_E: Tensor, update_speed: float) -> Tensor:
    moved_E = signed_bias(bias_E, counts_E, update_speed)
    return moved_E - moved_E.mean()


@torch.no_grad()
def update_biases(
    model: nn.Module, counts: Iterable[tuple[int, Tensor]], update_speed: float, rule: BalanceRule = "sign"
) -> None:
    """Move every router's bias by `rule`, then mean-centre it (only differences choose; the paper lets it drift).

    `counts` are those of `take_expert_counts`, summed over the whole global batch. The quantile rule,
    b += u · `routing.quantile_shift`, takes the mean shift over the forwards of `set_balance`'s routers since the last
    update: of a global batch in parts, the mean of the parts' quantiles. At speed 0 nothing moves.
    """
    routers = _routers(model)
    for index, counts_E in counts:
        router = routers[index]
        bias_E, sums = router.e_score_correction_bias, router.quantile_sums
        if update_speed:
            if rule == "quantile":
                moved_E = bias_E + update_speed * sums[:-1] / sums[-1].clamp(min=1)
            else:
                moved_E = {"sign": signed_bias, "proportional": proportional_bias}[rule](bias_E, counts_E, update_speed)
            bias_E.copy_(moved_E - moved_E.mean())
        sums.zero_()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio = (max load - mean load) / mean load (Wang et al. 2024, equation 4); 0 is balanced.

    Raises ValueError when no token was routed.
    """
    mean = counts_E.cpu().double().mean().item()  # MPS has no float64
    if mean == 0:
        raise ValueError("no token was routed: run the model before measuring its balance")
    return counts_E.max().item() / mean - 1


def describe_load(counts: Iterable[tuple[int, Tensor]]) -> dict[str, Any]:
    """MaxVio and every expert's share of the choices, per layer, for a line of metrics; empty without expert layers."""
    by_layer = {str(layer): counts_E for layer, counts_E in counts}
    if not by_layer:
        return {}
    shares = {layer: (counts_E / counts_E.sum()).tolist() for layer, counts_E in by_layer.items()}
    return {
        "maxvio": {layer: round(max_violation(counts_E), 4) for layer, counts_E in by_layer.items()},
        "load": {layer: [round(share, 4) for share in layer_shares] for layer, layer_shares in shares.items()},
    }


def weights_apart(copies_CP: Tensor) -> float:
    """How far the copies are from one another: the root of the mean |W_a - W_b|² over all pairs a ≠ b, over the
    root of the mean |W|². 0 for equal copies, √2 for unrelated ones."""
    copies_CP = copies_CP.float()
    spread = (copies_CP - copies_CP.mean(dim=0)).square().sum() / (len(copies_CP) - 1)  # half the mean over pairs
    return float((2 * spread / copies_CP.square().sum(dim=1).mean()).sqrt())


def routing_information(counts_VC: Tensor) -> float:
    """The share of the choice of an expert that the token's identity explains: I(token; expert) / H(expert), 0 to 1,
    from how often each token went to each.

    The mutual information is the Jensen-Shannon divergence between the experts' distributions of tokens, weighed by
    their loads; less its bias in a small sample (Miller 1955).
    """
    counts_VC = counts_VC.double()
    total = counts_VC.sum()
    entropies = [_entropy(counts / total) for counts in (counts_VC.sum(1), counts_VC.sum(0), counts_VC.flatten())]
    of_token, of_expert, of_both = entropies
    seen, used, cells = (int((counts > 0).sum()) for counts in (counts_VC.sum(1), counts_VC.sum(0), counts_VC))
    information = of_token + of_expert - of_both - (cells - seen - used + 1) / (2 * float(total))
    return min(1.0, max(0.0, information / of_expert)) if of_expert > 0 else 0.0


def _entropy(share: Tensor) -> float:
    """In nats."""
    return -float(torch.xlogy(share, share).sum())


@torch.no_grad()
def expert_weights(model: nn.Module) -> dict[int, float]:
    """`weights_apart` per expert layer: of the groups, expert by expert, where tokens take whole groups (an upcycled
    model's copies), else of all experts."""
    apart = {}
    for layer, block in _blocks(model).items():
        copies = copies_of(block.gate)
        stacks = (block.experts.gate_up_proj, block.experts.down_proj)
        apart[layer] = weights_apart(torch.cat([stack.reshape(copies, -1) for stack in stacks], dim=1))
    return apart


def copies_of(router: TopkRouter) -> int:
    """How many parts of the experts could do one another's work: groups where they are taken whole, else experts."""
    return router.n_group if router.chooses_whole_groups else router.num_experts


@contextlib.contextmanager
def recorded_choices(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """While open, collects per expert layer and forward which of `copies_of` the N tokens chose, (N, 1 or more)."""
    choices: dict[int, list[Tensor]] = {layer: [] for layer in _routers(model)}

    def keep(layer: int, router: TopkRouter) -> Any:
        size = router.num_experts // copies_of(router)
        return lambda module, inputs, output: choices[layer].append((output[1] // size).sort().values[:, ::size])

    handles = [router.register_forward_hook(keep(layer, router)) for layer, router in _routers(model).items()]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()
