"""Python callables and architectures named in a recipe or option."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from zerokl.alignment.architectures import Architecture
from zerokl.orchestrate.errors import UserError


def load_architecture(name: str, base: Path) -> Architecture:
    """The `alignment.architectures.Architecture` that `name` (as for `load_callable`) refers to.

    Raises UserError for a name that does not resolve and for anything else found there.
    """
    found = _from_file(name, base) if ".py:" in name else _from_module(name)
    if not isinstance(found, Architecture):
        raise UserError(
            f"{name} is a {type(found).__name__}, no zerokl.alignment.architectures.Architecture",
            "see docs/architectures.md",
        )
    return found


def load_callable(name: str, *, positional: int, options: dict[str, Any], base: Path) -> Callable[..., Any]:
    """The callable `name` with `options` bound as keywords.

    `name`: `package.module.function` (importable), or `folder/file.py:function` (relative to `base`, the recipe's
    folder). Raises UserError for a name that does not resolve and for options that the callable does not take.
    """
    function = _from_file(name, base) if ".py:" in name else _from_module(name)
    if not callable(function):
        raise UserError(f"{name} is not callable", "name a function or class")
    try:
        inspect.signature(function).bind(*range(positional), **options)
    except TypeError as error:
        raise UserError(
            f"{name}{inspect.signature(function)} cannot be called with options {sorted(options)}: {error}",
            "compare the recipe's options with the signature",
        ) from error
    return partial(function, **options)


def _from_module(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise UserError(f"{name!r} is no dotted path", "write package.module.function or file.py:function")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: no module named {error.name!r}", "install it, or write file.py:function") from error
    except AttributeError as error:
        raise UserError(f"module {module} has no {attribute!r}", "check the recipe's spelling") from error
    except Exception as error:
        raise UserError(f"importing {module} failed: {error!r}", "fix the module") from error


def _from_file(name: str, base: Path) -> Any:
    file, _, attribute = name.partition(":")
    path = (base / Path(file).expanduser()).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{name}: there is no file {path}", "paths are relative to the recipe's folder")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, attribute)
    except AttributeError as error:
        raise UserError(f"{path} has no {attribute!r}", "check the recipe's spelling") from error
    except Exception as error:
        raise UserError(f"running {path} failed: {error!r}", "fix the file") from error
