"""A trainer and engines that transfer weights, in this process or in processes of their own."""

import threading
import time

import engines
import numpy as np
import torch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.model_shape import ModelShape
from zerokl.weightsync.protocol import Deadlines
from zerokl.weightsync.quantised import quantise, receiving_layout, sending_layout
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout

ONE, ONE_ENGINE = MegatronSizes(), SglangSizes()
TOKEN = bytes(range(32))
MODEL = ModelShape(
    vocabulary=76, hidden=24, ffn=16, layers=2, heads=8, kv_heads=4, head_dim=6, tied=True, qkv_bias=True, qk_norm=True
)
QUICK = Deadlines(plan=10, prepare=10, transfer=10, verify=10, commit=10, resume=10, abort=5)


class Engine:
    """Keeps what it was given and every call, and looks into its weights only when asked."""

    def __init__(self):
        self.calls, self.version, self.buffers, self.running, self.in_flight = [], None, {}, False, None

    def pause(self, in_flight):
        self.in_flight = in_flight
        self.calls.append("pause")
        self.running = False

    def install(self, version, buffers):
        self.calls.append(f"install {version}")
        self.version, self.buffers = version, dict(buffers)

    def restore(self, version, buffers):
        self.calls.append(f"restore {version}")
        self.version, self.buffers = version, dict(buffers)

    def resume(self, version):
        self.calls.append(f"resume {version}")
        assert version == self.version
        self.running = True

    def holds(self, expected):
        return self.buffers.keys() == expected.keys() and all(
            np.array_equal(self.buffers[name].numpy(), x) for name, x in expected.items()
        )


def trainer_buffers(model, sizes, rank, seed):
    held = engines.megatron_rank(model, engines.values(model, seed), sizes, rank)
    return {n: torch.from_numpy(x) for n, x in engines.memory(held, megatron_layout(model, sizes).ranks[rank]).items()}


def engine_buffers(model, sizes, rank, seed):
    held = engines.sglang_rank(model, engines.values(model, seed), sizes, rank)
    return engines.memory(held, sglang_layout(model, sizes).ranks[rank])


def in_form(form, left, right):
    """Both sides' layouts, quantised if there is a form."""
    return (left, right) if form is None else (sending_layout(left, form), receiving_layout(right, form))


def blank(layout):
    return [{name: torch.zeros(n, dtype=torch.uint8) for name, n in rank.buffers.items()} for rank in layout.ranks]


def write(source, values):
    """A version as a trainer makes it: in the memory that its transport has for it, or else in memory of its own."""
    memory = source.renew()
    if memory is None:
        source.buffers = values
        return
    for name, value in values.items():
        memory[name].copy_(value)


class Parties:
    """All participants as threads of this process, for one model and one transport."""

    def __init__(self, folder, sources, targets, *, trainer=ONE, rollout=ONE_ENGINE, model=MODEL, **options):
        folder.chmod(0o700)
        self.model, self.trainer, self.rollout = model, trainer, rollout
        address = folder / "s"
        self.form = options.pop("form", None)
        left, right = in_form(self.form, megatron_layout(model, trainer), sglang_layout(model, rollout))
        in_place = blank(right) if options.pop("in_place", False) else [None] * len(targets)
        deadlines = options.pop("deadlines", QUICK)
        self.sender = WeightSender(
            address, TOKEN, sources=len(sources), receivers=len(targets), deadlines=deadlines, **options
        )
        self.engines = [Engine() for _ in targets]
        self.sources = [WeightSource(address, TOKEN, left, i, t) for i, t in enumerate(sources)]
        self.receivers = [
            WeightReceiver(address, TOKEN, right, i, t, e, in_place=own)
            for i, (t, e, own) in enumerate(zip(targets, self.engines, in_place, strict=True))
        ]
        for member in self.sources + self.receivers:
            member.start()
        self.sender.wait(30)

    def load(self, seed):
        for rank, source in enumerate(self.sources):
            held = trainer_buffers(self.model, self.trainer, rank, seed)
            if self.form is not None:
                held = quantise(megatron_layout(self.model, self.trainer), rank, held, self.form)
            source.buffers = held

    def sync(self, version, seed):
        self.load(seed)
        return self.sender.sync(version)

    def all_hold(self, seed):
        return all(
            engine.holds(engine_buffers(self.model, self.rollout, rank, seed))
            for rank, engine in enumerate(self.engines)
        )

    def serving(self):
        return [receiver.serving for receiver in self.receivers]

    def close(self):
        self.sender.close()
        for member in self.sources + self.receivers:
            member.close()


def eventually(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.01)
