"""`zerokl verify --syncs N`: train, send the weights, damage the transfer, look what is served; many times over.

Each round trains one step on what the engine sampled and sends the new weights under a fault drawn from the seed. The
fault must have happened (its witness), the engine must serve one whole version afterwards (by its digests), and the
next transfer must succeed. In the end every sampled token's log-probability is compared as bits.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from zerokl.alignment.types import PackedBatch, Request
from zerokl.alignment.verify import compare
from zerokl.orchestrate.damage import DAMAGES, Damage, DamagingSource
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.scoring import score
from zerokl.orchestrate.weights import Meeting, SyncReport, WeightLink
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.live_model import block_layout
from zerokl.weightsync.protocol import Deadlines, Outcome

if TYPE_CHECKING:
    from zerokl.alignment.megatron.policy import MegatronPolicy
    from zerokl.alignment.sglang.engine import RolloutEngine

Fault = Literal[Damage, "engine killed", "engine stopped", "second sync", "none"]
FAULTS: tuple[Fault, ...] = (*DAMAGES, "engine killed", "engine stopped", "second sync")
PHASES = ("plan", "prepare", "transfer", "verify", "commit", "resume")
_SAMPLED, _NEW_TOKENS = 4, 12  # of each round
_IMPATIENT = Deadlines(plan=3, prepare=3, transfer=3, verify=3, commit=3, resume=3, abort=1)
_TIMEOUT_S = 300.0
_SETTLE_S = 60.0


@dataclass
class Round:
    """One transfer under a fault: what was done, what became of it, and what was served then."""

    number: int
    fault: Fault
    phase: str
    witness: str = ""
    outcome: str = ""
    served: str | None = None
    whole: bool = False
    next_ok: bool = False
    mismatched_tokens: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return bool(self.witness) and self.whole and self.next_ok and self.mismatched_tokens == 0


class SyncRuns:
    """An engine and a policy that exchange weights, with faults in between. Owns both ends."""

    def __init__(
        self, meeting: Meeting, engine: RolloutEngine, policy: MegatronPolicy, requests: Sequence[Request], *,
        faults: bool = False,
    ) -> None:  # fmt: skip
        """``faults``: the sending end is one that can do damage; it sends by `ipc`."""
        self.engine, self.policy, self.faults = engine, policy, faults
        short = [replace(r.sampling, max_new_tokens=min(_NEW_TOKENS, r.sampling.max_new_tokens)) for r in requests]
        few = zip(requests[:_SAMPLED], short, strict=False)
        self._requests = [replace(request, sampling=sampling, arrival_s=0.0) for request, sampling in few]
        self._source = DamagingSource(meeting.folder)
        source = self._source if faults else None
        self._link = WeightLink(meeting, *block_layout(*policy.weight_blocks()), source=source)
        policy.new_memory = self._link.source.renew
        self._digests: dict[str | None, dict[str, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.engine.close()
        self._link.close()

    def first(self) -> SyncReport:
        """The engine's first weights. Raises WeightSyncError if they do not get there."""
        self._digests["0"] = self._digest()
        return self._link.sync("0", timeout_s=_TIMEOUT_S)

    def round(self, number: int, fault: Fault, phase: str, where: int) -> Round:
        """Train a step, send its weights under the fault, look at what is served, send them again without one."""
        began, row, before = time.monotonic(), Round(number, fault, phase), self.engine.serving()
        row.mismatched_tokens = self._train()
        version = f"{number} under {fault}"
        self._digests[version] = self._digest()
        plant = self._plant(row, where)
        self._link.watch = lambda entered: plant() if entered == phase else None
        deadlines = _IMPATIENT if fault == "engine stopped" else None
        outcome = self._link.attempt(version, timeout_s=_TIMEOUT_S, deadlines=deadlines)
        self._link.watch = lambda _: None
        row.witness = row.witness or self._source.witness
        row.outcome = _told(outcome)
        self._settle(row)
        row.served = self.engine.serving()
        expected = version if outcome.committed else before
        if fault == "engine killed":  # there is another one now, and nothing came to it yet
            row.whole = row.served is None
        else:
            row.whole = row.served == expected and self.engine.weights_digest() == self._digests[expected]
        row.next_ok = self._send(str(number))
        row.seconds = time.monotonic() - began
        return row

    def _digest(self) -> dict[str, str]:
        """The policy's weights, in the parts that the engine's ranks hold."""
        return self.policy.weights_digest(self.engine.config.tensor_parallel)

    def _train(self) -> int:
        """One optimizer step on fresh samples; returns how many of their tokens have other bits in training."""
        generations = self.engine.generate(self._requests, timeout_s=_TIMEOUT_S)
        found = compare(generations, score(self.policy, self._requests, generations))
        batch = PackedBatch.pack(self._requests, generations)
        self.policy.train_step([batch], lambda logprobs, _: -logprobs.mean())
        return found.mismatched_tokens

    def _send(self, version: str) -> bool:
        """A transfer without a fault; whether the engine then holds the policy's weights."""
        self._digests[version] = self._digest()
        outcome = self._link.attempt(version, timeout_s=_TIMEOUT_S)
        served = self.engine.serving()
        return outcome.committed and served == version and self.engine.weights_digest() == self._digests[version]

    def _plant(self, row: Round, where: int) -> Callable[[], None]:
        """Arm the fault; returns what is to be called when its phase begins."""
        if row.fault in get_args(Damage):
            self._source.plan(row.fault, where)  # type: ignore[arg-type]
        group = self.engine.process_group
        self._source.witness = ""

        def second() -> None:
            try:
                self._link.sender.sync("second")
            except WeightSyncError as error:
                row.witness = str(error)

        def killed() -> None:
            os.killpg(group, signal.SIGKILL)

        def stopped() -> None:
            os.killpg(group, signal.SIGSTOP)

        def nothing() -> None:
            if row.fault == "none":
                row.witness = "none was planted"

        acts = {"second sync": second, "engine killed": killed, "engine stopped": stopped}
        return acts.get(row.fault, nothing)

    def _settle(self, row: Round) -> None:
        """Take the witness of what happened to the engine's process, and get an engine that answers."""
        if row.fault == "engine stopped":
            row.witness = _process_state(self.engine.process_group, "T")
            os.killpg(self.engine.process_group, signal.SIGCONT)
        if row.fault == "engine killed":
            from zerokl.alignment.sglang.engine import RolloutEngine

            deadline = time.monotonic() + _SETTLE_S
            while self.engine.alive and time.monotonic() < deadline:
                time.sleep(0.05)
            row.witness = "" if self.engine.alive else "the process is gone"
            self.engine.close()
            self.engine = RolloutEngine(self.engine.config, start_timeout_s=_TIMEOUT_S)
        else:
            self._until_idle()

    def _until_idle(self) -> None:
        """An aborted attempt may still be undone when the coordinator has given up on it."""
        deadline = time.monotonic() + _SETTLE_S
        while not set(self.engine.state().split(", ")) <= {"idle", "quarantined"}:  # of each of its ranks
            if time.monotonic() > deadline:
                raise RunError(f"the engine is still in state {self.engine.state()} after {_SETTLE_S:g} s")
            time.sleep(0.05)


