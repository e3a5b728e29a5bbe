"""What blocks are called with: shared, by batch, handed on; and what is refused."""

from collections import UserDict

import pytest
import torch

from compressor.calibration.arguments import Arguments, Differing
from compressor.calibration.hidden_states import Batch
from compressor.calibration.recorder import Recorder
from compressor.errors import CheckpointError

MASK = torch.ones(2, 2)


def record(decoder, blocks, batches, returned=lambda hidden: hidden, left=None):
    """Arguments of the blocks of `decoder(forwards, batch)`, which calls `forwards[index]`; block 0
    leaves `left` in the dictionary that is its argument `shared`.
    """

    def first(hidden, *_, **keywords):
        if left is not None:
            keywords["shared"].update(left)
        return returned(hidden)

    recorder = Recorder("toy", blocks, first, lambda _: [])
    forwards = [recorder.forward(index) for index in range(blocks)]
    for batch in batches:
        recorder.begin()
        decoder(forwards, batch)
        recorder.end()
    return recorder.arguments()


def ids(number):
    return torch.tensor([[number, number + 1]])


def test_what_is_the_same_is_kept_once_and_what_differs_for_every_batch():
    def decoder(forwards, batch):
        hidden, mask = batch.float(), MASK.clone()
        for index, forward in enumerate(forwards):
            hidden = forward(hidden, mask, input_ids=batch, extra=(batch * index, None), n=index)

    arguments = record(decoder, 2, [ids(0), ids(5), ids(9)])
    assert isinstance(arguments[0].keywords["input_ids"], Differing)
    assert arguments[0].keywords["input_ids"] is arguments[1].keywords["input_ids"]
    assert torch.equal(arguments[1].positional[0], MASK)
    for number, tokens in enumerate([ids(0), ids(5), ids(9)]):
        call = arguments[1].of(Batch(number, tokens.float()))
        assert torch.equal(call.keywords["input_ids"], tokens)
        assert torch.equal(call.keywords["extra"][0], tokens)
        assert call.keywords["extra"][1] is None
        assert call.keywords["n"] == 1
    assert not isinstance(arguments[0].keywords["extra"][0], Differing)  # zeros in every batch


def test_what_a_block_returns_goes_to_the_one_that_is_given_it():
    def decoder(forwards, batch):
        hidden, indices = batch.float(), None
        for forward in forwards:
            hidden, indices, _unread = forward(hidden, previous=indices)

    arguments = record(decoder, 3, [ids(0), ids(1)], lambda hidden: (hidden, None, hidden))
    calls = []

    def block(hidden, previous):
        calls.append(previous)
        return hidden + 1, None if previous is None else previous + 1, "unread"

    batch = Batch(0, torch.zeros(1))
    batch = arguments[0].call(lambda hidden, previous: (hidden, torch.tensor([7]), 0), batch)
    assert batch.handed == {("returned", 0, 0): torch.tensor([7])}
    batch = arguments[1].call(block, batch)
    batch = arguments[2].call(block, batch)
    assert [call.item() for call in calls] == [7, 8]
    assert batch.hidden.item() == 2
    assert not batch.handed


@pytest.mark.parametrize("batches", [1, 2])
def test_what_block_0_leaves_while_it_is_recorded_is_forgotten(batches):
    def decoder(forwards, batch):
        hidden, shared = batch.float(), {}
        for forward in forwards:
            hidden = forward(hidden, shared=shared)

    _, second = record(decoder, 2, [ids(n) for n in range(batches)], left={"full": MASK})
    assert second.of(Batch(0, MASK)).keywords["shared"] == {}


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_what_blocks_leave_in_a_dictionary_is_there_for_later_ones(kind):
    def decoder(forwards, batch):
        hidden, shared = batch.float(), kind()
        for forward in forwards:
            hidden = forward(hidden, shared=shared)

    first, second, third = record(decoder, 3, [ids(0), ids(1)])

    def leaves(hidden, shared):
        assert isinstance(shared, kind)
        shared["full"] = hidden + 1, hidden + 2
        shared[3] = hidden
        return hidden

    batches = [first.call(leaves, Batch(n, torch.full((1,), float(n)))) for n in range(2)]
    batches = [second.call(lambda hidden, shared: hidden * 2, batch) for batch in batches]
    assert [batch.hidden.item() for batch in batches] == [0, 2]
    for number, batch in enumerate(batches):
        left = third.of(batch).keywords["shared"]
        assert [part.item() for part in left["full"]] == [number + 1, number + 2]
        assert left[3].item() == number
    with pytest.raises(CheckpointError, match="block 2 asks for 'sliding' of an earlier block"):
        third.call(lambda hidden, shared: shared["sliding"], batches[0])


def test_without_keywords():
    def decoder(forwards, batch):
        forwards[1](forwards[0](batch.float(), {}), {})

    own, _ = record(decoder, 2, [ids(0), ids(1)])
    assert own.of(Batch(0, MASK)).positional == ({},)
    assert own.of(Batch(0, MASK)).keywords == {}


def test_hidden_states_may_be_named():
    recorder = Recorder("toy", 2, lambda hidden_states, mask: hidden_states, lambda _: [])
    recorder.begin()
    hidden = recorder.forward(0)(hidden_states=MASK, mask=MASK)
    recorder.forward(1)(hidden_states=hidden, mask=MASK)
    recorder.end()
    own, _ = recorder.arguments()
    leaving = own.call(lambda hidden_states, mask: hidden_states + mask.sum(), Batch(0, MASK))
    assert leaving.hidden.sum() == 20


def changed(forwards, batch):
    forwards[1](forwards[0](batch.float()) + 1)


def twice(forwards, batch):
    forwards[1](forwards[0](forwards[0](batch.float())))


def skipped(forwards, batch):
    forwards[0](batch.float())


def backwards(forwards, batch):
    forwards[0](forwards[1](batch.float()))


def growing(forwards, batch):
    forwards[1](forwards[0](batch.float(), *[1] * batch[0, 0].item()))


def opaque(forwards, batch):
    forwards[1](forwards[0](batch.float(), slice(batch[0, 0].item())))


@pytest.mark.parametrize(
    ("decoder", "what"),
    [
        (changed, "changes the hidden states between block 0 and it"),
        (twice, "calls block 0 after block 0"),
        (skipped, "calls 1 of its 2 blocks in order"),
        (backwards, "calls block 1 after block -1"),
        (growing, "calls block 0 with other arguments in every batch"),
        (opaque, "calls block 0 with a slice that differs between batches"),
    ],
)
def test_what_block_by_block_would_do_otherwise_is_refused(decoder, what):
    with pytest.raises(CheckpointError, match=what) as error:
        record(decoder, 2, [ids(0), ids(1)])
    assert "cannot be compressed block by block" in str(error.value)


def test_nothing_is_called_with_nothing():
    assert Arguments().call(lambda hidden: (hidden, "more"), Batch(0, MASK)) == Batch(0, MASK)
