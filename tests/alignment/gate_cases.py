"""Ranks of an engine stop for new weights and go on at the same step, whatever one of them gives up in between.

SGLang's scheduler is real in `test_tensor_parallel` and `test_sglang_engine`; here are only its loops, one thread each.
Run in a process of its own (`test_gate`): SGLang is imported with stand-ins for packages that have no CPU build.
"""

import threading
import time

import pytest

from zerokl.alignment.sglang import cpu_shims

cpu_shims.activate()

from zerokl.alignment.sglang.gate import Gate


class Scheduler:
    """What a gate asks of a scheduler; ``log`` holds what it was told."""

    idle_sleeper = None

    def __init__(self):
        self.log, self.waiting_queue, self.tp_worker = [], [], self

    def weight_update_runners(self):
        return []

    def is_fully_idle(self, **_):
        return True

    def pause_generation(self, request):
        self.log.append(request.mode)

    def continue_generation(self, _):
        self.log.append("go on")

    def record_weight_version_change(self, new_version):
        self.log.append(new_version)

    def flush_cache(self, **_):
        return True


class Ranks:
    """Two gates; the loops of their schedulers take every step together."""

    def __init__(self):
        self.gates, self.schedulers = [Gate(lambda _: None) for _ in range(2)], [Scheduler(), Scheduler()]
        self._barrier, self._said, self._over = threading.Barrier(2), [0, 0], False
        for rank, gate in enumerate(self.gates):
            gate._largest = lambda number, rank=rank: self._reduce(rank, number)
            threading.Thread(target=self._loop, args=(rank,), daemon=True).start()

    def _reduce(self, rank, number):
        self._said[rank] = number
        self._barrier.wait(30)
        found = max(self._said)
        self._barrier.wait(30)
        return found

    def _loop(self, rank):
        while not self._reduce(rank, int(self._over)):
            self.gates[rank]._before_requests(self.schedulers[rank])
            time.sleep(0.001)

    def close(self):
        self._over = True


@pytest.fixture
def ranks():
    made = Ranks()
    yield made
    made.close()


def test_a_rank_that_gives_up_leaves_no_other_waiting(ranks):
    """One rank was told to install a version when the transfer was given up; the other never was."""
    first, second = ranks.gates
    first.pause("retract")
    second.pause("retract")
    second.resume("old")
    installed = []
    first.run(lambda: installed.append("new"))
    first.run(lambda: installed.append("old"))
    first.resume("old")
    assert installed == ["new", "old"]
    for scheduler in ranks.schedulers:
        assert scheduler.log[-3:] == ["retract", "old", "go on"]


def test_one_that_still_has_to_put_back_the_old_weights_holds_the_other(ranks):
    first, second = ranks.gates
    for gate in ranks.gates:
        gate.pause("abort")
        gate.run(lambda: None)
    waiting = threading.Thread(target=second.resume, args=("old",))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert ranks.schedulers[1].log == ["in_place"]
    first.run(lambda: None)
    first.resume("old")
    waiting.join(30)
    assert [scheduler.log for scheduler in ranks.schedulers] == [["in_place", "old", "go on"]] * 2
