"""Routing records: exact there and back, refused by the sample's name where they do not fit, consumed exactly once."""

import numpy as np
import pytest
import torch

from zerokl.alignment.routing import Router, RoutingError
from zerokl.alignment.routing_replay import Replay, check_record, join, pack, record_dtype, slab, unpack

ROUTER = Router(experts=8, top_k=3, first_layer=1, layers=3)  # one dense layer before two sparse ones
TOKENS = 5


def captured(router=ROUTER, tokens=TOKENS, seed=0):
    """What an engine captures: int32, every layer of the model, dense ones as zeros."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(router.experts)[: router.top_k] for _ in range(tokens * router.layers)]
    whole = np.array(rows, np.int32).reshape(tokens, router.layers, router.top_k)
    whole[:, : router.first_layer] = 0
    return whole


@pytest.mark.parametrize(("experts", "width"), [(8, 1), (256, 1), (257, 2), (512, 2)])
def test_a_record_keeps_the_sparse_layers_in_few_bytes(experts, width):
    router = Router(experts=experts, top_k=3, first_layer=1, layers=3)
    whole = captured(router)
    record = pack(whole.reshape(-1), router, TOKENS, "request 0")
    assert record.dtype == record_dtype(router)
    assert record.dtype.itemsize == width
    assert np.array_equal(record, whole[:, 1:])
    assert np.array_equal(unpack(record.tobytes(), router, TOKENS, "request 0"), record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-1], r"request 7: 36 expert indices were captured, \(5, 3, 3\) are needed"),
        (lambda c: np.where(c == c.max(), -1, c), "request 7: captured experts lie outside 0 to 7"),
        (lambda c: np.where(c == 7, 8, c), "request 7: captured experts lie outside 0 to 7"),
        (np.zeros_like, "request 7: the routing record names one expert twice"),
    ],
)
def test_a_capture_that_is_not_whole(change, message):
    with pytest.raises(RoutingError, match=message):
        pack(change(captured()), ROUTER, TOKENS, "request 7")


def test_bytes_of_another_length():
    data = pack(captured(), ROUTER, TOKENS, "request 1").tobytes()
    for broken in (b"", data[:-1], data + b"\0"):
        with pytest.raises(RoutingError, match=rf"request 1: a routing record of {len(broken)} bytes is not"):
            unpack(broken, ROUTER, TOKENS, "request 1")
    with pytest.raises(RoutingError, match="names expert 255 of 8"):
        unpack(b"\xff" + data[1:], ROUTER, TOKENS, "request 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "sample 3 has no routing record"),
        (lambda r: r[1:], r"sample 3: the routing record is uint8 \(4, 2, 3\), needs uint8 \(5, 2, 3\)"),
        (lambda r: r[:, :1], r"uint8 \(5, 1, 3\), needs"),
        (lambda r: r.astype(np.int64), "sample 3: the routing record is int64"),
        (lambda r: np.where(r == 7, np.uint8(8), r), "sample 3: the routing record names expert 8 of 8"),
        (lambda r: r[..., [0, 0, 1]], "sample 3: the routing record names one expert twice"),
    ],
)
def test_records_that_do_not_fit_name_their_sample(change, message):
    record = pack(captured(), ROUTER, TOKENS, "")
    check_record(record, ROUTER, TOKENS, "sample 3")
    with pytest.raises(RoutingError, match=message):
        check_record(change(record), ROUTER, TOKENS, "sample 3")


def test_a_slab_is_the_records_end_to_end():
    records = [pack(captured(tokens=n, seed=n), ROUTER, n, "") for n in (4, 1, 7)]
    whole = slab(records, [4, 1, 7])
    assert whole.shape == (12, 2, 3)
    assert np.array_equal(whole.numpy(), np.concatenate(records))
    assert slab([None, None], [3, 4]) is None
    with pytest.raises(RoutingError, match="sample 1 has no routing record"):
        slab([records[0], None], [4, 1])
    with pytest.raises(RoutingError, match="sample 2: a routing record of 7 tokens for 8 tokens"):
        slab(records, [4, 1, 8])
    with pytest.raises(RoutingError, match="sample 1: its routing record"):
        slab([records[0], records[1][:, :1]], [4, 1])


def test_turns_add_what_is_new_in_them():
    first, second = pack(captured(seed=1), ROUTER, TOKENS, ""), pack(captured(tokens=9, seed=2), ROUTER, 9, "")
    whole = join([first, second], [5, 9], "sample 4")
    assert np.array_equal(whole, np.concatenate([first, second[5:]]))  # the earlier turn sampled from its own
    assert join([None, None], [5, 9], "") is None
    assert np.shares_memory(join([first], [5], ""), first)
    with pytest.raises(RoutingError, match="sample 4, turn 1 has no routing record"):
        join([first, None], [5, 9], "sample 4")
    with pytest.raises(RoutingError, match="sample 4, turn 1: a routing record of 9 tokens for 8 tokens"):
        join([first, second], [5, 8], "sample 4")


def replay(**changes):
    options = {"tokens": TOKENS, "check": True} | changes
    return Replay(torch.from_numpy(pack(captured(), ROUTER, TOKENS, "")), ROUTER, **options)


def test_every_layer_takes_its_own_experts_once():
    run = replay()
    for layer in (1, 2):
        assert np.array_equal(run.take(layer).numpy(), captured()[:, layer])
    run.finish(1)
    with pytest.raises(RoutingError, match="layer 1 took its routing records 1 times, 2 expected"):
        run.finish(2)
    run.take(2)
    with pytest.raises(RoutingError, match="layer 2 took its routing records 2 times, 1 expected"):
        run.finish(1)


def test_a_layer_that_never_asked_is_found():
    run = replay()
    run.take(1)
    with pytest.raises(RoutingError, match="layer 2 took its routing records 0 times"):
        run.finish(1)


def test_tokens_are_counted_once_however_many_layers_differ():
    run = replay()
    live = torch.from_numpy(captured()).long()
    run.compare(1, live[:, 1])
    assert run.differing_tokens == 0
    swapped = live.clone()
    swapped[2] = swapped[2].flip(-1)  # the same experts in other slots: another order of addition
    for layer in (1, 2):
        run.compare(layer, swapped[:, layer])
    assert run.differing_tokens == 1
    run.compare(2, live[:, 2].roll(1, 0))
    assert run.differing_tokens == TOKENS


def test_a_rank_takes_the_records_of_its_layers_and_tokens():
    run = replay(layers=[0, 1], own=slice(2, 4))
    assert np.array_equal(run.take(1).numpy(), captured()[2:4, 1])
    run.finish(1)
    with pytest.raises(RoutingError, match=r"layer 2 asks for routing records, this rank holds \[1\]"):
        run.take(2)
    run.compare(1, torch.from_numpy(captured()[2:4, 1]).long().flip(0))
    assert run.differs.tolist() == [False, False, True, True, False]
    without = replay(layers=[0])  # a stage of dense layers only
    without.finish(1)


def test_a_slab_that_does_not_fit_the_micro_batch():
    with pytest.raises(RoutingError, match=r"routing records are \(5, 2, 3\), needs \(6, 2, 3\)"):
        replay(tokens=6)
    with pytest.raises(RoutingError, match="has no routing records"):
        Replay(None, ROUTER, TOKENS, check=False)
