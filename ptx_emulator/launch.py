"""A driver for Triton whose device is the emulator: kernels are specialised and compiled as for a
GPU, and launched on CPU tensors.

Nothing of Triton is replaced but its driver and `ptxas`: the "binary" is the PTX itself.
"""

import ctypes
import struct
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from compressor_kernels import backend, layouts
from ptx_emulator import ptx
from ptx_emulator.instructions import decode
from ptx_emulator.machine import execute
from ptx_emulator.memory import Memory, Region, traffic
from ptx_emulator.poison import poison

plain = cache(ptx.plain)


@cache
def prepare(text):
    kernel = ptx.parse(text)
    return kernel, decode(kernel)


@dataclass
class Device:
    """What Triton asks of a driver, for one emulated GPU.

    Attributes:
        target: ten times the compute capability.
        seed: of the order in which programs go on.
        edit: applied to the PTX, to break it on purpose.
        launches: a record of each: `name`; `traffic`, argument -> (sectors requested, distinct
            sectors), of reads; `shared`, requests to shared memory and the cycles they take.
        before: (address, bytes) of what the last launch was given, as it was before.
    """

    target: int
    seed: int = 0
    edit: Callable[[str], str] = str
    launches: list[SimpleNamespace] = field(default_factory=list)
    before: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def get_current_device(self):
        return self.target  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": {80: 166912, 89: 101376, 90: 232448}[self.target]}

    def load_binary(self, name, binary, shared, device):
        return None, binary.decode(), 0, 0, 1024

    @property
    def utils(self):
        return self

    @property
    def launcher_cls(self):
        return Launcher


class Launcher:
    """Of one compiled kernel, on whatever device is active."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, text, packed, launch, enter, leave, *arguments):
        device, names = driver.active, self.source.fn.arg_names
        kernel, code = prepare(device.edit(plain(text)))
        given = {
            name: value
            for name, value in zip(names, arguments, strict=True)
            if self.source.signature[name] != "constexpr"
        }
        params = [bits(value) for value in given.values()]
        params += [0] * (
            len(kernel.params) - len(params)
        )  # Triton's own scratch memory, which no kernel here uses
        regions = gather(
            {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        )
        memory = Memory(
            regions, device.before if getattr(self.metadata, "launch_pdl", False) else None
        )
        device.before = [(region.start, region.real.copy()) for region in regions]
        shared = execute(kernel, code, (x, y, z), params, memory, self.metadata.shared, device.seed)
        device.launches.append(
            SimpleNamespace(name=kernel.name, traffic=traffic(regions), shared=shared)
        )


def bits(value):
    """A parameter as an integer."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return (
        struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)
    )


def gather(tensors):
    """The bytes of the tensors as regions; those that overlap are one."""
    found = []
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        assert tensor.is_contiguous(), name
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if found and start < found[-1][2]:
            name, start, stop = f"{found[-1][0]}, {name}", found[-1][1], max(stop, found[-1][2])
            found.pop()
        found.append((name, start, stop))
    return [
        Region(
            name,
            start,
            stop,
            np.frombuffer((ctypes.c_uint8 * (stop - start)).from_address(start), np.uint8),
        )
        for name, start, stop in found
    ]


@contextmanager
def emulated(device, folder):
    """Launches inside go to `device`; Triton compiles into `folder`. What a kernel does not write
    is NaN.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(
            CUDABackend,
            "make_cubin",
            lambda self, source, metadata, options, capability: source.encode(),
        )
        patch.setattr(driver, "_active", device)
        poison(patch)
        patch.setattr(backend, "nvidia", lambda: True)
        patch.setattr(backend, "runs", lambda x: x.dtype in backend.DTYPES)
        patch.setattr(layouts, "sparse_tensor_cores", lambda _: True)
        patch.setattr(backend, "hopper", lambda _: device.target >= 90)
        yield device
