"""Planning looks at each linear a number of times that does not grow with the number of linears."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from compressor.allocation.rank import Spectrum, threshold, uniform
from compressor.engine.plan import Plan, ShareRanks
from compressor.engine.task import Rank, Task
from compressor.methods import method_module
from compressor.pattern import Pattern
from compressor.run import plan_file

PER_BLOCK = 40  # linears of a block, all of one module of experts


class Counter:
    """How many tasks were handed out."""

    visits = 0


class Counted(tuple):
    """Tasks of a block, counted as they are visited."""

    __slots__ = ()

    def __iter__(self):
        for task in super().__iter__():
            Counter.visits += 1
            yield task


def linear(block, number):
    module = torch.nn.Module()
    module.has_gate = True
    module.has_bias = False
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(1))
    module.down_proj = torch.nn.Parameter(torch.zeros(1))
    return SimpleNamespace(
        name=f"model.layers.{block}.mlp.experts.{number}.up_proj",
        path=f"model.layers.{block}.mlp.experts.{number}.up_proj",
        shape=(64, 64),
        size=64 * 64,
        at=None,
        experts=f"model.layers.{block}.mlp.experts",
        module=SimpleNamespace(owner=module),
    )


def plan_of(blocks, method, target, **more):
    linears = [[linear(block, number) for number in range(PER_BLOCK)] for block in range(blocks)]
    module = method_module(method)
    tasks = tuple(Counted(Task(one, module, {}, target) for one in block) for block in linears)
    skeleton = SimpleNamespace(blocks=range(blocks), linears=lambda index: linears[index])
    settings = dict(refine=None, refine_options={}, tune=0, packed=True, all_tokens=False)
    return Plan(None, skeleton, tasks, seq_len=8, seed=0, left_dense=[], **settings, **more)


def visits(work):
    Counter.visits = 0
    work()
    return Counter.visits


def asked_of_every_task(plan):
    """What a run asks, block by block and linear by linear."""
    for task in plan.every:
        for question in ("needs_inputs", "needs_gram", "needs_gradients", "measures"):
            getattr(plan, question)
        assert plan.splits_batches in (True, False)
        assert plan.packs(task) in (True, False)
        assert plan.weights
    plan.check_experts()
    assert plan.checked_options


@pytest.mark.parametrize(("method", "target"), [("wanda", Pattern(2, 4)), ("svd_llm", Rank(8))])
def test_all_that_a_run_asks_of_its_plan_takes_a_few_looks_at_each_task(method, target):
    for blocks in (4, 16):
        plan = plan_of(blocks, method, target)
        assert visits(lambda plan=plan: asked_of_every_task(plan)) <= 3 * blocks * PER_BLOCK


def test_choosing_writing_and_fitting_targets_take_a_few_looks_at_each_task():
    choice = ShareRanks(Fraction(1, 2), uniform, {})

    def choose(plan):
        chosen = plan.with_targets({task.linear.name: Rank(8) for task in plan.every}, "")
        entries = plan_file.PlanFile.of(SimpleNamespace(plan=chosen, measured={})).linears
        fitted = plan_file.fit(entries, [task.linear for task in plan.every], {})
        assert set(fitted.values()) == {Rank(8)}

    for blocks in (4, 16):
        plan = plan_of(blocks, "svd_llm", None, choice=choice)
        assert visits(lambda plan=plan: choose(plan)) <= 4 * blocks * PER_BLOCK


@pytest.mark.parametrize("module", [uniform, threshold])
def test_ranks_of_many_linears_are_counted_once_for_each(monkeypatch, module):
    """The parameters of all linears are not summed again for every step of every linear."""
    counted = []
    real = Spectrum.parameters
    monkeypatch.setattr(
        Spectrum, "parameters", lambda self, rank: counted.append(1) or real(self, rank)
    )

    def counts(number):
        counted.clear()
        values = torch.linspace(2, 1, 96, dtype=torch.float64)
        spectra = {f"{n:04}": Spectrum((96, 96), values * (1 + n / number)) for n in range(number)}
        module.allocate(spectra, number * 96 * 50)
        return len(counted)

    assert counts(400) <= 4.1 * counts(100)
