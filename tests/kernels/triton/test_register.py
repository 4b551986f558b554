"""Which operators the CUDA key has, that their arguments are the schemas', and what other devices are told."""

import inspect
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

import zerokl.kernels.triton as backend
from zerokl import kernels
from zerokl.kernels.triton import KERNELS, check_capability, quantized_linear, register

CPU_ONLY = {
    "cast_e4m3", "exp2", "log2", "matrix_step", "read", "set_isa",
}  # fmt: skip


def operators():
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("zerokl::")}
    return {name: getattr(torch.ops.zerokl, name).default._schema for name in names}


def test_every_operator_has_a_kernel_with_its_arguments():
    schemas = operators()
    assert schemas.keys() - CPU_ONLY == KERNELS.keys()
    register()
    register()  # once is enough, twice is harmless
    for name, kernel in KERNELS.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zerokl::{name}", "CUDA"), name
        wanted = [a.name for a in schemas[name].arguments]
        given = list(inspect.signature(kernel).parameters)
        renamed = {"sum": "total"}  # a builtin's name
        assert given == [renamed.get(a, a) for a in wanted], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU loads the backend")
def test_import_without_gpu_leaves_triton_alone():
    code = "import sys, zerokl.kernels; sys.exit('zerokl.kernels.triton' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_devices_are_checked():
    x = torch.empty(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"silu_and_mul: x is on meta; supported: cpu.* needs a GPU"):
        kernels.silu_and_mul(x.to("meta"))
    with pytest.raises(ValueError, match=r"rms_norm: w is on meta, other arguments on cpu"):
        kernels.rms_norm(x, torch.empty(4, dtype=torch.bfloat16, device="meta"), 1e-6)
    seed = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"sample: logits is on meta"):
        kernels.sample(torch.empty(2, 4, device="meta"), seed=seed, position=seed)


def test_a_list_of_tensors_names_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "check_capability", asked.append)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext(asked.append(tensor)))
    x, y = torch.empty(1), torch.empty(2)
    got = []
    backend._on_own_device(lambda *a: got.append(a))([x, y], 3)
    backend._on_own_device(lambda *a: got.append(a))(y, 4)
    assert asked == [None, x, None, y]
    assert got == [([x, y], 3), (y, 4)]


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (9, 0), (10, 0))[index])
    check_capability.cache_clear()
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 8.0; supported: 9.0"):
        check_capability(0)
    check_capability(1)
    check_capability(2)
    check_capability.cache_clear()


def fake_codes(k: int, w_rows: int):
    """Arguments of scaled_linear up to y, in form; no kernel may touch them."""
    x, w = torch.zeros(3, k, dtype=torch.uint8), torch.zeros(2, k, dtype=torch.uint8)
    block = 128 if w_rows > 1 else 32
    return x, torch.zeros(3, k // block), w, torch.zeros(2, k // block), block, w_rows, None, torch.zeros(3, 2)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (11, 0), (12, 0)])
def test_fp8_needs_the_steps_of_the_contract(monkeypatch, capability):
    """Blocks of fp8 are refused before a launch where the GPU has no such steps; MX blocks need none of them."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(grid)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(quantized_linear, "scaled_linear_kernel", Kernel())
    quantized_linear.scaled_linear(*fake_codes(256, 1))
    assert len(launched) == 1
    refused = "fp8_linear: cpu has compute capability .* supported: 9.0 to 11.x. mxfp8_linear, int4_linear and linear "
    with nullcontext() if 9 <= capability[0] < 12 else pytest.raises(RuntimeError, match=refused):
        quantized_linear.scaled_linear(*fake_codes(256, 128))
    assert len(launched) == 1 + (9 <= capability[0] < 12)
