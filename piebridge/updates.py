"""The update of the alignment's weights after each step: AdamW, or Muon for what is a matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

WEIGHT_DECAY = 0.01
MUON_STREAMS = 8  # an update by Muon is some twenty small kernels after each other: that of many matrices side by side


class Update:
    """One step of the optimizer on fixed tensors, with a learning rate that lies on the device.

    So a CUDA graph can record it. Muon (Jordan et al. 2024) makes the mean gradient of each matrix orthogonal; here a
    convolution is a matrix with a row an output. Its steps are scaled to the size of AdamW's (Liu et al. 2025), so that
    one learning rate serves both. Muon of torch takes its learning rate as a Python number, which a graph would record
    for ever: it is given 1, and the weights then go the wanted share of its way. That is the same, since all of its
    step is proportional to its learning rate.

    Args:
        weights: parameters with gradients in place, those of convolutions in channels-last order.
        optimizer: "adamw" for all, or "muon" for dense convolutions and linear layers and AdamW for the rest.
    """

    def __init__(self, weights: Sequence[nn.Parameter], optimizer: str) -> None:
        device = weights[0].device
        found = [_as_matrix(weight) if optimizer == "muon" else None for weight in weights]
        others = [weight for weight, matrix in zip(weights, found) if matrix is None]
        self.matrices = [matrix for matrix in found if matrix is not None]
        self.learning_rate = torch.zeros((), device=device)
        self.before = [torch.zeros_like(matrix) for matrix in self.matrices]
        self.streams = [torch.cuda.Stream() if device.type == "cuda" else None for _ in range(MUON_STREAMS)]
        self.muons = [
            torch.optim.Muon(part, lr=1.0, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
            for part in (self.matrices[first::MUON_STREAMS] for first in range(MUON_STREAMS)) if part
        ]
        self.adamw = torch.optim.AdamW(
            others, lr=self.learning_rate, weight_decay=WEIGHT_DECAY, fused=True, capturable=device.type == "cuda"
        ) if others else None
        self()  # gradients and learning rate are zero: it only makes the moments, for the checkpoint
        for state in self.adamw.state.values() if self.adamw else ():
            state["step"].zero_()

    def __call__(self) -> None:
        """Change the weights by their gradients."""
        if self.adamw:
            self.adamw.step()
        if not self.muons:
            return
        current = torch.cuda.current_stream() if self.streams[0] is not None else None
        with torch.no_grad():  # a graph of the weights, kept alive by the copies, could not be recorded (CUDA graphs)
            torch._foreach_copy_(self.before, self.matrices)
        for muon, stream in zip(self.muons, self.streams):
            if stream is not None:
                stream.wait_stream(current)
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                muon.step()
        for stream in self.streams[: len(self.muons)] if current is not None else ():
            current.wait_stream(stream)
        with torch.no_grad():
            torch._foreach_sub_(self.matrices, self.before)
            torch._foreach_mul_(self.matrices, self.learning_rate)
            torch._foreach_add_(self.matrices, self.before)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, shared, not copied."""
        optimizers = [*self.muons, *([self.adamw] if self.adamw else [])]
        return {f"optimizer.{place}.{index}.{key}": value for place, optimizer in enumerate(optimizers)
                for index, state in enumerate(optimizer.state.values()) for key, value in state.items()}


def _as_matrix(weight: nn.Parameter) -> Optional[nn.Parameter]:
    """The same memory, and that of its gradient, as a matrix with a row an output; None where it is not one.

    A row of a depthwise convolution is a single filter, which has no directions to make orthogonal.
    """
    if weight.dim() == 2:
        return weight
    if weight.dim() != 4 or weight.shape[1] == 1:
        return None
    matrix = nn.Parameter(weight.data.movedim(1, -1).view(len(weight), -1))  # channels-last: a view, or an error
    matrix.grad = weight.grad.movedim(1, -1).view(len(weight), -1)
    return matrix
