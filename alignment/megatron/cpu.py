"""Megatron-Core on a machine without CUDA: ``megatron.core.*`` is rewritten while it is imported.

No Megatron release runs on a CPU as it stands: it spells ``device="cuda"``, ``torch.cuda.current_device()`` and
``"torch.cuda.FloatTensor"`` out. `enable_cpu` installs an import hook that parses each ``megatron.core`` module, points
those spellings at the CPU and at `zerokl.alignment.megatron.cpu_device`, and compiles the result in memory. Files in
site-packages and torch itself stay untouched. Where CUDA exists the hook is not installed at all.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

_PACKAGE = "megatron.core"
_STAND_IN_MODULE = "zerokl.alignment.megatron.cpu_device"
_STAND_IN = "_zerokl_cpu"
# These two reach into the CUDA generators by ways of their own; their whole body becomes one call.
_RNG_FUNCTIONS = {"_get_cuda_rng_state": ("get_rng_state", []), "_set_cuda_rng_state": ("set_rng_state", ["new_state"])}


class _ToCpu(ast.NodeTransformer):
    """Replaces every spelling of the CUDA device in one module."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, str):
            return node
        if node.value == "cuda" or node.value.startswith("cuda:"):
            return ast.copy_location(ast.Constant("cpu"), node)
        if node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", "torch.")), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and str(first.value).startswith("cuda:"):
            return ast.copy_location(ast.Constant("cpu"), node)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(_STAND_IN, node.ctx), node)
        self.generic_visit(node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg == "pin_memory":
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        if not isinstance(node.func, ast.Attribute):
            return node
        if node.func.attr == "cuda":
            node.func.attr, node.args, node.keywords = "cpu", [], []
        elif node.func.attr == "pin_memory":
            return node.func.value
        elif node.func.attr == "record_stream":
            return ast.copy_location(ast.Constant(None), node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if node.name in _RNG_FUNCTIONS:
            function, arguments = _RNG_FUNCTIONS[node.name]
            call = ast.parse(f"return {_STAND_IN}.{function}({', '.join(arguments)})").body
            node.body = [ast.copy_location(statement, node) for statement in call]
        return node


def rewrite(source: str | bytes, path: str) -> ast.Module:
    """The CPU form of one Megatron module as a syntax tree, ready to compile."""
    tree = _ToCpu().visit(ast.parse(source, path))
    name = ast.alias(_STAND_IN_MODULE.rpartition(".")[2], _STAND_IN)
    tree.body.insert(_after_header(tree), ast.ImportFrom(_STAND_IN_MODULE.rpartition(".")[0], [name], 0))
    return ast.fix_missing_locations(tree)


def _after_header(tree: ast.Module) -> int:
    """Where the first import may go: behind the docstring and ``from __future__``."""
    for index, node in enumerate(tree.body):
        docstring = index == 0 and ast.get_docstring(tree) is not None
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not (docstring or future):
            return index
    return len(tree.body)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten tree; never reads or writes ``.pyc`` files, which hold the unrewritten module."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile(rewrite(self.get_data(path), path), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def enable_cpu() -> bool:
    """Make ``import megatron.core`` work here; returns whether the rewrite is active.

    Does nothing where CUDA is available, and nothing on a second call. Raises RuntimeError if Megatron-Core was
    already imported unrewritten: half of it would still point at CUDA.
    """
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return True
    if _PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before zerokl.alignment.megatron.cpu.enable_cpu() ran, so it still points at "
            "CUDA. Call enable_cpu() first, or start a fresh process."
        )
    sys.meta_path.insert(0, _Finder())
    return True
