"""Each warning comes exactly where it is due, and none in a healthy run."""

import json
import math
import random
import re
from pathlib import Path

import pytest

from fastgrpo.config import config_from
from fastgrpo.health import RULES, Health
from fastgrpo.history import deviation

DIFFERENCE = "sampling/sampling_logp_difference/mean"
HEALTHY = Path(__file__).parent / "healthy_run.json"


def config(**values):
    return config_from({"task": "arithmetic", **values})


def steps(count, fresh=True, **columns):
    """Make steps of a healthy run, with some metrics as given: a value, or a function of i."""
    noise = random.Random(0)
    rows = []
    for i in range(1, count + 1):
        row = {
            "step": i,
            "loss": 0.01,
            "reward": 0.5 + 0.002 * i + noise.gauss(0, 0.03),
            "rewards/right/mean": 0.4 + 0.002 * i + noise.gauss(0, 0.03),
            "rewards/tidy/mean": 0.9 + noise.gauss(0, 0.01),
            "frac_reward_zero_std": 0.25,
            "advantages/std": 0.9,
            "entropy": 0.4 + noise.gauss(0, 0.02),
            "kl": 0.01 + 0.0001 * i,
            "grad_norm": 1 + noise.gauss(0, 0.1),
            "learning_rate": 1e-6,
            "completions/clipped_ratio": 0.1,
            DIFFERENCE: 0.01,
        }
        given = {name.replace("__", "/"): value for name, value in columns.items()}
        row |= {n: value(i) if callable(value) else value for n, value in given.items()}
        rows.append(row)
    return rows


def said(rows, fresh=True, **values):
    """Return each warning and the step it came at."""
    health = Health(config(**values))
    return [
        (row["step"], text)
        for row in rows
        for text in health.warnings(row, fresh=fresh(row["step"]) if callable(fresh) else fresh)
    ]


def only(found, at, *parts):
    """Assert that there is one warning, at a step, with all of the parts."""
    assert [step for step, _ in found] == [at], found
    for part in ("warning: ", *parts):
        assert part in found[0][1], found[0][1]


def test_the_demo_is_healthy():
    """150 real steps of configs/demo_arithmetic.yaml; KL goes to 0.2 as the reward rises."""
    run = json.loads(HEALTHY.read_text())
    rows = [dict(zip(run["names"], row, strict=True)) for row in run["steps"]]
    ((step, text),) = said(rows)
    assert step == 7 and text.startswith("note: a loss near 0 (7.4e-05) is no error")


def test_the_steps_that_other_tests_start_from_are_healthy():
    assert said(steps(300)) == []
    assert said([{"step": 0, "eval_reward": 0.0}, *steps(3)]) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_names_its_source_or_says_that_it_has_none(rule):
    source = r"arxiv\.org/abs/\d{4}\.\d{5}|[\w-]+#\d+"  # a paper, or an issue of a project
    assert re.search(rf"{source}|No source: ", rule.__doc__)


