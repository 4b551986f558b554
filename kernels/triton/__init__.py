"""The kernels for NVIDIA GPUs, file by file as in ``kernels/cpu``. Importing this package needs triton.

Elementwise and row kernels are cross-device: they give the CPU backend's bits.
"""
