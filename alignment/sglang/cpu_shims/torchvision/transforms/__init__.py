from enum import Enum

from torchvision import placeholder

from . import functional  # noqa: F401  (callers reach it as an attribute)


class InterpolationMode(Enum):
    """Read as default arguments when image processors are imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


__getattr__ = placeholder(__name__)
