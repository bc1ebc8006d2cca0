"""The step's mean over micro-batches and the lines of metrics.jsonl."""

import math

import pytest
import torch

from fastgrpo.metrics import StepMetrics, peak_memory_gib, reward_metrics, sequence_means
from fastgrpo_kernels import GRPOLossConfig


def test_means_are_weighted_and_counts_and_shares_summed() -> None:
    step = StepMetrics()
    step.add(
        {"entropy": torch.tensor(1.0), "loss": torch.tensor(0.25), "num_tokens": torch.tensor(10)},
        weight=10,
    )
    step.add({"entropy": 2.0, "loss": -0.05, "num_tokens": 30}, weight=torch.tensor(30))
    assert step.result() == pytest.approx({"entropy": 1.75, "loss": 0.2, "num_tokens": 40})


def test_a_split_step_gives_the_metrics_of_the_whole() -> None:
    entropy_N = torch.rand(100, generator=torch.Generator().manual_seed(0))
    step = StepMetrics()
    for part in entropy_N.split([7, 50, 1, 42]):
        step.add({"entropy": part.mean()}, weight=len(part))
    assert step.result()["entropy"] == pytest.approx(entropy_N.mean().item(), rel=1e-6)


def test_ratios_of_whole_sequences_are_weighed_by_sequences() -> None:
    gspo = GRPOLossConfig(importance_sampling_level="sequence")
    for config, expected in ((gspo, (1 * 0.5 + 3 * 0.1) / 4), (GRPOLossConfig(), 0.46)):
        step = StepMetrics(sequence_means(config))
        step.add({"clip_ratio/low_mean": 0.5, "entropy": 2.0, "num_sequences": 1}, weight=90)
        step.add({"clip_ratio/low_mean": 0.1, "entropy": 4.0, "num_sequences": 3}, weight=10)
        assert step.result() == pytest.approx(
            {"clip_ratio/low_mean": expected, "entropy": 2.2, "num_sequences": 4}
        )
    assert sequence_means(GRPOLossConfig(loss_type="vespo")) == {"vespo/phi_seq_mean"}


def test_names_that_end_in_min_or_max_are_extremes() -> None:
    step = StepMetrics()
    for least, most in ((0.9, 1.1), (0.5, 1.0)):
        ratio = "sampling/importance_sampling_ratio"
        step.add({f"{ratio}/min": least, f"{ratio}/max": most}, weight=1)
    assert list(step.result().values()) == [0.5, 1.1]


def test_a_name_that_some_micro_batches_lack_is_averaged_over_the_others() -> None:
    step = StepMetrics()
    step.add({"kl": 1.0, "entropy": 1.0}, weight=1)
    step.add({"entropy": 3.0}, weight=1)
    step.add({"kl": 4.0, "entropy": 5.0}, weight=2)
    assert step.result() == {"kl": 3.0, "entropy": 3.5}


def test_an_empty_micro_batch_changes_nothing_but_a_nan_elsewhere_shows() -> None:
    step = StepMetrics()
    step.add({"entropy": 2.0, "clip_ratio/low_mean": 0.5}, weight=4)
    step.add({"entropy": math.nan, "clip_ratio/low_mean": math.nan}, weight=0)
    assert step.result() == {"entropy": 2.0, "clip_ratio/low_mean": 0.5}
    step.add({"entropy": math.nan, "clip_ratio/low_mean": math.nan}, weight=1)
    assert all(math.isnan(value) for value in step.result().values())


def test_a_step_of_nothing() -> None:
    step = StepMetrics()
    assert step.result() == {}
    step.add({"entropy": 1.0}, weight=0)
    assert math.isnan(step.result()["entropy"])


def test_metrics_keep_no_graph() -> None:
    parameter = torch.ones((), requires_grad=True)
    step = StepMetrics()
    step.add({"loss": parameter * 2, "kl": parameter * 3}, weight=1)
    assert step.result() == {"loss": 2.0, "kl": 3.0}
    assert not any(t.requires_grad for t in step._sums.values())


@pytest.mark.gpu
def test_adding_does_not_wait_for_the_gpu() -> None:
    value = torch.tensor(0.5, device="cuda")
    count = torch.tensor(3, device="cuda")
    step = StepMetrics()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step.add({"clip_ratio/low_mean": value, "num_tokens": count, "x": 1.0}, weight=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.result() == {
        "clip_ratio/low_mean": 0.5,
        "num_tokens": 6.0,
        "x": 1.0,
    }


def test_memory_is_the_peak_of_the_process_on_the_cpu() -> None:
    held = torch.ones(2**28, dtype=torch.uint8)
    del held
    peak = peak_memory_gib(torch.device("cpu"))
    assert 0.25 <= peak < 64
    assert peak_memory_gib(torch.device("cpu")) >= peak


@pytest.mark.gpu
def test_memory_is_the_peak_of_the_gpu() -> None:
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del held
    assert peak_memory_gib(torch.device("cuda")) >= 0.25


def test_of_rewards_that_are_not_there_nothing_is_known() -> None:
    rewards_BK = torch.tensor([[1.0, math.nan, 0.5], [0.0, math.nan, math.nan]])
    found = reward_metrics(["both", "none", "one"], [1.0, 1.0, 2.0], rewards_BK)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert found == {
        "reward": 1.0,  # 1 + 2 x 0.5, and 0
        "reward_std": pytest.approx(math.sqrt(2)),
        "rewards/both/mean": 0.5,
        "rewards/both/std": pytest.approx(math.sqrt(0.5)),
        "rewards/none/mean": nan,
        "rewards/none/std": nan,
        "rewards/one/mean": 0.5,
        "rewards/one/std": nan,  # of one, as in TRL
    }
