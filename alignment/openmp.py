"""How torch's OpenMP threads wait.

They spin for milliseconds after each parallel operation of torch, on the cores that the kernels' own threads need
next: a training step on two cores takes a third longer. OpenMP reads its settings when torch is loaded and offers no
call for this one, so it has to be in the environment of a process before that. It changes no bit.
"""

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
