"""Auxiliary-loss-free load balancing in transformers' Trainer, or TRL's, in place of ours.

Shapes: E n_routed_experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from smolseek.model.balance import BalanceRule, max_violation, next_bias


class BalanceCallback(TrainerCallback):
    """Updates `e_score_correction_bias` of a stock `DeepseekV3ForCausalLM` after every optimizer step, which
    transformers itself never does, and adds `maxvio` (worst layer, last global batch) to the Trainer's log history.

    `Trainer(..., callbacks=[BalanceCallback()])` is all that is needed. It works with any model whose routers have that
    buffer and return the chosen experts last. Micro-batches and processes add up; evaluation and recomputed activations
    do not count. Padding tokens are routed and counted too, so pack the windows, or keep padding rare.

    Args:
        update_speed: u of `balance.next_bias`.
        rule: the rule of `balance.next_bias`.
        freeze_share: share of the steps, the last ones, in which the biases stay as they are.

    Raises:
        ValueError: when training starts, for a model without such routers.
    """

    def __init__(
        self,
        update_speed: float = 1e-3,
        *,
        rule: BalanceRule = "sign",
        freeze_share: float = 0.0,
    ) -> None:
        self.update_speed, self.rule, self.freeze_share = update_speed, rule, freeze_share
        self.maxvio: dict[str, float] = {}
        """MaxVio of each router in the last global batch, by the router's name."""
        self._routers: dict[str, Any] = {}
        self._counts: dict[nn.Module, Tensor] = {}
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._close()
        self._routers = {name: m for name, m in model.named_modules() if "e_score_correction_bias" in m._buffers}
        if not self._routers:
            raise ValueError(
                f"BalanceCallback: {type(model).__name__} has no router with e_score_correction_bias; train a "
                "DeepSeek-V3 model with expert layers, or leave the callback out"
            )
        for router in self._routers.values():
            # In half precision a step of 1e-3 would round to nothing; the scores are fp32 anyway.
            router.e_score_correction_bias = router.e_score_correction_bias.float()
            self._handles.append(router.register_forward_hook(self._count))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        frozen = state.global_step > state.max_steps * (1 - self.freeze_share)
        for name, router in self._routers.items():
            counts_E = self._counts.pop(router, None)
            if counts_E is None:
                continue  # a router that did not run: PEFT's modules_to_save keeps the original beside its copy
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts_E)
            self.maxvio[name] = max_violation(counts_E)
            if not frozen:
                bias_E = router.e_score_correction_bias
                bias_E.copy_(next_bias(bias_E, counts_E, self.update_speed, self.rule))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.maxvio and logs is not None and "loss" in logs:
            # The history has its own copy of the logged values.
            for entry in (logs, state.log_history[-1]):
                entry["maxvio"] = round(max(self.maxvio.values()), 4)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    @torch.no_grad()
    def _count(self, router: Any, inputs: Any, output: Any) -> None:
        """Adds up the tokens that each expert received in a training forward."""
        if not router.training or _is_recomputing():
            return
        counts_E = torch.bincount(output[-1].flatten(), minlength=len(router.e_score_correction_bias))
        self._counts[router] = self._counts.get(router, 0) + counts_E

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts, self.maxvio = [], {}, {}


def _is_recomputing() -> bool:
    """Returns whether this forward runs inside a backward pass, as the second one of gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1
