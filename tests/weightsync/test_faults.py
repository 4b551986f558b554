"""Real processes killed and stopped in each phase of a transfer, over each transport. After each fault: every engine
serves one verified version or nothing, the cause is named, the very next transfer succeeds, and the engines go on.

A trainer, another sending rank and two engines go through all faults of their transport, the transports at once. A
busy machine must not change an outcome: deadlines are short only where they are waited out, and who else is late then
may be named too."""

import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import processes
import pytest
from processes import Run

TRANSPORTS = ["ipc", "rdma", "collective", "disk"]
STEPS = ["plan", "prepare", "transfer", "verify", "commit", "resume"]
FAULTS = [(who, what, step) for who in ("engine", "trainer") for what in ("killed", "stopped") for step in STEPS]
SENDING = ["plan", "prepare", "transfer", "resume"]
FAULTS += [("sender", what, step) for what in ("killed", "stopped") for step in SENDING]
REACHED = {
    "plan": {"planned"},
    "prepare": {"prepared"},
    "transfer": {"prepared", "transferred"},
    "verify": {"verified"},
    "commit": {"committed"},
    "resume": {"idle"},
}
"""What the engines' participants get to in a step without the trainer doing anything more."""


def member_fault(run: Run, who: str, what: str, step: str) -> str:
    """To one that only takes part: the second engine, or the sending rank beside the trainer."""
    victim, name = (run.engines[1], "rollout-1") if who == "engine" else (run.senders[0], "trainer-1")
    before = run.version
    victim.ask("fault", step, processes.SIGNALS[what])
    began = time.monotonic()
    outcome = run.next_sync(processes.waited_out(step) if what == "stopped" else processes.LONG)
    seconds = time.monotonic() - began
    victim.until(what)  # the witness
    assert what == "stopped" or seconds < processes.LONG.plan  # a closed connection is not waited out
    if step == "resume":  # decided: the others go on, the victim is named
        assert outcome.committed
        assert name in outcome.lost
    else:
        assert not outcome.committed
        assert outcome.failed_in == step
        assert name in outcome.cause
        assert what == "killed" or re.match(f"waited {processes.SHORT_S} s in {step} for .*{name}", outcome.cause)
        assert run.version == before
    run.until(lambda: run.serves(0), run.version)
    if what == "stopped":
        victim.proceed()
    elif who == "engine":
        run.restart_engine(1)
    else:
        run.restart_sender()
    new = (who, what) == ("engine", "killed")  # a new engine serves nothing before its first weights
    run.eventually_served([run.version, None if new else run.version])
    return f"{outcome.cause or outcome.lost}"


def trainer_killed(run: Run, step: str) -> str:
    if step == "commit":
        return killed_before_the_decision(run)
    run.trainer.ask("fault", step, processes.SIGNALS["killed"])
    version = run.begin()
    run.trainer.until("killed")  # the witness
    run.version = version if step == "resume" else run.version
    run.eventually_served([run.version] * 2)
    run.restart_trainer()
    return f"served without a trainer: {run.version}"


def killed_before_the_decision(run: Run) -> str:
    """Both engines have committed, and nobody will ever tell them whether the other one has."""
    run.trainer.ask("fault", "commit", processes.SIGNALS["stopped"])
    run.begin()
    run.trainer.until("stopped")
    run.until(run.states, {"committed"})
    run.trainer.process.kill()
    run.trainer.until("killed")
    run.until(run.states, {"quarantined"})
    assert run.served() == [None, None]
    run.restart_trainer()
    return "served without a trainer: nothing"


def trainer_stopped(run: Run, step: str) -> str:
    run.trainer.ask("fault", step, processes.SIGNALS["stopped"])
    version = run.begin(processes.waited_out(step))
    run.trainer.until("stopped")  # the witness
    run.until(lambda: run.states() <= REACHED[step], True)
    run.end_patience()
    run.until(run.states, {"committed" if step == "commit" else "idle"})  # who has committed never gives up
    now = {"resume": version, "commit": None}.get(step, run.version)
    assert run.served() == [now, now]
    time.sleep(processes.SHORT_S)  # by now the trainer's own deadline has passed, too
    run.trainer.proceed()
    outcome = run.trainer.answer()
    assert outcome.committed == (step == "resume")
    run.version = version if outcome.committed else run.version
    run.eventually_served([run.version] * 2)
    return f"served then: {now}; {outcome.cause or 'committed'}"


def carry_out(run: Run, who: str, what: str, step: str) -> tuple[str, float]:
    """One fault; what it led to, and how long that took."""
    run.note_memory()
    began = time.monotonic()
    if who != "trainer":
        text = member_fault(run, who, what, step)
    else:
        text = (trainer_killed if what == "killed" else trainer_stopped)(run, step)
    seconds = time.monotonic() - began
    outcome = run.next_sync()
    assert outcome.committed, outcome
    run.eventually_served([run.version] * 2)
    run.note_memory()
    return text, seconds


def carry_out_all(folder: Path, transport: str, results: dict[tuple[str, ...], Future]) -> None:
    """Every fault of one transport, one after the other; what fails starts the next one afresh."""
    run = None
    for number, fault in enumerate(FAULTS):
        try:
            run = run or Run(folder / f"{transport}-{number}", transport).__enter__()
            results[transport, *fault].set_result(carry_out(run, *fault))
        except BaseException as error:  # noqa: BLE001  (whatever it was: the test of this fault raises it)
            results[transport, *fault].set_exception(error)
            run = run and run.__exit__()
    if run is not None:
        run.__exit__()
        assert not run.left()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(transport, *fault) -> future of how it went; transport -> future of all."""
    folder = tmp_path_factory.mktemp("faults")
    processes.context()
    forkserver.ensure_running()
    results = {(transport, *fault): Future() for transport in TRANSPORTS for fault in FAULTS}
    with ThreadPoolExecutor(len(TRANSPORTS)) as pool:
        yield results | {name: pool.submit(carry_out_all, folder, name, results) for name in TRANSPORTS}


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_fault_leaves_one_verified_version(table, transport, fault, fault_row):
    who, what, step = fault
    outcome, seconds = table[transport, *fault].result(timeout=600)
    fault_row(f"{transport}: {who} {what}", step, "state in /proc", outcome, seconds=seconds)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_faults_leave_no_shared_memory(table, transport):
    table[transport].result(timeout=600)
