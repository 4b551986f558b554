"""The control: the run's first step once more with the engines' own kernels, same weights, same prompts, same seeds."""

from __future__ import annotations

from zerokl.alignment.mismatch import gap
from zerokl.alignment.verify import compare
from zerokl.orchestrate.actors import Actors, Places
from zerokl.orchestrate.files import write_json
from zerokl.orchestrate.preflight import Prepared
from zerokl.orchestrate.progress import Progress
from zerokl.orchestrate.report import CONTROL
from zerokl.orchestrate.run_folder import RunFolder
from zerokl.orchestrate.samples import Sample, plan


def measure(prepared: Prepared, folder: RunFolder, places: Places, progress: Progress) -> None:
    """Sample the first step with stock SGLang, score it with stock Megatron-Core, write control.json.

    With the starting weights: a trained policy is nearly certain of its tokens, which hides differences.
    """
    config = prepared.config
    progress.note("control: the same comparison with the engines' own kernels")
    _, requests = plan(config, prepared.source, prepared.tokenizer, 1)
    requests = requests[: config.control.samples]
    actors = Actors(prepared, places, progress.waiting, stock=True)
    generations = actors.generate(requests, "the control's rollouts")
    samples = [Sample(None, r, g) for r, g in zip(requests, generations, strict=True)]
    scored = actors.wait(actors.trainer.score.remote(samples), "the control's scores")
    actors.close()
    found = compare(generations, scored)
    write_json(folder.path / CONTROL, found.to_json() | {"gap": gap(generations, scored).to_dict()})
    progress.note(
        f"control: {found.mismatched_tokens} of {found.tokens} tokens differ with stock kernels, "
        f"KL (k3) {found.kl.k3:.2e}"
    )
