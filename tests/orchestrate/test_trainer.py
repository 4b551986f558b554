"""One step out of what the trainer's ranks report of it."""

import numpy as np
import pytest

from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.trainer import RankReport, merged

A, B = np.array([-1.0, -0.5], np.float32), np.array([-2.0], np.float32)
SAMPLES = [None, None]  # asked for their number alone


def report(replica, logprobs, *, loss=1.0, norm=3.0):
    return RankReport(replica, loss, norm, logprobs, differing_routes=replica + 1)


def test_replicas_add_up_and_ranks_of_one_count_once():
    ranks = [report(0, {1: B}, loss=0.5), report(0, {1: B.copy()}, loss=0.5), report(1, {0: A}, loss=0.25)]
    step = merged(ranks, SAMPLES)
    assert (step.loss, step.grad_norm, step.differing_routes, step.correction) == (0.75, 3.0, 3, None)
    assert [values.tolist() for values in step.logprobs] == [A.tolist(), B.tolist()]


def test_ranks_that_disagree_end_the_run():
    other = np.nextafter(B, np.float32(0))
    with pytest.raises(RunError, match="trainer rank 1 scores sample 1 otherwise than a rank before it"):
        merged([report(0, {0: A, 1: B}), report(0, {0: A, 1: other})], SAMPLES)
    with pytest.raises(RunError, match=r"different gradient norms: \[3.0, 3.5\]"):
        merged([report(0, {0: A}), report(1, {1: B}, norm=3.5)], SAMPLES)
