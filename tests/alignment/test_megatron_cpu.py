"""The CPU rewrite of Megatron-Core: complete, in memory only, absent where CUDA exists."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from zerokl.alignment.megatron.cpu import rewrite

# find_spec would import megatron.core's parent only, which is a namespace package
MEGATRON = Path(next(iter(importlib.util.find_spec("megatron").submodule_search_locations))) / "core"


def run(script: str) -> str:
    """Run a script in a fresh interpreter, outside the checkout; returns what it printed."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cuda_spelling(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            tensor_type = text.startswith("torch.cuda.") and text.endswith("Tensor")
            return text == "cuda" or text.startswith("cuda:") or tensor_type
        case ast.Attribute(value=ast.Name(id="torch"), attr="cuda") | ast.Attribute(attr="is_cuda"):
            return True
        case ast.Call(func=ast.Attribute(attr="cuda" | "pin_memory" | "record_stream")):
            return True
    return False


def cuda_spellings(tree: ast.AST) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(tree) if cuda_spelling(node)]


def test_no_module_of_megatron_names_cuda_after_the_rewrite():
    files = sorted(MEGATRON.rglob("*.py"))
    before = sum(len(cuda_spellings(ast.parse(path.read_bytes()))) for path in files)
    after = {str(path): found for path in files if (found := cuda_spellings(rewrite(path.read_bytes(), str(path))))}
    assert len(files) > 100
    assert before > 100
    assert after == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = torch.zeros(1, device='cuda')", "x = torch.zeros(1, device='cpu')"),
        ("d = torch.cuda.current_device()", "d = _zerokl_cpu.current_device()"),
        ("t = 'torch.cuda.FloatTensor'", "t = 'torch.FloatTensor'"),
        ("d = f'cuda:{rank}'", "d = 'cpu'"),
        ("y = x.cuda(non_blocking=True)", "y = x.cpu()"),
        ("y = x.pin_memory()", "y = x"),
        ("y = torch.empty(1, pin_memory=True)", "y = torch.empty(1, pin_memory=False)"),
        ("x.record_stream(s)", "None"),
        ("assert x.is_cuda", "assert x.is_cpu"),
        ("k = 'cuda_graph'", "k = 'cuda_graph'"),
    ],
)
def test_each_spelling(source, expected):
    tree = rewrite(source, "module.py")
    assert ast.unparse(tree.body[-1]) == expected


def test_the_added_import_stands_behind_docstring_and_future():
    tree = rewrite('"""Doc."""\nfrom __future__ import annotations\nimport os\n', "module.py")
    assert ast.get_docstring(tree) == "Doc."
    compile(tree, "module.py", "exec")


def test_second_call_is_a_no_op_and_nothing_on_disk_or_in_torch_changes():
    before = {path: path.stat().st_mtime_ns for path in MEGATRON.rglob("*")}
    output = run(
        "import sys, torch\n"
        "device = torch.cuda.current_device\n"
        "from zerokl.alignment.megatron.cpu import enable_cpu\n"
        "first, finders = enable_cpu(), list(sys.meta_path)\n"
        "second = enable_cpu()\n"
        "print(first, second, sys.meta_path == finders)\n"
        "import megatron.core.tensor_parallel.random as r\n"
        "print(torch.cuda.current_device is device, torch.equal(r._get_cuda_rng_state(), torch.get_rng_state()))\n"
    )
    assert output.split() == ["True"] * 5
    assert {path: path.stat().st_mtime_ns for path in MEGATRON.rglob("*")} == before


def test_nothing_happens_where_cuda_exists():
    output = run(
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "finders = list(sys.meta_path)\n"
        "from zerokl.alignment.megatron.cpu import enable_cpu\n"
        "print(enable_cpu(), sys.meta_path == finders)\n"
    )
    assert output.split() == ["False", "True"]


def test_refuses_when_megatron_was_imported_before():
    output = run(
        "import sys, types\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from zerokl.alignment.megatron.cpu import enable_cpu\n"
        "try:\n    enable_cpu()\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert "imported before" in output
    assert "fresh process" in output


def test_an_unknown_cuda_function_is_named():
    from zerokl.alignment.megatron import cpu_device

    with pytest.raises(AttributeError, match=r"torch\.cuda\.graph_pool_handle.*no CPU stand-in"):
        cpu_device.graph_pool_handle  # noqa: B018
