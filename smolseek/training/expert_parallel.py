"""Expert parallelism: the experts of a layer divided among processes (DeepSeek-V3, section 3.2).

Shapes: D hidden_size, E n_routed_experts, M rows sorted by expert, i moe_intermediate_size, J = 2 i gate and up rows
stacked, p processes that divide the experts, l experts in each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smolseek.model.balance import expert_layers
from smolseek.model.experts import Experts, swiglu_experts


def distribute_experts(model: nn.Module, mesh: Any) -> None:
    """Divide each layer's experts among the processes of the mesh's "expert" axis; FSDP2 shards along its "data" axis.

    Raises:
        ValueError: the sizes do not divide.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    parts, holders = mesh["expert"].size(), mesh["data"].size()
    for mixture in expert_layers(model).values():
        experts, out_width, in_width = mixture.experts.gate_up_proj.shape
        if experts % parts or out_width % holders or in_width % holders:
            raise ValueError(
                f"parallel.expert {parts} with {mesh.size()} processes: {experts} experts, each "
                f"{out_width} × {in_width}, must divide by {parts}, their sizes by {holders}"
            )
        mixture.experts, mixture.has_every_expert = DistributedExperts(mixture.experts, mesh["expert"]), False
        fully_shard(mixture.experts, mesh=mesh["data"], shard_placement_fn=lambda parameter: Shard(1))
        # The experts of one process see the tokens of p processes, and the loss is a mean over all processes.
        if holders > 1:  # gloo cannot scale while it sums; with one holder, FSDP would divide twice
            mixture.experts.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        mixture.experts.set_gradient_divide_factor(float(mesh.size()))  # type: ignore[operator]


class DistributedExperts(Experts):
    """The experts of a layer, l in each of p processes.

    Each row travels to the process that holds its expert, and the output travels back (all-to-all).
    """

    def __init__(self, experts: Experts, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        nn.Module.__init__(self)
        self.group, self.group_size, self.act_fn = mesh.get_group(), mesh.size(), experts.act_fn
        for name, parameter in experts.named_parameters():
            share = distribute_tensor(parameter.data, mesh, [Shard(0)])
            self.register_parameter(name, nn.Parameter(share, requires_grad=parameter.requires_grad))

    def forward(self, x_MD: Tensor, ends_E: Tensor, weights_M1: Tensor) -> Tensor:
        """Returns what `Experts.forward` returns."""
        sent_pl = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).view(self.group_size, -1)
        received_pl = self._exchange(sent_pl, [1] * self.group_size, [1] * self.group_size)
        sent, received = sent_pl.sum(1).tolist(), received_pl.sum(1).tolist()
        rows_MD, weights_M1 = (self._exchange(rows, received, sent) for rows in (x_MD, weights_M1))
        # Received rows are sorted by the process that sent them, then by expert: sort them by expert alone.
        expert_pl = torch.arange(sent_pl.shape[1], device=x_MD.device).repeat(self.group_size)
        order_M = expert_pl.repeat_interleave(received_pl.flatten()).argsort(stable=True)
        ends_l = received_pl.sum(0).cumsum(0).int()
        out_MD = self._compute(rows_MD.index_select(0, order_M), weights_M1.index_select(0, order_M), ends_l)
        return self._exchange(out_MD.index_select(0, order_M.argsort()), sent, received)

    def _compute(self, x_MD: Tensor, weights_M1: Tensor, ends_l: Tensor) -> Tensor:
        """Returns the weighted outputs of this process's experts for its rows."""
        gate_up_lJD, down_lDi = (parameter.to_local() for parameter in (self.gate_up_proj, self.down_proj))  # type: ignore[attr-defined]
        return swiglu_experts(x_MD, weights_M1, gate_up_lJD, down_lDi, ends_l, self.act_fn)

    def _exchange(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """Returns the rows that the processes send to this one: all-to-all along the first dimension, differentiable.

        `received` and `sent` have the number of rows from and to each process.
        """
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)
