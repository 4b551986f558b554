"""Run by test_device_digest.py under TRITON_INTERPRET=1: digests of views of CPU memory, against xxhash."""

import torch
import xxhash

from zerokl.weightsync.device_digest import digests


def main() -> None:
    data = torch.randint(0, 256, (200_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    lengths = [1, 240, 241, 256, 319, 1023, 1024, 1025, 1088, 1089, 2048, 2049, 5000, 65537]
    views = [data[i : i + n].view(1, n) for i, n in enumerate(lengths)]  # at every offset within a word
    strided = [(3, 100, 131, 1), (10, 1000, 1001, 0), (7, 1024, 2048, 5), (2, 30, 40, 0), (300, 2, 3, 7)]
    views += [data.as_strided((rows, width), (pitch, 1), at) for rows, width, pitch, at in strided]
    for view, found in zip(views, digests(views), strict=True):
        expected = xxhash.xxh3_128_digest(view.contiguous().numpy().tobytes())
        assert found == expected, (tuple(view.shape), view.stride())
    assert digests([]) == []
    print(f"{len(views)} digests equal")


if __name__ == "__main__":
    main()
