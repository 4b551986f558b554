"""Sources answer the same index with the same task; bad files name the line."""

import json

import pytest

from zerokl.orchestrate.callables import load_callable
from zerokl.orchestrate.data import jsonl, read_jsonl, reasoning_gym
from zerokl.orchestrate.errors import UserError

EASY = {"task": "chain_sum", "min_terms": 2, "max_terms": 2, "max_digits": 1}


def test_reasoning_gym_depends_on_seed_and_index_only():
    first, again, other = reasoning_gym(3, **EASY), reasoning_gym(3, **EASY), reasoning_gym(4, **EASY)
    assert [first(i) for i in (5, 0, 1)] == [again(i) for i in (5, 0, 1)]
    prompts = [{source(i).prompt for i in range(40)} for source in (first, other)]
    assert prompts[0] != prompts[1]
    # neighbouring seeds are not the same list moved by one
    assert [first(i + 1).prompt for i in range(20)] != [other(i).prompt for i in range(20)]
    assert first(0).fields["expression"] in first(0).prompt
    assert "answer" in first(0).fields


def test_reasoning_gym_refuses_unknown_tasks_and_settings():
    with pytest.raises(UserError, match="no_such_task"):
        reasoning_gym(0, task="no_such_task")
    with pytest.raises(UserError, match="chain_sum"):
        reasoning_gym(0, task="chain_sum", terms=2)


def test_jsonl_visits_every_task_once_a_pass(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "answer": str(i)}) for i in range(7)) + "\n\n")
    source, again = jsonl(1, path=str(path)), jsonl(1, path=str(path))
    first = [source(i).prompt for i in range(7)]
    second = [source(i).prompt for i in range(7, 14)]
    assert sorted(first) == sorted(second) == [f"p{i}" for i in range(7)]
    assert first != second
    assert second == [again(i).prompt for i in range(7, 14)]
    assert source(0).fields["answer"] == source(0).prompt[1:]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not valid JSON"),
        ("3", "not a JSON object"),
        ("{}", "either prompt or input_ids"),
        ('{"prompt": "x", "input_ids": [1]}', "either prompt or input_ids"),
        ('{"prompt": ""}', "non-empty"),
        ('{"prompt": []}', "chat messages"),
        ('{"prompt": [{"role": "user"}]}', "chat messages"),
        ('{"input_ids": []}', "non-empty list"),
        ('{"input_ids": [1, -1]}', "non-empty list"),
        ('{"input_ids": [true]}', "non-empty list"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, why):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=why) as error:
        read_jsonl(path)
    assert "line 3" in str(error.value)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_callables_by_path_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(task, response, *, scale=1.0):\n    return scale * len(response)\n")
    mine = load_callable("mine.py:reward", positional=2, options={"scale": 2.0}, base=tmp_path)
    assert mine(None, "abc") == 6.0
    assert load_callable("math.sqrt", positional=1, options={}, base=tmp_path)(4.0) == 2.0


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("mine.py:reward", {"scael": 1}, "scael"),
        ("mine.py:absent", {}, "absent"),
        ("nowhere.py:reward", {}, "no file"),
        ("broken.py:reward", {}, "failed"),
        ("no.such.module.f", {}, "no module named"),
        ("math.nothing", {}, "nothing"),
        ("math.pi", {}, "not callable"),
        ("sqrt", {}, "dotted path"),
    ],
)
def test_bad_callables_are_refused(tmp_path, name, options, why):
    (tmp_path / "mine.py").write_text("def reward(task, response): return 1.0\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=why):
        load_callable(name, positional=2, options=options, base=tmp_path)
