"""A recipe is right as a whole or refused with every problem named."""

from pathlib import Path

import pytest

import zerokl
from zerokl.orchestrate.config import load
from zerokl.orchestrate.errors import UserError

GOOD = """
[model]
name = "smollm2-135m"
[train]
steps = 4
learning_rate = 1e-6
[data]
source = "zerokl.orchestrate.data.reasoning_gym"
options = { task = "chain_sum" }
[reward]
function = "zerokl.orchestrate.rewards.reasoning_gym"
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text=GOOD):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_are_filled_in(recipe):
    config = load(recipe())
    assert config.train.steps == 4
    assert config.rollout.group_size == 8
    assert config.data.options == {"task": "chain_sum"}


def test_overrides_are_typed(recipe):
    config = load(
        recipe(),
        [
            "train.steps=9",
            "train.learning_rate=3e-6",
            "run.directory=runs/x",
            "data.options.size=3",
            "train.betas=[0.8, 0.9]",
        ],
    )
    assert (config.train.steps, config.train.learning_rate, config.run.directory) == (9, 3e-6, "runs/x")
    assert config.data.options == {"task": "chain_sum", "size": 3}
    assert config.train.betas == (0.8, 0.9)


def test_every_problem_is_listed_at_once(recipe):
    text = GOOD.replace("steps = 4", 'steps = "four"\nstep = 3').replace("1e-6", "-1.0") + "\n[rollouts]\nx = 1\n"
    with pytest.raises(UserError) as error:
        load(recipe(text), ["rollout.top_p=1.5", "nonsense", "rollout.group_size=1"])
    message = str(error.value)
    for part in ("train.steps", "train.step: unknown key", "train.learning_rate", "rollouts: unknown key",
                 "rollout.top_p", "rollout.group_size", "'nonsense'"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    "change",
    ["train.steps=1.5", "train.steps=true", "rollout.temperature=0", "rollout.temperature=nan", "run.seed=-1",
     "train.betas=[0.9, 1.0]", "data.template=none", "rollout.max_new_tokens=100000", "algorithm.name=ppo",
     "train.warmup_steps=5", "model.name.x=3", "train.recompute=1"],
)  # fmt: skip
def test_impossible_values_are_refused(recipe, change):
    with pytest.raises(UserError, match=change.split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1]):
        load(recipe(), [change])


def test_broken_or_missing_file(recipe, tmp_path):
    with pytest.raises(UserError, match="not valid TOML"):
        load(recipe("[model"))
    with pytest.raises(UserError, match="cannot read the recipe"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize("path", sorted((Path(zerokl.__file__).resolve().parent.parent / "recipes").glob("*.toml")))
def test_shipped_recipes_are_valid(path):
    load(path)
