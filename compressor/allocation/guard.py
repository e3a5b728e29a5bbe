"""Try a job: compress for real on a part of the calibration, keep nothing, and see how far the
predictions moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.head import divergence, head
from compressor.engine.blocks import compress_blocks
from compressor.engine.task import Job
from compressor.progress import Progress, silent

TOKENS = (
    16_384  # of the calibration that a trial compresses and measures with, if there are so many
)


class Trial:
    """The dense model's predictions on a part of the calibration, to compare jobs with.

    Args:
        job: any job of the model.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        tokens: of the part, at least.
    """

    def __init__(
        self, job: Job, states: States, device: torch.device, tokens: int = TOKENS
    ) -> None:
        self.states = states.at_least(tokens)
        self.device = device
        self.exact = list(self.states.hidden)
        self.tokens = sum(ids.numel() for ids in self.states.ids)
        for index, arguments in enumerate(self.states.arguments):
            block = job.skeleton.load_block(index, device)
            self.exact = [capture.run(block, hidden, arguments) for hidden in self.exact]
            job.skeleton.free_block(index)

    def divergence(self, job: Job, progress: Progress = silent) -> float:
        """Mean KL(dense ‖ compressed) over the tokens, in nats."""
        states = self.states.first(len(self.states.hidden))
        for row in compress_blocks(job, states, self.device, lambda *_: None, silent):
            progress("trial", row.index + 1, len(job.tasks))
        with head(job.skeleton, states, self.device) as logits:
            return divergence(logits, self.exact, states.hidden)


def better(
    trial: Trial, jobs: Mapping[str, Job], facts: Mapping[str, Any], progress: Progress
) -> Job:
    """The last of two jobs if its divergence on the calibration is lower than that of the first,
    else the first.

    Both numbers are in the `allocation` of the job that is returned.
    """
    (plain, first), (name, second) = jobs.items()
    divergences = {key: trial.divergence(job, progress) for key, job in jobs.items()}
    taken = divergences[name] < divergences[plain]
    found = {
        **facts,
        "divergence": divergences,
        "tokens": trial.tokens,
        "taken": name if taken else plain,
    }
    return replace(second if taken else first, allocation=found)
