"""Which tiles a tuning run may choose: the fastest of the byte-equal ones, within its time."""

import importlib.util
import time

import pytest
import torch

from zerokl.bench.autotune import SHARED_MEMORY, candidates, choose, write_table
from zerokl.kernels.triton.linear_config import LinearConfig, linear_config

OUTPUT = torch.arange(8).bfloat16()
CONFIGS = [LinearConfig(16 << i, 64, 64, 1, 4, 2) for i in range(4)]


def seconds(config):
    return {16: 4.0, 32: 3.0, 64: 1.0, 128: 2.0}[config.block_m]


def outputs(config):
    """64 rows: one bit is off; 128 rows: does not fit."""
    if config.block_m == 128:
        return None
    output = OUTPUT.clone()
    output.view(torch.int16)[3] ^= config.block_m == 64
    return output


def test_the_fastest_of_the_equal_ones_wins():
    choice = choose(CONFIGS, outputs, seconds, time.monotonic() + 60)
    assert choice.config == CONFIGS[1]
    assert (choice.seconds, choice.heuristic_seconds) == (3.0, 4.0)
    assert choice.unequal == (CONFIGS[2],)


def test_time_is_kept():
    assert choose(CONFIGS, outputs, seconds, time.monotonic() - 1).config == CONFIGS[0]


def test_the_heuristic_must_fit():
    with pytest.raises(RuntimeError, match="heuristic's own tiles do not fit"):
        choose(CONFIGS, lambda _: None, seconds, time.monotonic() + 60)


@pytest.mark.parametrize("m", [1, 17, 64, 300, 4096])
def test_candidates_fit_the_chip_and_begin_with_the_heuristic(m):
    made = candidates(m, 4096)
    assert made[0] == linear_config(m, 4096, 1)
    assert len(made) == len(set(made)) > 20
    for c in made:
        assert c.num_stages * (c.block_m + c.block_n) * c.block_k * 2 <= SHARED_MEMORY
        assert c.block_m <= max(64, 2 * m)


def test_the_table_is_a_module_that_says_where_it_comes_from(tmp_path):
    table = {(64, 4096, 1024): CONFIGS[1], (1, 4096, 1024): CONFIGS[0]}
    write_table(table, "Some GPU, torch 1, triton 2.", tmp_path / "tuned.py")
    spec = importlib.util.spec_from_file_location("zerokl.kernels.triton.tuned_test", tmp_path / "tuned.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert table == module.LINEAR
    assert "Some GPU" in module.__doc__
