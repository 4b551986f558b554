"""The control: the same comparison with the engines' own kernels, on the trained model and the run's own prompts."""

from __future__ import annotations

from zerokl.alignment.verify import compare
from zerokl.orchestrate.actors import Actors, Places
from zerokl.orchestrate.files import write_json
from zerokl.orchestrate.preflight import Prepared
from zerokl.orchestrate.progress import Progress
from zerokl.orchestrate.report import CONTROL
from zerokl.orchestrate.run_folder import RunFolder
from zerokl.orchestrate.samples import Sample, plan


def measure(prepared: Prepared, folder: RunFolder, places: Places, progress: Progress) -> None:
    """Sample prompts of the last step with stock SGLang, score them with stock Megatron-Core, write control.json."""
    config = prepared.config
    progress.note("control: the same comparison with the engines' own kernels")
    tasks, requests = plan(config, prepared.source, prepared.tokenizer, config.train.steps)
    wanted = min(config.control.samples, len(requests))
    tasks, requests = tasks[:wanted], requests[:wanted]
    actors = Actors(config, folder.path / "model", places, progress.waiting, stock=True)
    generations = actors.wait(
        actors.rollout.generate.remote(requests, config.run.step_timeout_s), "the control's rollouts"
    )
    samples = [Sample(None, r, g) for r, g in zip(requests, generations, strict=True)]
    scored = actors.wait(actors.trainer.score.remote(samples), "the control's scores")
    actors.close()
    found = compare(generations, scored)
    write_json(folder.path / CONTROL, found.to_json())
    progress.note(
        f"control: {found.mismatched_tokens} of {found.tokens} tokens differ with stock kernels, "
        f"KL (k3) {found.kl.k3:.2e}"
    )
