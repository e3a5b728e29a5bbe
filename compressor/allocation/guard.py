"""Try a plan: compress for real on a part of the calibration, keep nothing, and measure how far the
predictions moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from compressor.allocation.choice import Choice
from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.head import divergence, head
from compressor.calibration.hidden_states import advance
from compressor.engine.blocks import compress_blocks
from compressor.engine.plan import Plan, Prepared
from compressor.errors import NumericalError
from compressor.progress import Progress, silent

TOKENS = (
    16_384  # of the calibration that a trial compresses and measures with, if there are so many
)


class Trial:
    """The dense model's predictions on a part of the calibration, to compare plans with.

    Args:
        plan: any plan of the model.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        prepared: what the run has ready for the blocks.
        tokens: of the part, at least.
    """

    def __init__(
        self,
        plan: Plan,
        states: States,
        device: torch.device,
        prepared: Prepared = Prepared(),  # noqa: B008  # frozen
        tokens: int = TOKENS,
    ) -> None:
        self.states = states.at_least(tokens)
        self.device, self.prepared = device, prepared
        self.exact = self.states.entering()
        self.tokens = sum(ids.numel() for ids in self.states.ids)
        for index, arguments in enumerate(self.states.arguments):
            block = plan.skeleton.load_block(index, device)
            advance(self.exact, capture.through(block, arguments))
            plan.skeleton.free_block(index)

    def divergence(self, plan: Plan, progress: Progress = silent) -> float:
        """Mean KL(dense ‖ compressed) over the tokens, in nats; plans are compared without matched
        targets.

        Raises:
            NumericalError: it is not finite.
        """
        states = self.states.first(len(self.states.hidden))
        plan = replace(plan, strengths=())
        for row in compress_blocks(
            plan, states, self.device, lambda *_: None, silent, prepared=self.prepared
        ):
            progress("trial", row.index + 1, len(plan.tasks))
        with head(plan.skeleton, states, self.device) as logits:
            nats = divergence(logits, self.exact, states.hidden)
        if not math.isfinite(nats):
            raise NumericalError(
                "the predictions of the model are not finite on the calibration: try "
                "`dtype='bfloat16'` or `dtype='float32'`"
            )
        return nats


def better(
    trial: Trial, plans: Mapping[str, Plan], measured: Mapping[str, Any], progress: Progress
) -> Choice:
    """The last of two plans if its divergence on the calibration is lower than that of the first,
    else the first.

    Args:
        trial: measures the divergences.
        plans: two, by the names they have in the report.
        measured: added to both divergences in what the choice was `measured` by.
        progress: told after each block.
    """
    (plain, first), (name, second) = plans.items()
    divergences = {key: trial.divergence(plan, progress) for key, plan in plans.items()}
    taken = name if divergences[name] < divergences[plain] else plain
    comparison = {"divergence": divergences, "tokens": trial.tokens, "taken": taken}
    return Choice(second if taken == name else first, {**measured, **comparison})
