"""What a training step minimises: the loss of marked windows, with or without a teacher.

Shapes: B windows, T tokens in each, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolseek.config import TrainSettings
from smolseek.data.encoding import read_marks
from smolseek.model import DeepseekV3, StockModel
from smolseek.numerics.loss import IGNORED, next_token_loss
from smolseek.numerics.memory import sent


def window_loss(
    model: DeepseekV3 | StockModel,
    windows_BT: Tensor,
    settings: TrainSettings,
    *,
    teacher: StockModel | None = None,
    distill_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of windows with marks (see `data.encoding.read_marks`), and its cross-entropy alone.

    Both are means over the tokens marked to be learnt, in nats. At `distill_weight` 0 the teacher does not run. Windows
    on the CPU are best, wherever the model is: their labels are counted, which then waits for no other device.
    """
    ids_BT, learnt_BT, segments_BT = read_marks(windows_BT)
    labels_BT, device = ids_BT[:, 1:].where(learnt_BT[:, 1:], IGNORED), model.lm_head.weight.device
    inputs_BT = sent(ids_BT[:, :-1], device)
    segment_ids = sent(segments_BT[:, :-1], device) if settings.mask_documents else None
    teacher_hidden_ND = teacher_head_VD = None
    if teacher is not None and distill_weight:
        with torch.no_grad():
            teacher_hidden_ND = teacher.hidden_states(inputs_BT, segment_ids=segment_ids).flatten(0, 1)
        teacher_head_VD = teacher.lm_head.weight
    hidden_BTD = model.hidden_states(inputs_BT, segment_ids=segment_ids)
    return next_token_loss(
        hidden_BTD.flatten(0, 1),
        model.lm_head.weight,
        labels_BT.flatten(),
        teacher_hidden_ND=teacher_hidden_ND,
        teacher_head_VD=teacher_head_VD,
        distill_weight=distill_weight,
        temperature=settings.distill_temperature,
    )


def count_labels(windows_BT: Tensor) -> int:
    """Returns the number of tokens whose prediction `window_loss` scores."""
    return int(read_marks(windows_BT)[1][:, 1:].sum())
