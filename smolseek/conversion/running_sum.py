"""Streaming sums of outer products over tokens, in float64, in memory or in a file.

Shapes: N tokens, O and A the channels on the two sides.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from smolseek.numerics.precision import has_float64
from smolseek.numerics.shares import ALONE, Shares

_STRIP = 256  # rows of a sum that one product adds to


class OuterSum:
    """The sum of left rightᵀ over tokens; `end` turns it into the mean.

    It lies where the tokens are, on the CPU if their device has no float64, or in `file` where one is given: then it is
    in memory only while it is added to or read.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.tokens = file, 0
        self.shape, self.strip = (0, 0), 0
        self.held: Tensor | None = None
        if file is not None:
            file.unlink(missing_ok=True)

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Add left (..., O) times right (..., A), or times itself; a symmetric sum is kept from its diagonal on."""
        left_NO = _flat64(left)
        right_NA = left_NO if right is None else _flat64(right)
        self.strip = _STRIP if right is None else left_NO.shape[1]
        self.shape = (left_NO.shape[1], right_NA.shape[1])
        total_OA = self._total(left_NO.device)
        for start in range(0, len(total_OA), self.strip):
            part_OA = total_OA[start : start + self.strip, start:]
            rows_ON, columns_NA = left_NO[:, start : start + self.strip].T, right_NA[:, start:]
            if part_OA.device == left_NO.device:
                part_OA.addmm_(rows_ON, columns_NA)
            else:
                part_OA.add_((rows_ON @ columns_NA).to(part_OA.device))
        self.tokens += len(left_NO)

    def end(self, shares: Shares = ALONE) -> None:
        """Turn the sum, over the tokens of all processes, into the mean, in place: a second one might not fit."""
        self.shape, self.strip, kind = shares.by_leader(lambda: (self.shape, self.strip, self.read().device.type))
        total_OA, tokens = self._total(torch.device(kind)), torch.tensor(self.tokens)
        shares.sum_(total_OA)
        shares.sum_(tokens)
        total_OA.div_(int(tokens))
        for start in range(self.strip, len(total_OA), self.strip):
            total_OA[start : start + self.strip, :start] = total_OA[:start, start : start + self.strip].T

    def read(self) -> Tensor:
        """Returns what has been added so far."""
        return self._total(torch.device("cpu") if self.held is None else self.held.device)

    def _total(self, device: torch.device) -> Tensor:
        """Returns the sum to change in place; zeros at first, as a new file is."""
        if self.file is not None:  # mapped anew each time, so that no page outlives its use in this process
            size = self.shape[0] * self.shape[1]
            return torch.from_file(str(self.file), shared=True, size=size, dtype=torch.float64).view(self.shape)
        if self.held is None:
            self.held = torch.zeros(self.shape, dtype=torch.float64, device=device)
        return self.held


def _flat64(x: Tensor) -> Tensor:
    """Returns (..., A) as (N, A) in float64, on the CPU if the tensor's device has no float64."""
    x_NA = x.detach().flatten(0, -2)
    return (x_NA if has_float64(x.device) else x_NA.cpu()).double()
