"""Device memory shared between two processes: what the `cuda_ipc` transport rests on, checked on a GPU.

Needs weightsync's packages (msgspec, xxhash) beside torch.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch

NBYTES = 64 << 20


def problems() -> list[str]:
    """What is wrong: a second process opens this one's pool and must find its bytes there without copying them."""
    import msgspec

    from zerokl.weightsync.digest import tensor_digest
    from zerokl.weightsync.plan import Batch, Copy, Plan
    from zerokl.weightsync.transports.base import Job
    from zerokl.weightsync.transports.cuda_driver import CudaDriver
    from zerokl.weightsync.transports.cuda_ipc import CudaIpcSource, parse_export

    weights = torch.arange(NBYTES // 4, dtype=torch.int32).view(torch.uint8)
    copy = Copy("w", "w", 0, NBYTES, "w", 0, NBYTES, 1, NBYTES)
    job = Job(bytes(16), "v", Plan((Batch(0, 0, (copy,)),), ""), 0)
    source = CudaIpcSource(CudaDriver())
    said = source.prepare(job, {"w": weights.cuda()})
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_other, args=(said, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(120):
            return ["the other process does not answer"]
        digest, same_address, allocated = ours.recv()
    except EOFError:
        return ["the other process ended without an answer"]
    finally:
        child.kill()
        child.join()
        source.close()
    found = []
    if digest != tensor_digest(weights):
        found.append("the digest of the device, in the other process, is not the host's")
    if not same_address or allocated:
        found.append(f"the other process copied: {allocated} bytes allocated")
    if msgspec.msgpack.encode(parse_export(said)) != said:
        found.append("the export does not survive its own encoding")
    return found


def _other(said: bytes, pipe: Connection) -> None:
    """The other process: opens the pool, and digests it in place, on the device."""
    from zerokl.weightsync.device_digest import digests
    from zerokl.weightsync.transports.cuda_driver import CudaDriver
    from zerokl.weightsync.transports.cuda_ipc import parse_export

    driver, export = CudaDriver(), parse_export(said)
    before = torch.cuda.memory_allocated()
    pointer = driver.open(export.handle)
    offset, size = export.buffers["w"]
    weights = driver.view(pointer, export.nbytes)[offset : offset + size]
    same_address, allocated = weights.data_ptr() == pointer + offset, torch.cuda.memory_allocated() - before
    pipe.send((digests([weights.view(1, -1)])[0].hex(), same_address, allocated))
    del weights
    driver.close(pointer)
