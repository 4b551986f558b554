from torchvision import placeholder

from . import functional  # noqa: F401  (callers reach it as an attribute)

__getattr__ = placeholder(__name__)