@pytest.mark.parametrize("size", [8, 16, 32, 256])
def test_prompts_of_all_difficulties_are_healthy(size):
    """Of prompts whose solve rates are Beta(0.6, 0.6) a third of the groups of 8 are silent.

    TRL's default batch is one such group: its share of silent groups is 0 or 1 at every step.
    """
    for seed in range(20):
        draw, rows = random.Random(seed), []
        for step in range(1, 201):
            rates = [draw.betavariate(0.6, 0.6) for _ in range(size // 8)]
            groups = [[draw.random() < rate for _ in range(8)] for rate in rates]
            silent = sum(len(set(group)) == 1 for group in groups) / len(groups)
            mean = sum(map(sum, groups)) / size
            row = {
                "step": step,
                "loss": draw.gauss(0, 0.05),
                "reward": mean,
                "rewards/right/mean": mean,
                "frac_reward_zero_std": silent,
                "grad_norm": 0.0 if silent == 1 else abs(draw.gauss(0.5, 0.1)),
                "entropy": None if silent == 1 else 0.4,
                "kl": 0.001,
                "learning_rate": 1e-6,
                "completions/clipped_ratio": 0.0,
            }
            rows.append(row)
        found = said(rows, per_device_train_batch_size=size, num_generations=8)
        assert [text for _, text in found if not text.startswith("note: ")] == []


def test_a_sampler_with_other_weights_is_told_of_when_the_samples_are_fresh():
    rows = steps(5, **{DIFFERENCE: lambda i: [0.05, 0.3, math.nan, 0.3, 0.4][i - 1]})
    found = said(rows, fresh=lambda step: step != 2)
    only(found, 4, "log-probs in training are 0.3 from those of the sampler")


def test_metrics_that_a_step_has_no_values_for():
    """Of a step without signal; a gradient that is no number stops the run by itself."""
    assert said(steps(9, entropy=math.nan, kl=None)) == []
    assert said([{"step": 1, "loss": None, "grad_norm": None}, {"step": 2}]) == []


def test_gradients_that_explode():
    grows = lambda first: lambda i: 1.0 if i < first else 11.0  # noqa: E731
    only(said(steps(60, grad_norm=grows(40))), 44, "above 11", "before it was 1", "learning_rate")
    assert said(steps(60, grad_norm=lambda i: 50.0 if i % 4 == 0 else 1.0)) == []  # spikes
    assert said(steps(24, grad_norm=grows(20))) == []  # too early to tell
    assert said(steps(60, grad_norm=lambda i: 0.0 if i < 40 else 1.0)) == []  # had no signal
    # Every fourth step has no signal: 29 of 39 had one, then the 5th with one is step 46.
    gaps = lambda i: 0.0 if i % 4 == 0 else grows(40)(i)  # noqa: E731
    only(said(steps(60, grad_norm=gaps)), 46, "above 11", "before it was 1")


def test_a_learning_rate_of_0():
    only(said(steps(9, learning_rate=0.0)), 2, "learning_rate is 0", "warmup_steps")
    assert said(steps(9, learning_rate=lambda i: (i - 1) * 1e-6)) == []  # the start of a warm-up


def test_a_loss_near_0_is_explained_once_and_early():
    assert [step for step, _ in said(steps(20, loss=-1e-8))] == [1]
    assert said(steps(20, loss=lambda i: 1e-8 if i > 10 else 0.01)) == []
    assert said(steps(20, loss=1e-8), fresh=False) == []  # the policy has moved: it says something
    assert said(steps(9, loss=0.0, grad_norm=0.0)) == []  # there was nothing to learn


def test_importance_ratios_far_from_1():
    name = "sampling__importance_sampling_ratio__mean"
    for value in (0.85, 1.2):
        only(said(steps(30, **{name: value})), 10, f"was {value:.2f}", "vllm_importance_sampling")
    assert said(steps(30, **{name: lambda i: 0.95 if i % 2 else 1.06})) == []
    assert said(steps(9, **{name: 0.5})) == []


def test_steps_that_are_mostly_clipped():
    for name in ("clip_ratio__region_mean", "cispo_clip_ratio"):
        only(said(steps(30, **{name: 0.35})), 10, "was 35%", "learning_rate", "num_iterations")
        assert said(steps(30, **{name: 0.25})) == []


def test_no_group_with_a_signal():
    groups = lambda count: {"per_device_train_batch_size": 4 * count, "num_generations": 4}  # noqa: E731
    share = lambda i: 1.0 if i in (1, 2, 4, 5, 6) else 0.25  # noqa: E731
    rows = steps(9, frac_reward_zero_std=share, reward=0.125)
    only(
        said(rows, **groups(8)), 6, "last 3 batches", "mean reward 0.125", "dynamic_sampling: true"
    )
    assert "set dynamic_sampling" not in said(rows, **groups(8), dynamic_sampling=True)[0][1]
    # A generation that serves several steps counts once.
    fresh = {"fresh": lambda step: step % 2 == 1}
    assert said(steps(4, frac_reward_zero_std=1.0), **fresh, **groups(8)) == []
    # 24 groups without a signal, in however many batches they come.
    silent = steps(30, frac_reward_zero_std=1.0)
    for at, values in (
        (24, groups(1)),
        (12, groups(2)),
        (5, groups(5)),
        (3, groups(64)),
        (6, groups(2) | {"steps_per_generation": 2}),
    ):
        only(said(silent, **values), at, f"every group of the last {at} batches")


def test_few_groups_with_a_signal():
    only(said(steps(60, frac_reward_zero_std=0.85)), 20, "85% of groups", "num_generations")
    assert said(steps(60, frac_reward_zero_std=0.75)) == []
    assert said(steps(19, frac_reward_zero_std=0.85)) == []


def test_the_spread_of_advantages_counts_where_it_is_not_made_1():
    none = {"scale_rewards": "none"}
    weak, noisy = steps(30, advantages__std=0.05), steps(30, advantages__std=0.7)
    only(said(weak, **none), 10, "advantages/std was 0.05", "scale_rewards: group")
    only(said(noisy, **none), 10, "advantages/std was 0.7", "more than rewards from 0 to 1")
    for values in (
        {"scale_rewards": "group"},
        {"scale_rewards": "batch"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ):
        assert said(weak, **values) == said(noisy, **values) == []
    assert said(steps(30, advantages__std=0.3), **none) == []


def test_kl_at_the_first_step():
    only(said(steps(5, kl=0.06)), 1, "kl is 0.06 at the first step", "disable_dropout: true")
    assert said(steps(5, kl=lambda i: 0.04 if i == 1 else 0.2)) == []
    assert said(steps(5, kl=0.06)[1:]) == []  # a run that was resumed


def test_kl_that_buys_nothing():
    drifts = {"kl": lambda i: 0.2 if i > 1 else 0.0}
    level = random.Random(1)
    flat = steps(100, reward=lambda i: 0.5 + level.gauss(0, 0.03), **drifts)
    only(said(flat), 60, "kl was 0.2", "raise beta")
    assert said(steps(100, **drifts)) == []  # the reward rises
    assert said(flat[:59]) == []
    plateau = steps(300, reward=lambda i: min(0.5 + 0.01 * i, 0.9), **drifts)
    assert said(plateau) == []  # it has bought what there was


def test_kl_that_breaks_away():
    jumps = lambda first: lambda i: 0.05 if i < first else 2.0  # noqa: E731
    only(said(steps(50, kl=jumps(30))), 32, "kl has been above 2", "before it was 0.05")
    assert said(steps(50, kl=lambda i: 5.0 if i % 10 == 0 else 0.05)) == []  # spikes
    assert said(steps(50, kl=lambda i: 0.01 * i)) == []


def change(start, end, first=0, last=100):
    """Return a course from one value to another, with the noise of a batch."""
    noise = random.Random(start)

    def value(i):
        share = min(max((i - first) / (last - first), 0.0), 1.0)
        return start + (end - start) * share + noise.gauss(0, 0.03)

    return value


def test_a_format_that_is_learned_at_the_cost_of_the_answer():
    right, tidy = "rewards__right__mean", "rewards__tidy__mean"
    found = said(steps(100, **{right: change(0.5, 0.2), tidy: change(0.2, 0.9)}))
    only(found, 60, "right fell from 0.4", "while tidy rose from 0.2", "reward_weights")
    late = steps(400, **{right: change(0.5, 0.2, 250, 350), tidy: change(0.2, 0.9, 250, 350)})
    assert 250 < said(late)[0][0] < 350
    for healthy in (
        {right: change(0.2, 0.5), tidy: change(0.2, 0.9)},  # both are learned
        {right: change(0.2, 0.5), tidy: change(0.9, 0.5)},  # brevity for the answer: as it should
        {right: change(0.5, 0.2), tidy: change(0.9, 0.9)},  # a bad run, but no trade
        {right: change(0.3, 0.3), tidy: change(0.2, 0.98)},  # the format first
    ):
        assert said(steps(400, **healthy)) == []


def test_chance_is_no_trade():
    for seed in range(4):
        noise = random.Random(seed)
        rows = steps(
            400,
            rewards__right__mean=lambda i, noise=noise: 0.5 + noise.gauss(0, 0.1),
            rewards__tidy__mean=lambda i, noise=noise: 0.5 + noise.gauss(0, 0.1),
        )
        assert said(rows) == []


def test_an_answer_that_is_never_right():
    found = said(steps(60, rewards__right__mean=0.0))
    only(found, 40, "right has been 0", "only tidy is learned", "max_completion_length")
    assert said(steps(60, rewards__right__mean=lambda i: 0.1 if i % 30 == 0 else 0.0)) == []
    assert said(steps(60, rewards__tidy__mean=0.0)) == []  # a punishment that is never due


def test_an_entropy_that_collapses():
    fall = lambda end: lambda i: 0.4 if i <= 30 else end  # noqa: E731
    found = said(steps(60, entropy=fall(0.03)))
    only(found, 40, "in the first 10", "0.4", "epsilon_high", "entropy_coef")
    assert said(steps(60, entropy=fall(0.05))) == []  # an eighth
    low = lambda end: lambda i: 0.016 if i <= 30 else end  # noqa: E731
    only(said(steps(60, entropy=low(0.0075))), 40, "0.0075 nats")  # below 0.01, and below a half
    assert said(steps(60, entropy=low(0.009))) == []  # less than a half is lost
    assert said(steps(60, entropy=0.008)) == []  # there from the start
    gaps = steps(60, entropy=lambda i: math.nan if i % 2 else 0.4)  # steps without signal
    assert said(gaps) == []


def test_completions_that_are_all_cut_off():
    rows = steps(9, completions__clipped_ratio=lambda i: 1.0 if i > 3 else 0.9)
    only(said(rows, max_completion_length=64), 6, "max_completion_length = 64")
    masked = said(rows, mask_truncated_completions=True)
    only(masked, 6, "with mask_truncated_completions none is trained on")


@pytest.mark.parametrize("what", ["exceptions", "timeouts", "invalid"])
def test_reward_functions_that_keep_failing(what):
    name = f"rewards__tidy__{what}"
    found = said(steps(30, **{name: lambda i: i // 2}))
    only(found, 6, f"tidy had 3 {what}{' results' if what == 'invalid' else ''} in 6 batches")
    assert ("reward_timeout" in found[0][1]) == (what == "timeouts")
    assert said(steps(60, **{name: lambda i: 1 + i // 20})) == []  # rare: each kind was told of


def test_each_is_said_once_even_if_it_comes_back():
    comes_and_goes = lambda i: 1.0 if i // 10 % 2 == 0 else 0.25  # noqa: E731
    assert len(said(steps(100, completions__clipped_ratio=comes_and_goes))) == 1


def test_deviations_are_standard_errors():
    # Two samples of variance 2 and 8: the error is sqrt(2 / 2 + 8 / 2).
    assert deviation([1.0, 3.0], [5.0, 9.0]) == pytest.approx(5 / math.sqrt(5))
    assert deviation([1.0, 1.0], [1.0, 1.0]) == 0.0
    assert deviation([1.0, 1.0], [0.5, 0.5]) == -math.inf
    assert math.isnan(deviation([1.0], [1.0, 2.0]))
