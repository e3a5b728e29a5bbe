"""What a family computes in float32 whatever the model is in, it computes so block by block too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.calibration import capture
from compressor.checkpoint.reader import Reader
from compressor.model.skeleton import Skeleton
from tests.families import build

CPU = torch.device("cpu")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["ernie4_5_moe", "deepseek_v4"])
def test_bfloat16_runs_keep_what_the_family_keeps_in_float32(family, tmp_path):
    folder = build(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    dtypes = {name: parameter.dtype for name, parameter in whole.named_parameters()}
    assert {torch.float32, torch.bfloat16} <= set(dtypes.values())
    leaving = []
    skeleton = Skeleton(Reader(folder))
    whole.get_submodule(skeleton.path)[-1].register_forward_hook(
        lambda module, given, output: leaving.append(output)
    )
    with torch.no_grad():
        whole(input_ids=IDS, use_cache=False)
    states = capture.capture(skeleton, IDS, CPU)
    for index, arguments in enumerate(states.arguments):
        block = skeleton.load_block(index, CPU)
        for name, parameter in block.named_parameters():
            assert parameter.dtype == dtypes[f"{skeleton.path}.{index}.{name}"], name
        states.hidden = [capture.run(block, batch, arguments) for batch in states.hidden]
        skeleton.free_block(index)
    exact = leaving[0][0] if isinstance(leaving[0], tuple) else leaving[0]
    assert torch.equal(torch.cat([batch.hidden for batch in states.hidden]), exact)
