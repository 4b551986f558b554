"""Run in a process of its own: `python trace_scenarios.py MODEL FOLDER`. Plants one ULP in every op of either side.

One engine and one policy; what each trace found goes to FOLDER/out.json.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from zerokl.alignment.megatron import tracing
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.recorder import Plant
from zerokl.alignment.sglang.engine import EngineConfig, RolloutEngine
from zerokl.alignment.trace import HEAD, Trace, first_difference, read
from zerokl.alignment.types import PackedBatch, Request, SamplingParams

CHUNK, PROMPT, NEW = 8, 19, 3  # three chunks, then decode steps
REQUEST = Request(tuple(range(5, 5 + PROMPT)), SamplingParams(max_new_tokens=NEW, seed=7, ignore_eos=True))


def plants(trace: Trace) -> list[Plant]:
    """One for every op of the trace, at tokens of every chunk and decode step in turn."""
    found = []
    last = {(step.layer, step.op, step.call): records for step, records in trace.items()}  # the main output is last
    for index, ((layer, op, call), records) in enumerate(last.items()):
        first = PROMPT - 1 if (layer, op) in HEAD else 0
        token = first + 4 * index % (PROMPT + NEW - 1 - first)
        found.append(Plant(op, layer, token, call, element=11 * index % records[0].values.shape[1]))
    return found


def main(model: str, folder: Path) -> None:
    count = 0

    def fresh() -> Path:
        nonlocal count
        count += 1
        (folder / str(count)).mkdir()
        return folder / str(count)

    policy = MegatronPolicy(model)
    config = EngineConfig(model, chunked_prefill_size=CHUNK, context_length=64, radix_cache=False, trace=True)
    with RolloutEngine(config, start_timeout_s=300) as engine:

        def rollout_trace(plant: Plant | None = None) -> tuple[Trace, PackedBatch]:
            where = fresh()
            engine.trace(where, plant)
            batch = PackedBatch.pack([REQUEST], engine.generate([REQUEST], timeout_s=120))
            return read(where), batch

        def trainer_trace(batch: PackedBatch, plant: Plant | None = None) -> Trace:
            where = fresh()
            tracing.record(policy, batch, where, plant)
            return read(where)

        def outcome(side: str, plant: Plant, a: Trace, b: Trace) -> dict:
            found = first_difference(a, b)
            return {"side": side, "plant": asdict(plant), "found": None if found is None else
                    asdict(found) | {"step": found.step._asdict()}}  # fmt: skip

        clean, batch = rollout_trace()
        theirs = trainer_trace(batch)
        found = [outcome("trainer", plant, clean, trainer_trace(batch, plant)) for plant in plants(theirs)]
        for plant in plants(clean):
            ours, sampled = rollout_trace(plant)
            found.append(outcome("rollout", plant, ours, trainer_trace(sampled)))
        again, batch = rollout_trace()
        result = {
            "clean": [first_difference(clean, theirs) is None, first_difference(again, trainer_trace(batch)) is None],
            "passes": len(clean[next(iter(clean))]),
            "ops": sorted({f"{step.op}" for step in clean}),
            "found": found,
        }
    (folder / "out.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
