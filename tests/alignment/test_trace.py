"""The comparator aligns chunks, decode steps and a packed forward by absolute position, and compares bits."""

import math
from types import SimpleNamespace

import pytest
import torch

from zerokl import kernels
from zerokl.alignment.recorder import Modules, Plant, Recorder
from zerokl.alignment.sglang.errors import UnsupportedError
from zerokl.alignment.sglang.tracing import attach
from zerokl.alignment.trace import Record, Step, TraceError, first_difference, read

EMBEDDING, LINEAR = Step(None, "embedding", 0, "y"), Step(0, "linear", 1, "y")
LOGITS = Step(None, "linear", 0, "y")


def values(tokens: int, width: int = 3, dtype=torch.bfloat16) -> torch.Tensor:
    """Every element of every token is a number of its own."""
    return (1 + torch.arange(tokens * width).view(tokens, width) / 128).to(dtype)


def record(positions, rows, side="engine") -> Record:
    return Record(torch.tensor(positions), rows, "op", f"{side}.module")


def chunks(rows: torch.Tensor, *cuts: int) -> list[Record]:
    """What an engine records that computes tokens up to each cut in one pass."""
    ends = [*cuts, len(rows)]
    return [record(list(range(a, b)), rows[a:b].clone()) for a, b in zip([0, *ends], ends, strict=False)]


def pair(tokens: int = 6):
    """A rollout in two chunks and two decode steps, and the trainer's one forward; equal."""
    rows = values(tokens)
    rollout = {step: chunks(rows, 2, 4, 5) for step in (EMBEDDING, LINEAR)}
    return rollout, {step: chunks(rows) for step in (EMBEDDING, LINEAR)}


def flip(trace, step, record_index, row, element):
    trace[step][record_index].values.view(torch.int16)[row, element] += 1


def test_equal_recordings_differ_nowhere_however_they_are_cut():
    assert first_difference(*pair()) is None
    rollout, trainer = pair()
    rollout[EMBEDDING].reverse()  # rows are placed by position, not by when they came
    assert first_difference(rollout, trainer) is None


@pytest.mark.parametrize(("piece", "row", "token"), [(0, 0, 0), (1, 1, 3), (2, 0, 4), (3, 0, 5)])
def test_one_bit_is_found_at_its_token_and_element(piece, row, token):
    rollout, trainer = pair()
    flip(rollout, LINEAR, piece, row, 2)
    found = first_difference(rollout, trainer)
    assert (found.step, found.token, found.element, found.width, found.differing) == (LINEAR, token, 2, 3, 1)
    assert found.trainer.number == values(6)[token, 2].item()
    assert int(found.rollout.bits, 16) == int(found.trainer.bits, 16) + 1
    assert found.trainer.bits == f"0x{int(values(6).view(torch.int16)[token, 2]):04x}"
    assert found.rollout.module == "engine.module"


def test_rows_one_token_late_are_no_match():
    rollout, trainer = pair()
    late = values(7)[1:]
    rollout[EMBEDDING] = chunks(late, 2, 4, 5)
    assert first_difference(rollout, trainer).token == 0


def test_the_first_step_comes_before_an_earlier_token_of_a_later_one():
    rollout, trainer = pair()
    flip(rollout, LINEAR, 0, 0, 0)
    flip(rollout, EMBEDDING, 3, 0, 1)
    found = first_difference(rollout, trainer)
    assert (found.step, found.token, found.element) == (EMBEDDING, 5, 1)
    # the order is the rollout's
    assert first_difference(dict(reversed(rollout.items())), trainer).step == LINEAR