def run(runs: SyncRuns, syncs: int, seed: int, *, say: Callable[[str], None]) -> list[Round]:
    """``syncs`` rounds; every fault comes once before any comes twice."""
    rng, rounds = random.Random(seed), []
    drawn: list[Fault] = []
    say(str(runs.first()))
    say(_line(("round", "fault", "phase", "witness", "outcome", "served", "whole", "next", "mismatched")))
    for number in range(1, syncs + 1):
        if not drawn:
            drawn = list(FAULTS) if runs.faults else ["none"]
            rng.shuffle(drawn)
        row = runs.round(number, drawn.pop(), rng.choice(PHASES), rng.randrange(1 << 30))
        rounds.append(row)
        say(_line(cells(row)))
    return rounds


def cells(row: Round) -> tuple[str, ...]:
    """A round as a line of the table."""
    served = "nothing" if row.served is None else row.served
    return (
        str(row.number), row.fault, row.phase, row.witness[:44], row.outcome[:70], served,
        "yes" if row.whole else "NO", "yes" if row.next_ok else "NO", str(row.mismatched_tokens),
    )  # fmt: skip


def to_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    return [asdict(row) | {"ok": row.ok} for row in rounds]


def _line(texts: Sequence[str]) -> str:
    widths = (5, 14, 8, 44, 70, 22, 5, 4, 10)
    return "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip()


def _told(outcome: Outcome) -> str:
    if not outcome.committed:
        return f"aborted in {outcome.failed_in}: {outcome.cause}"
    lost = "; ".join(f"{name}: {why}" for name, why in outcome.lost.items())
    return f"committed, lost {lost}" if lost else "committed"


def _process_state(pid: int, expected: str) -> str:
    """What the kernel says of a process, if it is the expected state."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return f"the kernel: state {state}" if state == expected else ""
