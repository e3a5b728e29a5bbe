"""Perplexity of a model, and its divergence from a baseline, over token windows in one pass.

    perplexity = exp( mean over tokens of -log q(x_t | x_<t) )
    divergence = mean over the same tokens of KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v)),    q the
    model, p the baseline

Windows do not overlap; each is scored on its own, its first token is context only. It is not
lm-eval's word perplexity, which normalises by words and carries context over. The divergence needs
no reference text: it says how far the model's next-token distribution has moved, in nats, and sees
changes that leave the perplexity as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

METRIC, DIVERGENCE = "token_perplexity,none", "kl_divergence,none"
_BATCH_TOKENS = 4096  # tokens in one forward pass: bounds the logits
_CHUNK = 512  # tokens whose logits are in float32 at once
_SAVE_SECONDS = 20.0  # between two notes of how far the pass has come


@dataclass
class Sums:
    """How far a pass over the windows has come: rows done, tokens predicted, sums of their losses
    and divergences.
    """

    done: int = 0
    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0

    @classmethod
    def read(cls, value: dict[str, Any] | None) -> Self | None:
        """Sums that were saved; None where `value` is nothing of the kind."""
        if value is None or set(value) != {"done", "tokens", "loss", "divergence"}:
            return None
        whole = type(value["done"]) is type(value["tokens"]) is int and value["done"] >= 0
        return (
            cls(**value)
            if whole and all(isinstance(value[key], int | float) for key in ("loss", "divergence"))
            else None
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; capped where a broken model would overflow."""
        return math.exp(min(self.loss / self.tokens, 700.0))


@torch.no_grad()
def score_windows(
    model: Any,
    rows: Sequence[Tensor],
    *,
    baseline: Any = None,
    start: Sums | None = None,
    save: Callable[[dict[str, Any]], None] = lambda sums: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sums:
    """The sums over `rows`, int64 `[seq]` each.

    Args:
        baseline: model of the same vocabulary that the divergence is taken from; None leaves it 0.
        start: where an interrupted pass over the same rows had come; going on gives the same
            numbers to the last bit.
        save: told the sums every few seconds, and when the pass is interrupted.
    """
    sums, saved = start or Sums(), time.monotonic()
    try:
        while sums.done < len(rows):
            batch = _same_length(rows, sums.done)
            sums = _plus(sums, model, baseline, torch.stack(batch))
            progress(sums.done, len(rows))
            if time.monotonic() - saved > _SAVE_SECONDS:
                save(asdict(sums))
                saved = time.monotonic()
    except BaseException:  # Ctrl-C among them
        save(asdict(sums))
        raise
    return sums


def perplexity(
    model: Any,
    rows: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """exp of the mean token cross-entropy over `rows`, int64 `[seq]` each; logits are taken in
    float32.
    """
    return score_windows(model, rows, progress=progress).perplexity


def _same_length(rows: Sequence[Tensor], start: int) -> list[Tensor]:
    """As many rows from `start` as one forward pass takes, all of one length."""
    length = len(rows[start])
    batch = []
    for row in rows[start : start + max(1, _BATCH_TOKENS // length)]:
        if len(row) != length:
            break
        batch.append(row)
    return batch


def _plus(sums: Sums, model: Any, baseline: Any, ids: Tensor) -> Sums:
    """`sums` and what `ids` `[rows, seq]` add to them."""
    logits = _logits(model, ids)
    exact = _logits(baseline, ids) if baseline is not None else logits
    targets = ids[:, 1:].flatten().to(logits.device)
    loss = divergence = 0.0
    for first in range(0, len(targets), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        own = logits[chunk].float()
        loss += cross_entropy(own, targets[chunk], reduction="sum").item()
        if baseline is not None:
            log_p = log_softmax(exact[chunk].to(own.device).float(), -1)
            divergence += (
                (log_p.exp() * (log_p - log_softmax(own, -1))).sum(dtype=torch.float64).item()
            )
    return Sums(
        sums.done + len(ids),
        sums.tokens + len(targets),
        sums.loss + loss,
        sums.divergence + divergence,
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    """`[rows * (seq - 1), vocabulary]`: the prediction of every token but the first of each row."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].flatten(0, 1)
