"""Muon: AdamW for vectors, orthogonalized momentum for matrices and convolutions.

Jordan 2024 (Muon), with the scale of Liu J. 2025 (Muon is Scalable for LLM Training, arXiv 2502.16982), so that one
learning rate serves both kinds of parameter. torch.optim.Muon takes matrices alone and cannot share a step with AdamW,
which Lightning's automatic optimization needs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; singular values end in about 0.7 to 1.2, not at 1


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate U V^T of M = U S V^T by Newton-Schulz iterations. m x n -> m x n; zero rows and columns stay zero."""
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.AdamW):
    """The optimizer; ``lr``, ``weight_decay`` as in AdamW. A convolution is the matrix out x (in * height * width)."""

    def __init__(self, params: ParamsT, lr: float = 2e-3, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim >= 2 and p.grad is not None:
                    self.update(p, group)
                    p.grad = None  # so that the step of AdamW below skips it
        super().step()
        return loss

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """Update a matrix or convolution by its orthogonalized momentum."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW reads it in every loaded state
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        state["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
        update = orthogonalize(p.grad.lerp(state["momentum_buffer"], self.momentum).flatten(1))
        scale = 0.2 * max(update.shape) ** 0.5  # the root mean square of an AdamW step
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view(p.shape), alpha=-group["lr"] * scale)