def test_the_first_token_and_element_of_a_step():
    rollout, trainer = pair()
    for piece, row, element in [(3, 0, 0), (1, 0, 2), (1, 0, 1)]:
        flip(rollout, LINEAR, piece, row, element)
    found = first_difference(rollout, trainer)
    assert (found.token, found.element, found.differing) == (2, 1, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_differs_even_from_itself(value):
    rollout, trainer = pair()
    for side, piece, row in ((rollout, 1, 1), (trainer, 0, 3)):
        side[LINEAR][piece].values[row, 0] = value
    found = first_difference(rollout, trainer)
    assert (found.token, found.element) == (3, 0)
    assert found.rollout.bits == found.trainer.bits


def test_bits_are_compared_not_numbers():
    rollout, trainer = pair()
    rollout[LINEAR][0].values[0, 0] = -0.0
    trainer[LINEAR][0].values[0, 0] = 0.0
    found = first_difference(rollout, trainer)
    assert (found.rollout.bits, found.trainer.bits) == ("0x8000", "0x0000")


def test_the_head_is_compared_for_scored_tokens_only():
    logits = values(6, dtype=torch.float32)
    # chunks end at tokens 1 and 3, of which only the second is followed by a sampled token
    rollout = {LOGITS: [record([p], logits[p : p + 1].clone()) for p in (1, 3, 4, 5)]}
    trainer = {LOGITS: [record([3, 4, 5], logits[3:].clone())]}
    assert first_difference(rollout, trainer) is None
    trainer[LOGITS][0].values[1, 1] = 0
    assert first_difference(rollout, trainer).token == 4
    with pytest.raises(TraceError, match=r"linear:0.*tokens at \[3\]"):
        first_difference({LOGITS: [r for r in rollout[LOGITS] if int(r.positions) != 3]}, trainer)


def test_what_cannot_be_aligned_is_refused():
    rollout, trainer = pair()
    with pytest.raises(TraceError, match=r"the trainer lacks layer 0, linear:1, y"):
        first_difference(rollout, {EMBEDDING: trainer[EMBEDDING]})
    with pytest.raises(TraceError, match=r"the rollout lacks outside the layers, embedding:0, y"):
        first_difference({LINEAR: rollout[LINEAR]}, trainer)
    with pytest.raises(TraceError, match=r"only one side has the tokens at \[5\]"):
        first_difference({**rollout, LINEAR: rollout[LINEAR][:3]}, trainer)
    shifted = [record([p + 1 for p in r.positions.tolist()], r.values) for r in rollout[LINEAR]]
    with pytest.raises(TraceError, match=r"only one side has the tokens at \[0, 6\]"):
        first_difference({**rollout, LINEAR: shifted}, trainer)
    with pytest.raises(TraceError, match="the rollout computed a token twice"):
        first_difference({**rollout, LINEAR: [*rollout[LINEAR], rollout[LINEAR][2]]}, trainer)
    with pytest.raises(TraceError, match=r"width 3 in the rollout, .* of 2 in the trainer"):
        first_difference(rollout, {**trainer, LINEAR: [record(range(6), values(6)[:, :2])]})
    with pytest.raises(TraceError, match="float32"):
        first_difference(rollout, {**trainer, LINEAR: chunks(values(6).float())})


class Tiny(torch.nn.Module):
    """Two layers of a norm and two linears."""

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = values(4, 4)
            return kernels.linear(kernels.linear(kernels.rms_norm(x, w[0], 1e-5), w), w)

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Tiny.Layer(), Tiny.Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def recorded(folder, x, *, plant=None, **options):
    folder.mkdir()
    model = Tiny()
    with Modules(model) as modules:
        recorder = Recorder(folder, modules, plant=plant, **options)
        for position in range(0, len(x), 2):
            where = torch.arange(position, position + 2)
            recorder.begin(where, where[-1:])
            with recorder:
                model(x[where])
        recorder.finish()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return read(folder)


def test_a_recording_holds_every_output_by_layer_and_call(tmp_path):
    x = values(4, 4)
    trace = recorded(tmp_path / "a", x)
    assert list(trace) == [
        Step(layer, *rest) for layer in (0, 1) for rest in
        [("rms_norm", 0, "sum"), ("rms_norm", 0, "y"), ("linear", 0, "y"), ("linear", 1, "y")]
    ]  # fmt: skip
    assert [r.positions.tolist() for r in trace[Step(1, "linear", 0, "y")]] == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([r.values for r in trace[Step(0, "rms_norm", 0, "sum")]]), x)
    assert trace[Step(1, "linear", 0, "y")][0].module == "layers.1"


def test_a_planted_fault_is_one_ulp_where_it_was_wanted(tmp_path):
    x = values(4, 4)
    clean = recorded(tmp_path / "a", x)
    faulty = recorded(tmp_path / "b", x, plant=Plant("linear", 1, 3, call=1, element=2))
    found = first_difference(clean, faulty)
    assert (found.step, found.token, found.element) == (Step(1, "linear", 1, "y"), 3, 2)
    assert int(found.trainer.bits, 16) == int(found.rollout.bits, 16) + 1
    assert found.differing == 1


