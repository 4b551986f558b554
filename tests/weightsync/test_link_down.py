"""The network between trainer and engines goes down while everyone lives. The witness is the interface's own flag."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import forkserver

import namespaces
import processes
import pytest

BEFORE_OR_IN = [("trainer", "transfer"), ("engine", "prepare"), ("engine", "transfer")]
AFTER = [("engine", "verify"), ("engine", "commit")]  # no phase but TRANSFER uses the network
# what uses the same processes, one after the other
CHAINS = [("collective", BEFORE_OR_IN + AFTER), ("rdma", BEFORE_OR_IN[:1]), ("rdma", BEFORE_OR_IN[2:])]
CASES = [(transport, *case) for transport, cases in CHAINS for case in cases]
# UCX does not let go of a write before its link is up again or it gives up, tens of seconds later: not waited for
SHORT = replace(processes.LONG, transfer=1, abort=2)


def carry_out(entered: Future, who: str, step: str) -> tuple[str, float]:
    """One case; what it led to, and how long that took."""
    run: namespaces.Run = entered.result()
    if run.refused:
        return "", 0.0
    began = time.monotonic()
    child, served = run.trainer if who == "trainer" else run.engines[0], run.version
    child.ask("cut", step)
    outcome = run.next_sync(SHORT if (who, step) in BEFORE_OR_IN else processes.LONG)
    assert child.ask("witness") is True
    if (who, step) in BEFORE_OR_IN:
        assert (outcome.committed, outcome.failed_in) == (False, "transfer"), outcome
        run.eventually_served([served, served])
    else:
        assert outcome.committed, outcome
        run.eventually_served([run.version] * 2)
    assert child.ask("up") is True
    for attempts in (1, 2):
        if run.next_sync(replace(processes.LONG, transfer=10)).committed:
            run.eventually_served([run.version] * 2)
            text = f"{outcome.cause or 'committed'}; up again: attempt {attempts} commits"
            return text, time.monotonic() - began
    raise AssertionError("the link is up, and two transfers have failed")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Case -> (future of its run, future of what it led to). Chains at once, their cases one by one."""
    folder = tmp_path_factory.mktemp("links")
    processes.context()
    forkserver.ensure_running()
    with contextlib.ExitStack() as stack:
        found = {}
        for number, (transport, cases) in enumerate(CHAINS):
            pool = stack.enter_context(ThreadPoolExecutor(1))
            run = namespaces.Run(folder / str(number), transport)
            stack.callback(run.__exit__)
            entered = pool.submit(run.__enter__)
            found |= {(transport, *case): (entered, pool.submit(carry_out, entered, *case)) for case in cases}
        yield found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_link_that_goes_down_leaves_one_verified_version(running, case, fault_row):
    entered, led_to = running[case]
    text, seconds = led_to.result(timeout=300)
    if entered.result().refused:
        pytest.skip(f"this kernel gives users no namespaces of their own: {entered.result().refused}")
    transport, who, step = case
    fault_row(f"{transport}: link down at the {who}", step, "interface flags", text, seconds=seconds)
