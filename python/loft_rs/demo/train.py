"""Training and measuring in the demo: in-batch contrastive loss, one loop for every method,
recall@1 and MRR.

loss = cross entropy over s q_i . p_j with target j = i: the other passages of the batch are the
negatives. Batches are drawn from neighbours in length, so a step pays for little padding. Adam with
linear warm-up and decay; the same batches for every method.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .encoder import TokenPairs, embed

Tick = Callable[[], None]  # called often while something takes long

SCALE = 20.0
BATCH = 64
WARM_UP = 0.1


class Scores(NamedTuple):
    """Retrieval of each query's own passage among all of them."""

    recall_at_1: float
    mrr: float


def batch_plan(pairs: TokenPairs, steps: int, seed: int, size: int = BATCH) -> list[list[int]]:
    """`steps` batches of near-equal passage length; every pair once before any pair twice."""
    chance = random.Random(seed)
    size = min(size, len(pairs))
    plan: list[list[int]] = []
    while len(plan) < steps:
        order = list(range(len(pairs)))
        chance.shuffle(order)
        order.sort(key=lambda index: int(pairs.passages.lengths[index]))  # stable: ties stay shuffled
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        chance.shuffle(batches)
        plan += batches
    return plan[:steps]


def contrastive_loss(model: nn.Module, pairs: TokenPairs, batch: Sequence[int]) -> Tensor:
    """Cross entropy of each query against the batch's passages."""
    queries = embed(model, *pairs.queries.batch(batch))
    passages = embed(model, *pairs.passages.batch(batch))
    return cross_entropy(SCALE * queries @ passages.T, torch.arange(len(batch)))


def calibration_steps(
    model: nn.Module, pairs: TokenPairs, batches: Sequence[Sequence[int]], tick: Tick
) -> tuple[Callable[[], None], Callable[[], None]]:
    """For `calibrate`, over the same batches at each call: forward alone, and forward and
    backward.
    """

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                contrastive_loss(model, pairs, batch)
                tick()

    def backward() -> None:
        for batch in batches:
            contrastive_loss(model, pairs, batch).backward()
            tick()

    return forward, backward


def pilot_step(model: nn.Module, pairs: TokenPairs, plan: Sequence[Sequence[int]], tick: Tick) -> Callable[[], None]:
    """For a pilot: forward and backward of one batch, the next of the plan at each call."""
    batches = itertools.cycle(plan)

    def step() -> None:
        contrastive_loss(model, pairs, next(batches)).backward()
        tick()

    return step


def train(
    model: nn.Module,
    pairs: TokenPairs,
    plan: Sequence[Sequence[int]],
    learning_rate: float,
    on_step: Callable[[float], None],
) -> float:
    """Adam over the planned batches; returns the seconds a step took. `on_step` gets each step's
    loss.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    warm_up = max(1, round(WARM_UP * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(plan) - step) / max(1, len(plan) - warm_up))
    )
    model.train()
    begun = time.perf_counter()
    for batch in plan:
        optimizer.zero_grad(set_to_none=True)
        loss = contrastive_loss(model, pairs, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    model.eval()
    return (time.perf_counter() - begun) / max(1, len(plan))


class Answers(NamedTuple):
    """What each held-out query finds: the best passage's index, and its own passage's rank from
    1.
    """

    best: list[int]
    ranks: Tensor

    @property
    def scores(self) -> Scores:
        return Scores((self.ranks == 1).float().mean().item(), self.ranks.reciprocal().float().mean().item())


def answer(model: nn.Module, pairs: TokenPairs, tick: Tick = lambda: None) -> Answers:
    """Rank every passage for every query. Ties count against the query."""
    queries, passages = pairs.queries.embed_all(model, tick), pairs.passages.embed_all(model, tick)
    similarity = queries @ passages.T
    if not torch.isfinite(similarity).all():
        raise ArithmeticError("the embeddings are no longer finite: training diverged")
    own = similarity.diagonal().unsqueeze(1)
    ranks = (similarity >= own).sum(1)
    return Answers(similarity.argmax(1).tolist(), ranks)
