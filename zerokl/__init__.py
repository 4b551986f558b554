"""zerokl: bit-exact reinforcement-learning post-training.

The code lives in the folders ``kernels``, ``alignment``, ``weightsync``, ``orchestrate`` and ``bench`` at the top of
the repository and is only ever imported as ``zerokl.kernels`` and so on: a bare top-level ``kernels`` would shadow the
PyPI package of that name, which SGLang and transformers import on GPU machines.
"""

__version__ = "0.1.0"