def test_columns_are_compared_in_the_order_asked_for(tmp_path):
    x, order = values(4, 4), torch.tensor([2, 0, 3, 1])
    step = Step(1, "linear", 1, "y")
    plain = recorded(tmp_path / "a", x)[step][1].values
    assert torch.equal(recorded(tmp_path / "b", x, columns={"layers.1": order})[step][1].values, plain[:, order])
    fault = Plant("linear", 1, 2, call=1, element=3)
    faulty = recorded(tmp_path / "c", x, columns={"layers.1": order}, plant=fault)
    changed = faulty[step][1].values.view(torch.int16) != plain[:, order].contiguous().view(torch.int16)
    assert torch.nonzero(changed).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("tokens", "message"), [(4, "'exp2' has no rule in a trace"), (3, "4 rows are not those of 3 tokens")]
)
def test_an_unknown_op_or_odd_rows_are_refused(tmp_path, tokens, message):
    with Modules(Tiny()) as modules:
        recorder = Recorder(tmp_path, modules)
        recorder.begin(torch.arange(tokens), torch.arange(tokens))
        with recorder, pytest.raises(TraceError, match=message):
            torch.ops.zerokl.exp2(torch.zeros(4), torch.zeros(4)) if tokens == 4 else Tiny()(values(4, 4))
    with pytest.raises(TraceError, match="holds no recording"):
        read(tmp_path)


def test_a_module_that_layers_share_is_named_below_the_layer_that_runs():
    model, shared, seen = torch.nn.Module(), torch.nn.Identity(), []
    model.layers = torch.nn.ModuleList([torch.nn.Sequential(shared), torch.nn.Sequential(shared)])
    with Modules(model) as modules:
        handle = shared.register_forward_pre_hook(lambda *_: seen.append((modules.layer, modules.path)))
        for layer in model.layers:
            layer(torch.zeros(1))
        handle.remove()
        assert (modules.layer, modules.path) == (None, "")
    assert seen == [(0, "layers.0.0"), (1, "layers.1.0")]


class Runner:
    """An SGLang runner, as far as a tracer goes: the sampler is one more op outside the layers."""

    def __init__(self) -> None:
        self.model = Tiny()
        inner = self.model.forward
        self.model.forward = lambda *args: inner(values(4, 4)[args[1]])
        self.sampler = SimpleNamespace(forward=lambda x: kernels.rms_norm(x, values(1, 4)[0], 1e-5))

    def run(self, *tokens: int, batch_size: int = 1) -> None:
        batch = SimpleNamespace(batch_size=batch_size)
        self.sampler.forward(self.model.forward(None, torch.tensor(tokens), batch))


def test_an_engines_passes_are_recorded_from_when_it_was_asked(tmp_path):
    runner = Runner()
    attach(runner)
    runner.run(0, 1)
    runner.run(0, batch_size=2)  # a batch is fine as long as nobody records
    runner.model.zerokl_tracer.start(str(tmp_path), {"op": "linear", "layer": 0, "token": 2, "call": 1, "element": 0})
    with pytest.raises(UnsupportedError, match="one request at a time, got 2"):
        runner.run(0, batch_size=2)
    runner.run(0, 1)
    runner.run(2)
    trace = read(tmp_path)
    assert [r.positions.tolist() for r in trace[Step(None, "rms_norm", 0, "y")]] == [[0, 1], [2]]
    clean = recorded(tmp_path / "clean", values(4, 4))
    ours, theirs = (t[Step(0, "linear", 1, "y")] for t in (trace, clean))
    assert int((ours[1].values.view(torch.int16) - theirs[1].values[:1].view(torch.int16)).sum()) == 1


def test_megatrons_columns_are_put_into_the_rollouts_order():
    """The columns of a model whose output column is its own number, through the weights' own conversion."""
    from zerokl.alignment.megatron.convert import hf_shapes, hf_to_megatron
    from zerokl.alignment.megatron.model_config import ModelConfig
    from zerokl.alignment.megatron.tracing import qkv_columns

    # 3 queries a key
    config = ModelConfig(
        "LlamaForCausalLM", 8, 16, 8, 1, 6, 2, 4, 64, 1e-5, 1e4, True, False, False, 4, False
    )  # 3 queries a key
    weights = {name: torch.zeros(shape) for name, shape in hf_shapes(config).items()}
    start = 0
    for name in "qkv":
        weight = weights[f"model.layers.0.self_attn.{name}_proj.weight"]
        weight.copy_(torch.arange(start, start + len(weight))[:, None])
        start += len(weight)
    fused = hf_to_megatron(config, weights)["decoder.layers.0.self_attention.linear_qkv.weight"][:, 0]
    assert fused[qkv_columns(config)].tolist() == list(range(start))
