"""Block-streamed gradients and logits are those of the whole model."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from compressor.calibration import capture
from compressor.calibration.gradients import backward_blocks, next_token_loss
from compressor.calibration.head import divergence, head
from compressor.checkpoint.reader import Reader
from compressor.model.skeleton import Skeleton

CPU = torch.device("cpu")
IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _two_batches(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 48)


def streamed(folder):
    skeleton = Skeleton(Reader(folder), dtype=torch.float32)
    return skeleton, capture.capture(skeleton, IDS, CPU)


def through(skeleton, states):
    hidden = states.hidden
    for index, arguments in enumerate(states.arguments):
        block = skeleton.load_block(index, CPU)
        hidden = [capture.run(block, batch, arguments) for batch in hidden]
        skeleton.free_block(index)
    return hidden


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2", "opt", "gpt_neox"])
def test_gradients_equal_those_of_the_whole_model(family, tiny):
    skeleton, states = streamed(tiny(family))
    before = [batch.hidden.clone() for batch in states.hidden]
    whole = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    next_token_loss(whole(input_ids=IDS, use_cache=False).logits, IDS).backward()
    order = []
    for index, taps in backward_blocks(skeleton, states, CPU):
        order.append(index)
        for linear in skeleton.linears(index):
            found = torch.cat(taps[linear.name].gradients).T @ torch.cat(taps[linear.name].inputs)
            exact = whole.get_submodule(linear.name).weight.grad
            torch.testing.assert_close(
                found,
                exact.T if linear.transposed else exact,
                rtol=1e-4,
                atol=1e-5 * exact.abs().max().item(),
            )
    assert order == list(reversed(range(len(skeleton.blocks))))
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    assert all(torch.equal(was, now.hidden) for was, now in zip(before, states.hidden, strict=True))


def test_linears_of_one_input_share_their_rows(tiny):
    skeleton, states = streamed(tiny("llama"))
    _, taps = next(backward_blocks(skeleton, states, CPU))
    rows = {name.rpartition(".")[2]: tap.inputs[0] for name, tap in taps.items()}
    assert rows["q_proj"] is rows["k_proj"] is rows["v_proj"]
    assert rows["gate_proj"] is rows["up_proj"] is not rows["q_proj"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_head_gives_the_logits_of_the_whole_model(family, tiny):
    skeleton, states = streamed(tiny(family))
    last = through(skeleton, states)
    whole = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    with head(skeleton, states, CPU) as logits, torch.no_grad():
        for number, ids in enumerate(states.ids):
            torch.testing.assert_close(
                logits(number, last[number].hidden), whole(input_ids=ids, use_cache=False).logits
            )


def test_divergence_is_the_mean_over_tokens(tiny):
    skeleton, states = streamed(tiny("llama"))
    last = through(skeleton, states)
    moved = [
        replace(
            batch,
            hidden=batch.hidden
            + 0.1 * torch.randn(batch.hidden.shape, generator=torch.Generator().manual_seed(1)),
        )
        for batch in last
    ]
    with head(skeleton, states, CPU) as logits, torch.no_grad():
        assert divergence(logits, last, last) == 0
        p, q = (
            torch.cat([log_softmax(logits(b.number, b.hidden), -1) for b in batches])
            for batches in (last, moved)
        )
        assert divergence(logits, last, moved) == pytest.approx(
            (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5
        )


def test_first_batches_leave_the_states_alone(tiny):
    _, states = streamed(tiny("llama"))
    part = states.first(1)
    part.hidden[0] = replace(part.hidden[0], hidden=part.hidden[0].hidden + 1)
    assert len(part.ids) == len(part.hidden) == 1
    assert not torch.equal(part.hidden[0].hidden, states.hidden[0].hidden)
