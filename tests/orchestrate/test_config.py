"""A recipe is right as a whole or refused with every problem named."""

from pathlib import Path
from typing import get_args

import pytest

import zerokl
from zerokl.alignment.correction import Correction, Old, Outside
from zerokl.alignment.ratios import Level
from zerokl.orchestrate.config import CorrectionTable, load
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
     "train.warmup_steps=5", "model.name.x=3", "train.recompute=1", "rollout.engines=9", "cluster.address=host"],
)  # fmt: skip
def test_impossible_values_are_refused(recipe, change):
    with pytest.raises(UserError, match=change.split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1]):
        load(recipe(), [change])


def test_correction_is_off_unless_asked_for(recipe):
    assert load(recipe()).correction.settings() is None
    assert load(recipe(), ["correction.upper=2.0"]).correction.settings() is None
    on = load(recipe(), ["correction.enabled=true", "correction.level=sequence", "correction.upper=2"])
    assert on.correction.settings() == Correction(level="sequence", upper=2.0)


def test_every_choice_of_a_correction_is_a_value_of_the_recipe():
    for key, choices in (("old", Old), ("level", Level), ("outside", Outside)):
        assert get_args(CorrectionTable.model_fields[key].annotation) == get_args(choices)


def test_an_impossible_correction_is_listed_with_all_other_problems(recipe):
    with pytest.raises(UserError) as error:
        load(recipe(), ["correction.enabled=true", "correction.outside=mask", "correction.lower=-1.0", "run.seed=-1"])
    for part in ("correction: lower must lie in [0, 1]", "needs lower or upper", "run.seed", "2 problem"):
        assert part in str(error.value)
    # a mistake does not wait until the table is switched on
    for change in ("upper=0.5", "lower=nan", "upper=inf", "level=batch", "cap=2.0", "enabled=1"):
        with pytest.raises(UserError, match=change.split("=", maxsplit=1)[0]):
            load(recipe(), [f"correction.{change}"])


def test_broken_or_missing_file(recipe, tmp_path):
    with pytest.raises(UserError, match="not valid TOML"):
        load(recipe("[model"))
    with pytest.raises(UserError, match="cannot read the recipe"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize("path", sorted((Path(zerokl.__file__).resolve().parent.parent / "recipes").glob("*.toml")))
def test_shipped_recipes_are_valid(path):
    load(path)
