"""What follows the blocks: final norm and language head, and how far two models' next-token
distributions are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compressor.calibration.capture import States, forwards
from compressor.calibration.hidden_states import Batch
from compressor.model.skeleton import Skeleton

Head = Callable[[int, Tensor], Tensor]


@contextmanager
def head(skeleton: Skeleton, states: States, device: torch.device) -> Iterator[Head]:
    """Inside the `with`, `logits(number, hidden)` of batch `number`: `[batch, seq, dim]` ->
    `[batch, seq, vocab]`.

    `hidden` is what leaves the last block. The model's own forward runs, its blocks passing
    `hidden` through, so that whatever a family does after them is done; the result is
    differentiable in `hidden`.
    """
    model = skeleton.load_embeddings(device, head=True)

    def logits(number: int, hidden: Tensor) -> Tensor:
        assert states.returns
        answer, _ = states.returns.passing(hidden)
        with forwards(skeleton, lambda _: lambda *_, **__: answer):
            return model(input_ids=states.ids[number], use_cache=False).logits

    try:
        yield logits
    finally:
        skeleton.free_embeddings()


@torch.no_grad()
def divergence(logits: Head, exact: Sequence[Batch], other: Sequence[Batch]) -> float:
    """Mean over tokens of KL(p ‖ q) in nats: p from `exact`, q from `other`, batches leaving the
    last block.
    """
    total, tokens = 0.0, 0
    for number, (first, second) in enumerate(zip(exact, other, strict=True)):
        p, q = (
            log_softmax(logits(number, batch.hidden).float().flatten(0, 1), dim=-1)
            for batch in (first, second)
        )
        total += kl_div(q, p, log_target=True, reduction="sum").double().item()
        tokens += len(p)
    return total / max(tokens, 1)
