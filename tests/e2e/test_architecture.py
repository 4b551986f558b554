"""An architecture from outside the package, through the public command: the example adds ERNIE 4.5."""

import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "ernie45.py"
SPEC = f"{EXAMPLE}:ERNIE_45"
RECIPE = """
[model]
name = "{model}"
{architecture}
[train]
steps = 1
[data]
source = "zerokl.orchestrate.data.reasoning_gym"
options = {{ task = "chain_sum" }}
[reward]
function = "zerokl.orchestrate.rewards.reasoning_gym"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import Ernie4_5Config

    from zerokl.orchestrate import tiny

    folder = tmp_path_factory.mktemp("ernie")
    tiny.write(Ernie4_5Config(use_bias=False, tie_word_embeddings=True, **tiny.SHAPE), folder, seed=0)
    config = json.loads((folder / "config.json").read_text())
    # transformers' class has another name than SGLang's
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Ernie4_5_ForCausalLM"]}))
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "word " * count}) + "\n" for count in (1, 7, 60)))
    return path


def test_the_example_agrees_bit_for_bit(zerokl, model, prompts, tmp_path):
    out = tmp_path / "out.json"
    done = zerokl("verify", "--model", model, "--architecture", SPEC, "--prompts", prompts, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["tokens"] > 0
    assert found["mismatched_tokens"] == 0
    assert found["manifest"]["ops"]["rotary"]["rollout_calls"] > 0


def test_an_architecture_that_is_not_the_models_is_refused(zerokl, model, prompts, tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(EXAMPLE.read_text().replace("interleaved_rotary=True", "interleaved_rotary=False"))
    done = zerokl("verify", "--model", model, "--architecture", f"{wrong}:ERNIE_45", "--prompts", prompts)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SGLang turns (dimensions, interleaved) = (64, True), the architecture says (64, False)" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "architecture Ernie4_5_ForCausalLM is not supported"),
        (("--architecture", f"{EXAMPLE}:ERNIE_46"), "has no 'ERNIE_46'"),
        (("--architecture", "json.dumps"), "json.dumps is a function, no zerokl.alignment.architectures.Architecture"),
    ],
)
def test_what_cannot_be_used_is_named(zerokl, model, options, message):
    done = zerokl("verify", "--model", model, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_recipe_names_it_relative_to_itself(zerokl, model, tmp_path):
    (tmp_path / "spec.py").write_text(EXAMPLE.read_text())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, architecture='architecture = "spec.py:ERNIE_45"'))
    done = zerokl("train", recipe, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f'architecture = "{tmp_path}/spec.py:ERNIE_45"' in done.stdout
