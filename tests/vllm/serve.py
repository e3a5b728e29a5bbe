"""Serve folders with vLLM's engine, one after the other in one process, and write what it says.

    python tests/vllm/serve.py CASES.json ANSWERS.json

Cases are a list of {"name", "folder", "runtime", "options"}, options being those of vllm.LLM. An
answer is a list of {"prompt", "tokens", "logprobs"}, or {"error": …} where the folder was refused.
It imports nothing of ours: vLLM itself must find the plug-in.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

PROMPTS = ["Once upon a time there was a", "The capital of France is", "In 1969, the first humans"]
SMALL = dict(
    dtype="float32",
    enforce_eager=True,
    max_model_len=128,
    max_num_seqs=4,
    max_num_batched_tokens=128,
    enable_prefix_caching=False,
    seed=0,
)


def answer(folder, options):
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    one = {"distributed_executor_backend": "uni"} if "tensor_parallel_size" not in options else {}
    llm = None
    try:
        llm = LLM(folder, **SMALL | one | options)
        wanted = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True)
        outputs = llm.generate(PROMPTS, wanted, use_tqdm=False)
        return [
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [
                    places[token].logprob
                    for token, places in zip(
                        output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
                    )
                ],
            }
            for output in outputs
        ]
    except Exception as error:
        return {"error": "".join(traceback.format_exception(error))}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    answers = {}
    for case in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["COMPRESS_RUNTIME"] = case["runtime"]
        print("serving", case["name"], flush=True)
        answers[case["name"]] = answer(case["folder"], case["options"])
    Path(sys.argv[2]).write_text(json.dumps(answers))
