"""Muon against the singular value decomposition, and against AdamW where it must be AdamW."""

import pytest
import torch

from harmony.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_orthogonalised_keeps_the_directions_and_levels_their_size(shape):
    """Guards the iteration: singular vectors stay, singular values spread over a factor of 50 come to 0.6 to 1.3."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u * torch.logspace(0, -1.7, min(shape)) @ v
    inner = u.T @ orthogonalize(matrix) @ v.T
    assert 0.6 < inner.diagonal().min() and inner.diagonal().max() < 1.3
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-4


def test_untouched_rows_stay_untouched():
    """Guards what steady norms rely on: a zero row or column of the gradient is a zero row or column of the update."""
    matrix = torch.randn(8, 12)
    matrix[:2], matrix[:, :3] = 0, 0
    update = orthogonalize(matrix)
    assert not update[:2].any() and not update[:, :3].any() and update[2:, 3:].abs().min() > 0


def test_vectors_move_as_under_adamw():
    """Guards the shared learning rate and the decay of parameters that are no matrices."""
    start, gradients = torch.randn(5), torch.randn(3, 5)
    moved = []
    for kind in (Muon, torch.optim.AdamW):
        p = torch.nn.Parameter(start.clone())
        optimiser = kind([p], lr=1e-2, weight_decay=0.1)
        for g in gradients:
            p.grad = g.clone()
            optimiser.step()
        moved.append(p.detach())
    assert torch.equal(*moved)


def test_a_convolution_is_the_matrix_of_its_patches():
    """Guards the shape rule, for both memory layouts, and the length of the step: 0.2 lr in the root mean square."""
    torch.manual_seed(0)
    gradient = torch.randn(8, 4, 3, 3)
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(torch.zeros(8, 4, 3, 3).to(memory_format=layout))
        p.grad = gradient.to(memory_format=layout)
        Muon([p], lr=0.1, weight_decay=0.0).step()
        steps.append(-p.detach())
    direction = orthogonalize(gradient.flatten(1)).view_as(gradient)
    torch.testing.assert_close(steps[0], direction * 0.1 * 0.2 * 6)
    torch.testing.assert_close(steps[0], steps[1])
    assert steps[0].square().mean().sqrt() == pytest.approx(0.02, rel=0.2)


def test_a_closure_and_a_saved_state_work():
    """Guards what Lightning asks of an optimizer: the closure makes the gradient, the state goes on elsewhere."""
    torch.manual_seed(0)
    target = torch.randn(6, 6)

    def descend(p, optimiser, steps):
        def closure():
            optimiser.zero_grad()
            loss = (p - target).square().sum()
            loss.backward()
            return loss

        return [optimiser.step(closure).item() for _ in range(steps)]

    whole = torch.nn.Parameter(torch.zeros(6, 6))
    losses = descend(whole, Muon([whole], lr=0.05), 8)
    assert losses[-1] < losses[0]
    half = torch.nn.Parameter(torch.zeros(6, 6))
    first = Muon([half], lr=0.05)
    descend(half, first, 4)
    rest = torch.nn.Parameter(half.detach().clone())
    second = Muon([rest], lr=0.05)
    second.load_state_dict(first.state_dict())
    descend(rest, second, 4)
    assert torch.equal(rest, whole)
