"""What an entry of `reward_funcs` may be, and what is said of one that leads nowhere."""

import functools
import importlib
import sys

import pytest

from fastgrpo import rewards
from fastgrpo.rewards import Judges, names, tag_count


def test_the_forms_of_a_name_and_a_function(tmp_path, monkeypatch, judge):
    monkeypatch.chdir(tmp_path)
    for name in ("fastgrpo_rewards_mine", "mine", "package.inner"):  # of other tests
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: 'int'\n"
        "def length(completions, **columns):\n    return [Point(len(c)).x for c in completions]\n"
        "def twice(completions, **columns):\n    return [2 * len(c) for c in completions]\n"
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text(
        "def thrice(completions, **columns):\n    return [3 * len(c) for c in completions]\n"
    )
    # The console script has no working directory on its path, and TRL's command line adds it.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])

    def sevens(completions, **columns):
        return [7] * len(completions)

    entries = ["format", "mine.py:length", "mine:twice", "package.inner.thrice"]
    entries += ["fastgrpo.rewards:tag_count", sevens]
    judges, score = judge(*entries, reward_weights=[1, 0.5, 2, 3, 4, 5])
    assert judges.names == ["format", "length", "twice", "thrice", "tag_count", "sevens"]
    assert judges.weights == [1.0, 0.5, 2.0, 3.0, 4.0, 5.0]
    # Ours are called in this process, the user's in their own.
    assert judges.functions == {0: rewards.format, 4: tag_count}
    assert score().rewards_BK.tolist() == [[0, 1, 2, 3, 0, 7], [0, 3, 6, 9, 0, 7]]
    assert sys.modules.keys().isdisjoint({"mine", "fastgrpo_rewards_mine", "package.inner"})


@pytest.mark.parametrize("reward_timeout", [None, 60.0])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("acuracy", ValueError, "'acuracy', did you mean 'accuracy'.*module:function.*path.py:fun"),
        ("tags", ValueError, "did you mean 'tag_count'"),
        ("<object mine>", ValueError, "'<object mine>' was a Python object in the run .* name it"),
        (":accuracy", ValueError, "unknown reward function ':accuracy'"),
        ("no_such.py", ValueError, "unknown reward function 'no_such.py'"),
        ("no_such_module_:f", ModuleNotFoundError, "no module 'no_such_module_'"),
        ("no.such.module_.f", ModuleNotFoundError, "no module 'no.such.module_'"),
        ("fastgrpo.no_such:f", ModuleNotFoundError, "no module 'fastgrpo.no_such'"),
        ("no_such.py:f", FileNotFoundError, "no file 'no_such.py'"),
        ("json:f", ValueError, "'json' has no function 'f'"),
        ("fastgrpo.rewards:BUILT_IN", ValueError, "has no function 'BUILT_IN'"),
    ],
)
def test_names_that_lead_nowhere(name, error, message, reward_timeout):
    with pytest.raises(error, match=message):
        Judges([name], reward_timeout=reward_timeout)


@pytest.mark.parametrize("reward_timeout", [None, 60.0])
def test_a_module_that_cannot_be_imported_says_where(write, reward_timeout):
    missing = write("import no_such_dependency_\n") + "f"
    with pytest.raises(ValueError, match=r"No module named 'no_such_dependency_', at .*mine.py:1"):
        Judges([missing], reward_timeout=reward_timeout)
    broken = write("x = 1\ny = x / 0\n") + "f"
    with pytest.raises(
        ValueError, match=r"raised ZeroDivisionError: .*, at .*mine.py:2 in <module>: y = x / 0"
    ):
        Judges([broken], reward_timeout=reward_timeout)


def test_a_module_on_the_path_of_this_process_is_found(tmp_path, monkeypatch, judge):
    (tmp_path / "elsewhere_.py").write_text("def f(**c):\n    return [1, 2]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    _, score = judge("elsewhere_:f")
    assert score().rewards_BK.tolist() == [[1], [2]]


def test_weights_and_names_must_fit():
    with pytest.raises(ValueError, match="1 entries for 2 reward_funcs"):
        Judges(["accuracy", "format"], [1.0])
    with pytest.raises(ValueError, match=r"accuracy, accuracy.*a name of its own"):
        Judges(["accuracy", "fastgrpo.rewards:accuracy"])
    with pytest.raises(ValueError, match=r"reward_timeout: must be above 0 seconds.*got 0"):
        Judges(["accuracy"], reward_timeout=0)


def test_closures_partials_and_objects_go_to_their_process(judge):
    factor = 3

    def closure(completions, **columns):
        return [factor * len(c) for c in completions]

    def power(completions, exponent, **columns):
        return [len(c) ** exponent for c in completions]

    class Scaled:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, completions, **columns):
            return [self.factor * len(c) for c in completions]

    judges, score = judge(closure, functools.partial(power, exponent=2), Scaled(5))
    assert judges.names == ["closure", "power", "Scaled"]
    assert judges.functions == {}
    assert score().rewards_BK.tolist() == [[3, 1, 5], [9, 9, 15]]


def test_what_cannot_be_written_down_is_refused_with_a_remedy(judge):
    stream = open(sys.executable, "rb")  # noqa: SIM115
    generator = (x for x in stream)

    def holds(completions, **columns):
        return [0.0 if generator else 1.0 for _ in completions]

    with pytest.raises(ValueError, match=r"'holds' cannot be sent .*path.py:function.*null"):
        Judges([holds])
    _, score = judge(holds, reward_timeout=None)
    assert score().rewards_BK.tolist() == [[0], [0]]
    stream.close()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("accuracy_reward", "accuracy"),
        ("reasoning_accuracy_reward", "accuracy"),
        ("think_format_reward", "format"),
        ("get_soft_overlong_punishment", "soft_overlong_punishment"),
    ],
)
def test_names_of_trl_without_trl_name_what_is_nearest(monkeypatch, name, nearest):
    monkeypatch.setattr(names, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"{name!r} is TRL's.*pip install trl.*{nearest!r}"):
        Judges([name])
