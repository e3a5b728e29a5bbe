"""Checkpoint in, compressed checkpoint out. The only file that knows the order of things.

Check everything cheap, calibrate, go through the blocks and write each linear as it is finished,
write the rest, report.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from compressor.allocation.choice import Choice
from compressor.allocation.rank.choose import factored_by_gradients, share_ranks
from compressor.allocation.sparsity.choose import leave_some_dense, share_zeros
from compressor.calibration import capture, tokens
from compressor.calibration.agreement import check_agreement
from compressor.calibration.capture import States, batch_size
from compressor.calibration.hidden_states import Batch, Batches
from compressor.checkpoint.side_files import side_files
from compressor.checkpoint.work_state import is_complete, work_path
from compressor.config.recipe import Recipe
from compressor.engine.blocks import compress_blocks, unwatched
from compressor.engine.distributed import Group, local_device, processes
from compressor.engine.memory import choose_home, gram_room, parse_size
from compressor.engine.plan import LeaveDense, Plan, Prepared, ShareRanks, ShareZeros
from compressor.errors import DataError, UsageError
from compressor.progress import Progress, silent
from compressor.records.report import Report, peak_memory
from compressor.run import plan_file, room
from compressor.run.check import plan_run
from compressor.run.fingerprint import fingerprint
from compressor.run.recorder import Facts, NullRecorder, Recorder, recording
from compressor.run.witness import Witness


def prune(
    recipe: Recipe,
    output: Path,
    *,
    device: str = "auto",
    max_memory: str = "",
    progress: Progress = silent,
) -> Report:
    """Compress `recipe.model` into the new folder `output`; beside it, `<output>.report.json` gets
    the cost of this run.

    A run that was cut off (a kill, an interruption, a full disk) goes on where it was when the same
    is asked for again. Processes that torchrun started share the work; each of them calls this.

    Raises:
        CompressError: for everything a user can cause; nothing is left behind but what a run can go
            on from.
    """
    if max_memory:
        parse_size(max_memory)
    with processes() as group:
        where = choose_device(local_device(device))
        plan = plan_run(recipe, output)
        if plan.tune and group.size > 1:
            raise UsageError(
                "`tune` trains on all samples at once, in one process: start it without torchrun"
            )
        match = recipe.match if plan.strengths else ""
        recipe = replace(recipe, seq_len=plan.seq_len, match=match, **plan.checked_options)
        settings = {
            "recipe": asdict(recipe),
            "device": device,
            "max_memory": max_memory,
            "folder": os.getcwd(),
        }
        others = side_files(plan.reader.folder, code=recipe.trust_remote_code)
        mark = fingerprint(recipe, plan.reader, others, where, group.size)
        if not is_complete(output):
            group.agreed(room.check, plan, recipe.num_samples, output, where, max_memory)
        with recording(output, mark, settings, first=group.first) as recorder:
            if group.agreed(lambda: recorder.complete):
                return Report.load(group.agreed(recorder.publish))
            run = _Run(recipe, where, max_memory, work_path(output), recorder, group, progress)
            return run.compressed(plan)


@dataclass(frozen=True)
class _Run:
    """What the steps of one run share.

    Attributes:
        recipe: what is asked for.
        device: where blocks are computed.
        max_memory: as `--max-memory` has it.
        work: the work state of the run.
        recorder: what writes things down; in the first process only it does so.
        group: the processes that share the run.
        progress: told after each step.
    """

    recipe: Recipe
    device: torch.device
    max_memory: str
    work: Path
    recorder: Recorder | NullRecorder
    group: Group
    progress: Progress

    def compressed(self, plan: Plan) -> Report:
        """Do what is not done yet of `plan`."""
        started, group, recorder = time.perf_counter(), self.group, self.recorder
        states = self._calibrated(plan) if plan.needs_inputs else None
        grams = gram_room(plan, self.device, self.max_memory) if plan.needs_gram else None
        factors = group.agreed(
            factored_by_gradients,
            plan,
            states,
            self.device,
            self.work,
            self.progress,
            recorder.once,
        )
        prepared = Prepared(factors, grams)
        choice = self._chosen(plan, states, prepared)
        facts = Facts(
            replace(self.recipe, plan=plan_file.FILE if self.recipe.plan else ""),
            choice.measured,
            choice.spectra,
            self.recipe.num_samples * plan.seq_len if states else 0,
        )
        done, saved = group.agreed(recorder.begin, choice.plan, facts)
        mine = saved[group.rank if plan.splits_batches else 0] if saved else None
        if states and mine:  # nothing is saved after the last block
            states.load(self.work, mine)
        witness = Witness(choice.plan, self.work)
        journal_seconds = self._compress_blocks(choice.plan, states, prepared, done, witness)
        peaks = group.joined([peak_memory()])
        run = {
            "device": str(self.device), "processes": group.size,
            "seconds": round(time.perf_counter() - started, 3),
            "journal_seconds": round(journal_seconds, 3), "resumed_at_block": done,
            "peak_memory": {name: max(peak.get(name, 0) for peak in peaks) for name in peaks[0]},
        }  # fmt: skip
        check = partial(witness.check, states=states, device=self.device)
        return Report.load(group.agreed(recorder.finish, run, check))

    def _compress_blocks(
        self,
        plan: Plan,
        states: States | None,
        prepared: Prepared,
        done: int,
        witness: Witness,
    ) -> float:
        """All blocks from number `done` on; returns the seconds that saving their results took."""
        group, begun, journal_seconds = self.group, time.perf_counter(), 0.0
        self.progress("blocks", done, len(plan.tasks))
        rows = compress_blocks(
            plan,
            states,
            self.device,
            self.recorder.store,
            self.progress,
            first=done,
            group=group,
            prepared=prepared,
            watch=witness.saw if group.first else unwatched,
        )
        for row in rows:
            computed = time.perf_counter()
            saves = row.index + 1 < len(plan.tasks) and (group.first or plan.splits_batches)
            saved = group.joined([states.save(self.work) if states and saves else None])
            group.agreed(self.recorder.finish_block, row, computed - begun, saved)
            if states:
                states.forget(self.work)
            if prepared.factors and group.first:
                prepared.factors.drop(row.index)
            self.progress("blocks", row.index + 1, len(plan.tasks), row)
            begun = time.perf_counter()
            journal_seconds += begun - computed
        return journal_seconds

    def _calibrated(self, plan: Plan) -> States:
        """The calibration on entering block 0: all batches, or those of this process."""
        self.progress("calibration", 0, 1)
        group, recipe, device = self.group, self.recipe, self.device
        ids = torch.tensor(
            group.agreed(
                lambda: self.recorder.once("ids", lambda: _samples(plan, recipe, device).tolist())
            )
        )
        ids, held_out = ids[: recipe.num_samples], ids[recipe.num_samples :]
        size = batch_size(*ids.shape)
        own = group.part(len(ids) // size) if plan.splits_batches else slice(0, len(ids) // size)
        count = (own.stop - own.start) * size * plan.seq_len + held_out.numel()
        beside = room.states_bytes(plan, count, size * plan.seq_len)
        home = choose_home(plan, count, device, self.max_memory, self.work, beside)

        def place(name: str) -> Batches:
            return Batches(device, home, f"{name}.{group.rank}")

        states = _entering(plan, ids, device, place, own, self.work)
        if len(held_out):
            states.held_out = capture.capture(
                plan.skeleton, held_out, device, place("held_out"), folder=self.work
            )
        if plan.chooses_strength:
            if not states.held_out:
                raise DataError(
                    "`match` auto chooses by samples that are held out, and the text has none left "
                    "for them: give more text or a lower `num_samples`, or a strength such as "
                    "`match='0.5'`"
                )
            states.held_out.dense = _copied(states.held_out.hidden, place, "held_out_dense")
        self.progress("calibration", 1, 1)
        return states

    def _chosen(self, plan: Plan, states: States | None, prepared: Prepared) -> Choice:
        """The plan with its targets. They are chosen once: a run that goes on keeps them."""
        if not plan.choice:
            return Choice(plan)

        def choose() -> dict[str, Any]:
            choice = choose_targets(plan, states, self.device, prepared, self.progress)
            known = {left.name for left in plan.left_dense}
            reasons = [left.reason for left in choice.plan.left_dense if left.name not in known]
            return {
                "plan": plan_file.dumps(choice.plan),
                "reason": reasons[0] if reasons else "",
                "allocation": choice.measured,
                "spectra": choice.spectra,
            }

        chosen = self.group.agreed(lambda: self.recorder.once("goals", choose))
        entries = tomllib.loads(chosen["plan"])["linears"]
        dense = {left.name: left.reason for left in plan.left_dense}
        targets = plan_file.fit(entries, [task.linear for task in plan.every], dense)
        return Choice(
            plan.with_targets(targets, chosen["reason"]), chosen["allocation"], chosen["spectra"]
        )


def choose_targets(
    plan: Plan,
    states: States | None,
    device: torch.device,
    prepared: Prepared,
    progress: Progress,
) -> Choice:
    """The targets that the plan's choice arrives at; the plan itself where there is nothing to
    choose. Arguments as for `share_ranks`.
    """
    match plan.choice:
        case ShareRanks() as asked:
            return share_ranks(plan, asked, states, device, prepared, progress)
        case ShareZeros() as asked:
            return share_zeros(plan, asked, states, device, prepared, progress)
        case LeaveDense() as asked:
            assert states
            return leave_some_dense(plan, asked, states, device, prepared, progress)
    return Choice(plan)


def check_run(
    recipe: Recipe, output: Path | None, *, device: str = "auto", max_memory: str = ""
) -> Plan:
    """What `prune` would do with `recipe`, all checked that it checks before work. Nothing is
    written; without an `output` the disk is not looked at.
    """
    if max_memory:
        parse_size(max_memory)
    where = choose_device(device)
    plan = plan_run(recipe, output)
    room.check(plan, recipe.num_samples, output, where, max_memory)
    if recipe.dataset == "self" and plan.needs_inputs:
        tokens.require_memory(plan.reader.folder, str(where))
    return plan


def make_plan(
    recipe: Recipe, *, device: str = "auto", max_memory: str = "", progress: Progress = silent
) -> Choice:
    """What `prune` would do with `recipe`: the target of every linear. Nothing is written."""
    if max_memory:
        parse_size(max_memory)
    where = choose_device(device)
    plan = plan_run(recipe, None)
    asked, ready = plan.choice, Prepared()
    if asked is None or (isinstance(asked, ShareRanks) and not asked.by_spectra):
        return choose_targets(plan, None, where, ready, progress)  # nothing to measure
    with TemporaryDirectory() as name:
        folder = Path(name)
        room.check_choice(plan, recipe.num_samples, folder, where, max_memory)
        states = None
        if plan.measures:
            states = calibrate(plan, recipe, where, progress, folder, max_memory)
        factors = factored_by_gradients(plan, states, where, folder, progress)
        grams = gram_room(plan, where, max_memory) if plan.needs_gram else None
        return choose_targets(plan, states, where, Prepared(factors, grams), progress)


def calibrate(
    plan: Plan,
    recipe: Recipe,
    device: torch.device,
    progress: Progress = silent,
    folder: Path | None = None,
    max_memory: str = "",
) -> States:
    """The calibration on entering block 0, without what is held out: where there is room for it,
    `folder` on disk at last; on `device` without a folder.
    """
    progress("calibration", 0, 1)
    ids = _samples(plan, recipe, device)[: recipe.num_samples]
    place = None
    if folder:
        beside = room.states_bytes(plan, ids.numel(), batch_size(*ids.shape) * plan.seq_len)
        home = choose_home(plan, ids.numel(), device, max_memory, folder, beside)
        place = partial(Batches, device, home)
    states = _entering(plan, ids, device, place, folder=folder)
    progress("calibration", 1, 1)
    return states


def _entering(
    plan: Plan,
    ids: Tensor,
    device: torch.device,
    place: Callable[[str], Batches] | None = None,
    own: slice = slice(None),
    folder: Path | None = None,
) -> States:
    """Hidden states on entering block 0; twice where blocks or linears aim at the dense model: its
    own go through its blocks beside the others.

    Args:
        plan: what will be done.
        ids: of all samples, `[num_samples, seq_len]`.
        device: where blocks are computed.
        place: where hidden states of this name rest; in lists on the device without it.
        own: the batches of this process.
        folder: on disk, for what passes over the blocks keep.
    """
    hidden = place("hidden") if place else None
    states = capture.capture(plan.skeleton, ids, device, hidden, own, folder)
    check_agreement(plan.skeleton, states, device)
    if plan.keeps_dense:
        states.dense = _copied(states.hidden, place, "dense")
    return states


def _copied(
    batches: list[Batch] | Batches, place: Callable[[str], Batches] | None, name: str
) -> list[Batch] | Batches:
    """The same batches once more, where those of this name rest."""
    copied = place(name) if place else []
    for batch in batches:
        copied.append(batch)
    return copied


def choose_device(device: str) -> torch.device:
    """The torch device named `device`; `auto` is the first CUDA device, or the CPU. Raises
    UsageError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {device!r} cannot be used: "
            f"{str(error).splitlines()[0].partition('. ')[0][:200]}"
        ) from None
    return chosen


def _samples(plan: Plan, recipe: Recipe, device: torch.device) -> Tensor:
    """Token ids of the calibration, `[num_samples, seq_len]`, and after them those that are held
    out: fewer, or none, where the text has no more.
    """
    folder = plan.reader.folder
    shape = {"num_samples": recipe.num_samples, "seq_len": plan.seq_len, "seed": recipe.seed}
    asked = {**shape, "further": plan.further(recipe.num_samples)}
    if recipe.dataset == "self":
        ids = tokens.sample_from_model(
            folder, **asked, device=str(device), trust_remote_code=recipe.trust_remote_code
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the whole model that wrote the text
    else:
        vocabulary = plan.skeleton.config.get_text_config().vocab_size
        ids = tokens.calibration_rows(
            recipe.dataset,
            folder,
            vocabulary,
            **asked,
            text_column=recipe.text_column,
            trust_remote_code=recipe.trust_remote_code,
        )
    if len(ids) < recipe.num_samples or ids.shape[1] != plan.seq_len:
        raise DataError(
            f"calibration has shape {list(ids.shape)}, {[recipe.num_samples, plan.seq_len]} was "
            f"asked for"
        )
    return ids
