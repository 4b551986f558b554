from torchvision import placeholder

__getattr__ = placeholder(__name__)
