import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.pattern import Pattern
from compressor.refine.dsnot import refine
from compressor.stats import InputStats


def case(seed, rows, columns, pattern, tokens=500, dead=0, method="wanda", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) * (
        0.5 + torch.rand(columns, generator=generator)
    )
    x += torch.randn(columns, generator=generator) * 0.3
    if dead:
        x[:, torch.randperm(columns, generator=generator)[:dead]] = 0
    stats = InputStats(columns, moments=True)
    stats.update(x)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    parsed = Pattern.parse(pattern)
    score = weight.float().abs() * (stats.norm if method == "wanda" else 1)
    return weight, weight * parsed.mask(score), stats, parsed


def missing(weight, pruned, stats):
    """|err| of every row, the objective."""
    return ((weight.double() - pruned.double()) @ stats.mean).abs()


def literal_row(w, kept, mean, variance, norm, m, cycles, threshold, power, same_sign):
    """The published rule with its two moving pointers, one row, no guards: (mask, |err| before,
    |err| after).
    """
    columns = len(w)
    contribution = [w[j] * mean[j] for j in range(columns)]
    err = start = math.fsum(contribution[j] for j in range(columns) if not kept[j])
    benefit = [0.0 if kept[j] else contribution[j] / variance[j] ** power for j in range(columns)]
    grow_list = sorted(range(columns), key=lambda j: benefit[j])
    lo, hi = 0, columns - 1
    score = {j: abs(w[j]) * norm[j] for j in range(columns) if kept[j]}
    cheapest = sorted(score, key=lambda j: score[j])
    negative = [j for j in cheapest if contribution[j] < 0]
    positive = [j for j in cheapest if contribution[j] > 0]
    mask = list(kept)
    for _ in range(cycles):
        if err > 0:
            grow, hi = grow_list[hi], hi - 1
        else:
            grow, lo = grow_list[lo], lo + 1
        if m:
            group = range(grow // m * m, grow // m * m + m)
            prune = min((j for j in group if j in score), key=lambda j: score[j])
        else:
            prune = negative.pop(0) if err >= 0 else positive.pop(0)
        after = err + contribution[prune] - contribution[grow]
        if abs(err) <= threshold or ((same_sign or m) and (after > 0) != (start > 0)):
            break
        if m:
            del score[prune]
        mask[grow], mask[prune] = True, False
        err = after
    return mask, abs(start), abs(err)


@pytest.mark.parametrize("pattern", ["50%", "60%", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cycles": 10},
        {"threshold": 0.3},
        {"variance_power": 0.0},
        {"variance_power": 0.5, "same_sign": True},
    ],
    ids=str,
)
def test_equals_a_literal_transcription(pattern, method, options):
    weight, pruned, stats, parsed = case(0, 48, 512, pattern, method=method)
    settings_ = {
        "cycles": 50,
        "threshold": 5e-5,
        "variance_power": 1.0,
        "same_sign": False,
    } | options
    refined = refine(weight, pruned, stats, parsed, **settings_)
    variance = (stats.m2 / stats.tokens).tolist()
    put_back = 0
    for r in range(len(weight)):
        mask, before, after = literal_row(
            weight[r].double().tolist(),
            (pruned[r] != 0).tolist(),
            stats.mean.tolist(),
            variance,
            stats.norm.double().tolist(),
            parsed.m,
            settings_["cycles"],
            settings_["threshold"],
            settings_["variance_power"],
            settings_["same_sign"],
        )
        if after > max(before, settings_["threshold"]):
            put_back += 1
            assert torch.equal(refined[r], pruned[r])
        else:
            assert torch.equal(refined[r], weight[r] * torch.tensor(mask))
    assert put_back <= len(weight) // 4
    assert not torch.equal(refined, pruned)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    groups=st.integers(2, 32),
    pattern=st.sampled_from(["2:4", "4:8", "1:8", "50%", "90%", "5%"]),
    tokens=st.sampled_from([1, 2, 300]),
    dead=st.integers(0, 8),
    cycles=st.sampled_from([1, 10, 50]),
    power=st.sampled_from([0.0, 1.0]),
    method=st.sampled_from(["wanda", "magnitude"]),
    same_sign=st.booleans(),
)
def test_stays_legal_and_never_raises_its_objective(
    seed, rows, groups, pattern, tokens, dead, cycles, power, method, same_sign
):
    weight, pruned, stats, parsed = case(seed, rows, groups * 8, pattern, tokens, dead, method)
    refined = refine(
        weight, pruned, stats, parsed, cycles=cycles, variance_power=power, same_sign=same_sign
    )
    assert parsed.is_legal(refined)
    assert torch.equal((refined != 0).sum(1), (pruned != 0).sum(1))
    if parsed.m:
        counts = [(w != 0).reshape(rows, -1, parsed.m).sum(-1) for w in (refined, pruned)]
        assert torch.equal(counts[0], counts[1])
    grown = (refined != 0) & (pruned == 0)
    assert torch.equal(refined[grown], weight[grown])
    assert not bool(grown[:, stats.m2 <= 0].any())
    assert torch.equal(refined[~grown & (refined != 0)], pruned[~grown & (refined != 0)])
    bound = missing(weight, pruned, stats).clamp_min(5e-5)
    assert bool((missing(weight, refined, stats) <= bound * (1 + 1e-9)).all())


def test_a_single_token_changes_nothing():
    weight, pruned, stats, pattern = case(1, 8, 64, "50%", tokens=1)
    assert torch.equal(refine(weight, pruned, stats, pattern), pruned)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_lowers_the_objective_of_wide_rows(pattern):
    weight, pruned, stats, parsed = case(2, 64, 512, pattern)
    after = missing(weight, refine(weight, pruned, stats, parsed), stats)
    assert after.sum() < 0.5 * missing(weight, pruned, stats).sum()


def test_the_result_does_not_depend_on_how_tokens_come_in_sequences():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 128, generator=generator) + 0.5
    weight = torch.randn(16, 128, generator=generator)
    pattern = Pattern.parse("50%")
    refined = []
    for length in (512, 64, 1):
        stats = InputStats(128, moments=True)
        for part in x.split(length):
            stats.update(part)
        refined.append(
            refine(weight, weight * pattern.mask(weight.abs()), stats, pattern, cycles=5)
        )
    assert torch.equal(refined[0], refined[1])
    assert torch.equal(refined[0], refined[2])


def test_updated_values_of_kept_weights_survive():
    weight, pruned, stats, pattern = case(4, 16, 256, "2:4")
    updated = pruned * 1.25
    refined = refine(weight, updated, stats, pattern)
    stayed = (refined != 0) & (updated != 0)
    assert torch.equal(refined[stayed], updated[stayed])
    assert bool(
        (
            missing(weight, refined, stats)
            <= missing(weight, updated, stats).clamp_min(5e-5) * (1 + 1e-9)
        ).all()
    )
