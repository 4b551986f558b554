"""Import-only stand-in for `torchvision`: every name exists, none can be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.28.0"


def placeholder(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a stand-in module: any public name is a class that raises when constructed."""

    def getattribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError(f"{module}.{name}: torchvision is not installed, and text models do not need it")

        return type(name, (), {"__init__": refuse, "__module__": module})

    return getattribute


__getattr__ = placeholder(__name__)
