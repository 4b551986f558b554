"""Real processes killed and stopped in each phase of a transfer. After each fault: every engine serves one verified
version or nothing, the cause is named, and the next transfer succeeds. All cases run at once; most of them wait.

A busy machine must not change an outcome: deadlines are short only where they are waited out, and who else is late then
may be named too."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import processes
import pytest
from parties import eventually
from processes import Run

STEPS = ["plan", "prepare", "transfer", "verify", "commit", "resume"]
FAULTS = [(who, what) for who in ("engine", "trainer") for what in ("killed", "stopped")]
CASES = [("ipc", *fault, step) for fault in FAULTS for step in STEPS]
CASES += [(transport, *fault, "transfer") for transport in ("rdma", "collective", "disk") for fault in FAULTS]
AT_ONCE = 4


def engine_fault(run: Run, what: str, step: str) -> str:
    victim = run.engines[1]
    victim.ask("fault", step, processes.SIGNALS[what])
    began = time.monotonic()
    outcome = run.sync("v2", processes.waited_out(step) if what == "stopped" else processes.LONG)
    seconds = time.monotonic() - began
    victim.until(what)  # the witness
    assert what == "stopped" or seconds < processes.LONG.plan  # a closed connection is not waited out
    if step == "resume":  # decided: the survivor goes on, the victim is named
        assert outcome.committed
        assert "rollout-1" in outcome.lost
    else:
        assert not outcome.committed
        assert outcome.failed_in == step
        assert "rollout-1" in outcome.cause
        assert what == "killed" or re.match(f"waited {processes.SHORT_S} s in {step} for .*rollout-1", outcome.cause)
    now = "v2" if step == "resume" else "v1"
    while run.serves(0) != now:
        assert time.monotonic() - began < 3 * processes.PATIENCE_S
        time.sleep(0.05)
    if what == "killed":
        run.restart_engine(1)
        run.eventually_served([now, None])  # a new engine serves nothing before its first weights
    else:
        victim.proceed()
        run.eventually_served([now, now])
    return f"{outcome.cause or outcome.lost}"


def trainer_fault(run: Run, what: str, step: str) -> str:
    if (what, step) == ("killed", "commit"):
        return killed_before_the_decision(run)
    run.trainer.ask("fault", step, processes.SIGNALS[what])
    deadlines = processes.waited_out(step, processes.Impatient) if what == "stopped" else processes.LONG
    run.trainer.pipe.send(("sync", "v2", 2, deadlines))
    run.trainer.until(what)  # the witness
    if what == "killed":
        if step == "resume":
            run.eventually_served(["v2", "v2"])
        else:
            run.eventually_served(["v1", "v1"])
        run.restart_trainer()
        return f"served without a trainer: {run.served()}"
    time.sleep(deadlines.patience)  # then the engines have given up on it; who has committed never does
    run.eventually_in({"idle", "committed"} if step == "commit" else {"idle"})
    served = run.served()
    if step == "resume":
        assert served == ["v2", "v2"]
    elif step == "commit":  # who has committed waits for the decision
        assert set(served) <= {"v1", None}
    else:
        assert served == ["v1", "v1"]
    run.trainer.proceed()
    outcome = run.trainer.answer()
    assert outcome.committed or outcome.cause
    assert step == "commit" or outcome.committed == (step == "resume")  # in commit, all may have answered in time
    now = "v2" if outcome.committed else "v1"
    run.eventually_served([now, now])
    return f"served then: {served}; {outcome.cause or 'committed'}"


def killed_before_the_decision(run: Run) -> str:
    """Both engines have committed, and nobody will ever tell them whether the other one has."""
    run.trainer.ask("fault", "commit", processes.SIGNALS["stopped"])
    run.trainer.pipe.send(("sync", "v2", 2, processes.LONG))
    run.trainer.until("stopped")
    run.eventually_served([None, None])
    run.trainer.process.kill()
    run.trainer.until("killed")
    assert settle(run) == [None, None]
    assert [child.ask("serving", run.seeds)[2] for child in run.engines] == ["quarantined"] * 2
    run.restart_trainer()
    return "served without a trainer: nothing"


def settle(run: Run) -> list:
    """What is served when nothing changes any more."""
    found, since = run.served(), time.monotonic()
    while time.monotonic() - since < 1.0:
        if (now := run.served()) != found:
            found, since = now, time.monotonic()
        time.sleep(0.05)
    return found


def carry_out(folder: Path, transport: str, who: str, what: str, step: str) -> tuple[str, float]:
    with Run(folder, transport) as run:
        began = time.monotonic()
        text = (engine_fault if who == "engine" else trainer_fault)(run, what, step)
        seconds = time.monotonic() - began
        outcome = run.sync("v3")
        assert outcome.committed, outcome
        run.eventually_served(["v3", "v3"])
        return text, seconds


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Case -> future of how it went."""
    folder = tmp_path_factory.mktemp("faults")
    before = set(Path("/dev/shm").iterdir())
    processes.context()
    forkserver.ensure_running()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {case: pool.submit(carry_out, folder / "-".join(case), *case) for case in CASES}
        yield running
    # what others on this machine share for a moment goes away, a leak does not
    left = [path for path in set(Path("/dev/shm").iterdir()) - before if "zerokl" in path.name]
    eventually(lambda: not any(path.exists() for path in left), processes.PATIENCE_S)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_fault_leaves_one_verified_version(table, case, fault_row):
    transport, who, what, step = case
    outcome, seconds = table[case].result(timeout=600)
    fault_row(f"{transport}: {who} {what}", step, "state in /proc", outcome, seconds=seconds)
