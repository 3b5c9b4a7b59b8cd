"""LOFT layers in a network of plain PyTorch, without PEFT: supports from gradients, training,
merging.

    python examples/plain_pytorch.py           a second on a CPU

A small network is trained first, then its inputs change: they are turned inside a small subspace.
The frozen network with one LOFT layer learns the new inputs from 120 trained numbers. Data and
weights are made here. Needs `pip install torch`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loft_rs import select_support
from loft_rs.nn import LoftLinear

WIDTH, CLASSES, RANK = 64, 8, 16


def train(network: nn.Module, x: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam([each for each in network.parameters() if each.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((network(x).argmax(-1) == labels).float().mean())


def turned(x: Tensor, centres: Tensor) -> Tensor:
    """The inputs, turned by two radians in each of four planes that hold the centres."""
    basis = torch.linalg.qr(centres.T)[0]
    a = torch.zeros(CLASSES, CLASSES)
    a[range(0, CLASSES, 2), range(1, CLASSES, 2)] = 2.0
    turn = torch.linalg.matrix_exp(a - a.T)
    return x + (x @ basis) @ (turn - torch.eye(CLASSES)) @ basis.T


def main() -> None:
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH)
    labels = torch.randint(CLASSES, (2000,))
    x = centres[labels] + 2 * torch.randn(2000, WIDTH)
    network = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    train(network, x, labels, 100, 1e-3)
    new = turned(x, centres)
    print(
        f"accuracy on its own inputs {accuracy(network, x, labels):.3f}, on new ones {accuracy(network, new, labels):.3f}"
    )

    nn.functional.cross_entropy(network(new), labels).backward()
    first: nn.Linear = network[0]
    support = select_support(first.weight.grad, RANK, weights=first.weight, method="skewgrad")
    print(support)
    network.requires_grad_(False)
    network[0] = LoftLinear(first, support)
    print(f"trained numbers: {sum(each.numel() for each in network.parameters() if each.requires_grad)} of 9,352")

    train(network, new, labels, 100, 0.01)
    before = network(new)
    network[0] = network[0].merge()
    print(f"accuracy on the new inputs {accuracy(network, new, labels):.3f}")
    print(f"merged, its outputs differ by {(network(new) - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
