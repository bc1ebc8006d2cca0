"""What a call computes: FLOPs counted exactly, and which tensors it reads at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import COUPLED, LOSSES, KernelWithoutMemory, config_of, flops, silence_kernels
from loss_cases import BACKENDS, DEVICE
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, linear_grpo_loss, linear_logps

N, H, V, C = 24, 8, 40, 5
# With C rows in a chunk: 9 rows of sequences that fit in one, 15 rows of sequences that do not.
LENGTHS = (3, 8, 0, 5, 7, 1)
FITS, LONGER = 9, 15


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, KernelWithoutMemory]:
    return silence_kernels(monkeypatch)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def per_nhv(*call: Any, **options: Any) -> float:
    return flops(*call, **options) / (N * H * V)


class Inputs:
    """24 tokens in chunks of 5 rows, the last one shorter."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, hidden: bool = True, weight: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(N, H, device=DEVICE).to(dtype).requires_grad_(hidden)
        self.weight = torch.randn(V, H, device=DEVICE).to(dtype).requires_grad_(weight)
        self.ids = torch.randint(V, (N,), device=DEVICE)
        self.advantages = torch.ones(N, 1, device=DEVICE)
        self.old_logps = torch.full((N,), -3.0, device=DEVICE)

    def loss(self, backend: str, *, lengths: tuple[int, ...] = (), **arguments: Any) -> Tensor:
        return self.output(backend, lengths=lengths, **arguments).loss

    def output(self, backend: str, *, lengths: tuple[int, ...] = (), **arguments: Any) -> Any:
        if lengths:
            bounds = torch.tensor((0, *lengths), dtype=torch.int32, device=DEVICE)
            arguments["cu_seqlens"] = bounds.cumsum(0, dtype=torch.int32)
        advantages = arguments.pop("advantages", self.advantages)
        options = {"chunk_rows": C, "method": "single_pass", "backend": backend} | arguments
        return linear_grpo_loss(self.hidden, self.weight, self.ids, advantages, **options)

    def logps(self, backend: str, **arguments: Any) -> Tensor:
        logps, entropy = linear_logps(
            self.hidden, self.weight, self.ids, chunk_rows=C, backend=backend, **arguments
        )
        return logps.sum() + entropy.sum()


# On the CPU bf16 products are done in fp32 slices: the same FLOPs.
both_types = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
leaves = pytest.mark.parametrize(
    ("hidden", "weight", "products"), [(True, True, 2), (True, False, 1), (False, True, 1)]
)
methods = pytest.mark.parametrize("method", ("single_pass", "recompute"))


@both_types
@leaves
@methods
def test_each_product_is_done_once_and_logits_again_for_recompute(
    backend: str, dtype: torch.dtype, hidden: bool, weight: bool, products: int, method: str
) -> None:
    inputs = Inputs(dtype, hidden, weight)
    logits = 4 if method == "recompute" else 2
    for options in ({}, {"fp32_logits": True}, {"skip_rows": False}):
        assert per_nhv(lambda o=options: inputs.loss(backend, method=method, **o)) == (
            logits + 2 * products
        )


@both_types
@methods
def test_loss_without_gradient_is_one_product(
    backend: str, dtype: torch.dtype, method: str
) -> None:
    inputs = Inputs(dtype)
    for loss in ("dapo", "gspo", "vespo"):
        options = {"config": config_of(loss), "lengths": LENGTHS, "old_logps": inputs.old_logps}
        options["method"] = method
        with torch.no_grad():
            assert per_nhv(lambda o=options: inputs.loss(backend, **o), backward=False) == 2
        nothing = Inputs(dtype, False, False)
        assert per_nhv(lambda o=options, n=nothing: n.loss(backend, **o), backward=False) == 2


@both_types
def test_logps_flops(backend: str, dtype: torch.dtype) -> None:
    inputs = Inputs(dtype)
    assert per_nhv(lambda: inputs.logps(backend), backward=False) == 2
    assert per_nhv(lambda: inputs.logps(backend)) == 8
    mask = torch.arange(N, device=DEVICE) % 4 != 0
    assert per_nhv(lambda: inputs.logps(backend, mask=mask)) == 8 * 18 / 24


@both_types
@methods
@pytest.mark.parametrize("active", (0, 6, 17))
def test_inactive_rows_get_no_gradient_products(
    backend: str, dtype: torch.dtype, active: int, method: str
) -> None:
    again = 2 if method == "recompute" else 0
    for weight, products in ((True, 2), (False, 1)):
        inputs = Inputs(dtype, weight=weight)
        advantages = (torch.randperm(N, device=DEVICE) < active).float()[:, None]
        rho, gradient = active / N, 2 * products + again
        arguments: dict[str, Any] = {"advantages": advantages, "method": method}

        def count(inputs: Inputs = inputs, **options: Any) -> float:
            return per_nhv(lambda: inputs.loss(backend, **options))

        assert count(**arguments) == pytest.approx(2 + gradient * rho)
        assert count(**arguments, statistics="active") == pytest.approx((2 + gradient) * rho)
        # With a KL term, with an entropy bonus and with skip_rows=False every row has a gradient.
        assert count(**arguments, skip_rows=False) == 2 + gradient
        ref_logps = torch.zeros(N, device=DEVICE)
        kl = GRPOLossConfig(beta=0.1)
        assert count(**arguments, config=kl, ref_logps=ref_logps) == 2 + gradient
        assert count(**arguments, config=GRPOLossConfig(entropy_coef=0.1)) == 2 + gradient


@pytest.mark.parametrize("factor", ("importance_sampling_ratio", "policy_weight", "entropy_mask"))
@methods
def test_a_factor_of_0_makes_a_row_inactive(backend: str, factor: str, method: str) -> None:
    inputs = Inputs()
    zeros = (torch.arange(N, device=DEVICE) % 4 != 0).float()  # 18 of 24 are not
    again = 2 if method == "recompute" else 0
    arguments: dict[str, Any] = {factor: zeros, "method": method}
    assert per_nhv(lambda: inputs.loss(backend, **arguments)) == 2 + (4 + again) * 0.75
    # The entropy bonus knows the entropy mask only.
    arguments["config"] = GRPOLossConfig(entropy_coef=0.1)
    share = 0.75 if factor == "entropy_mask" else 1
    assert per_nhv(lambda: inputs.loss(backend, **arguments)) == 2 + (4 + again) * share


@both_types
@methods
def test_masked_rows_cost_nothing(backend: str, dtype: torch.dtype, method: str) -> None:
    inputs = Inputs(dtype)
    total = 8 if method == "recompute" else 6
    for counted in (0, 1, 18):
        mask = torch.randperm(N, device=DEVICE) < counted
        for loss in ("dapo", "gspo"):
            arguments: dict[str, Any] = {"completion_mask": mask, "config": config_of(loss)}
            arguments |= {"lengths": LENGTHS, "method": method}
            count = per_nhv(lambda a=arguments: inputs.loss(backend, **a))
            assert count == pytest.approx(total * counted / 24)


# ---------------------------------------------------------------- coupled rows

extras = pytest.mark.parametrize(
    "extra", ({}, {"beta": 0.1}, {"entropy_coef": 0.1}), ids=("plain", "kl", "entropy")
)
coupled = pytest.mark.parametrize("loss", COUPLED)


def with_extra(inputs: Inputs, loss: str, extra: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"config": config_of(loss, **extra), "lengths": LENGTHS}
    if "beta" in extra:
        arguments["ref_logps"] = inputs.old_logps
    return arguments


@coupled
@extras
def test_off_policy_only_sequences_longer_than_a_chunk_are_computed_again(
    backend: str, loss: str, extra: dict[str, Any]
) -> None:
    for weight, gradient in ((True, 4), (False, 2)):
        inputs = Inputs(weight=weight)
        arguments = with_extra(inputs, loss, extra) | {"old_logps": inputs.old_logps}

        def count(inputs: Inputs = inputs, **options: Any) -> float:
            return flops(lambda: inputs.loss(backend, **options)) / (H * V)

        all_fit, none_fits = {"chunk_rows": 8}, {"lengths": (12, 12)}
        mixed = (2 + gradient) * FITS + (4 + gradient) * LONGER
        assert count(**arguments) == mixed
        assert count(**arguments | all_fit) == (2 + gradient) * N
        assert count(**arguments | none_fits) == (4 + gradient) * N
        # Dense and mixed: which rows go together would have to be sorted; all are computed twice.
        assert count(**arguments, skip_rows=False) == (4 + gradient) * N
        assert count(**arguments | all_fit, skip_rows=False) == (2 + gradient) * N


@coupled
@extras
def test_on_policy_every_sequence_is_computed_once(
    backend: str, loss: str, extra: dict[str, Any]
) -> None:
    inputs = Inputs()
    arguments = with_extra(inputs, loss, extra)
    for lengths in (LENGTHS, (24,), (12, 12)):
        arguments["lengths"] = lengths
        assert per_nhv(lambda: inputs.loss(backend, **arguments)) == 6
        assert per_nhv(lambda: inputs.loss(backend, **arguments, skip_rows=False)) == 6


def test_the_kl_of_whole_sequences_couples_rows_on_policy_too(backend: str) -> None:
    """Bias-corrected: the derivative of the sequence's ratio multiplies the KL of all its rows."""
    inputs = Inputs()
    options: dict[str, Any] = {"beta": 0.1, "use_bias_correction_kl": True}
    arguments = with_extra(inputs, "gspo", options)
    count = flops(lambda: inputs.loss(backend, **arguments)) / (H * V)
    assert count == 6 * FITS + 8 * LONGER
    for loss in ("vespo", "gmpo"):  # their KL is corrected token by token
        arguments = with_extra(inputs, loss, options)
        assert per_nhv(lambda a=arguments: inputs.loss(backend, **a)) == 6


@coupled
@methods
@pytest.mark.parametrize("off_policy", (False, True))
def test_inactive_sequences_are_left_out_whole(
    backend: str, loss: str, method: str, off_policy: bool
) -> None:
    """One token with an advantage makes its whole sequence active."""
    inputs = Inputs()
    advantages = torch.zeros(N, 1, device=DEVICE)
    advantages[4], advantages[12] = 1.0, -1.0  # in the sequences of 8 (longer) and of 5 (fits)
    active = 13
    arguments: dict[str, Any] = {"config": config_of(loss), "lengths": LENGTHS, "method": method}
    arguments["advantages"] = advantages
    if off_policy:
        arguments["old_logps"] = inputs.old_logps
    again = 2 * active if method == "recompute" else 2 * 8 * off_policy
    for statistics, computed in (("all", N), ("active", active)):

        def run(statistics: str = statistics) -> Any:
            return inputs.output(backend, **arguments, statistics=statistics)

        assert flops(lambda: run().loss) / (H * V) == 2 * computed + 4 * active + again
        metrics = run().metrics
        assert metrics["num_computed_rows"] == computed
        assert metrics["num_gradient_rows"] == active


@coupled
def test_padded_rows_fit_if_the_longest_sequence_does(backend: str, loss: str) -> None:
    """(B, T): with skip_rows=False every sequence has T rows, else only those that count."""
    inputs = Inputs()
    inputs.hidden = inputs.hidden.detach().view(4, 6, H).requires_grad_()
    inputs.ids, inputs.old_logps = inputs.ids.view(4, 6), inputs.old_logps.view(4, 6)
    mask = torch.arange(6, device=DEVICE) < torch.tensor([[6], [2], [5], [0]], device=DEVICE)
    arguments: dict[str, Any] = {"advantages": torch.ones(4, device=DEVICE)}
    arguments |= {"config": config_of(loss), "old_logps": inputs.old_logps}
    arguments["completion_mask"] = mask

    def count(**options: Any) -> float:
        return flops(lambda: inputs.loss(backend, **arguments, **options)) / (H * V)

    assert count() == 8 * 6 + 6 * 7
    assert count(skip_rows=False) == 8 * N
    assert count(skip_rows=False, chunk_rows=6) == 6 * N


# ---------------------------------------------------------------- what is not read


@methods
def test_nothing_is_read_or_made_for_what_is_not_used(
    kernels: dict[str, KernelWithoutMemory], method: str
) -> None:
    inputs = Inputs()
    optional = ("old_logps", "ref_logps", "policy_weight", "row_weight", "mask", "kl", "tokens")
    reference = torch.full((N,), torch.nan, device=DEVICE)
    for loss in LOSSES:
        arguments: dict[str, Any] = {"config": config_of(loss), "method": method}
        arguments |= {"lengths": LENGTHS, "ref_logps": reference}  # beta is 0
        inputs.loss("triton", **arguments).backward()
        launches = [launch for kernel in kernels.values() for launch in kernel.launches]
        assert launches
        for launch in launches:
            unused = [n for n in optional if launch.get(f"{n}_ptr")]
            assert unused in ([], ["row_weight"]), loss
        written = [launch for launch in launches if launch.get("dlogits_ptr")]
        assert len(written) >= 5, loss  # one for each chunk, tiles being larger
        for kernel in kernels.values():
            kernel.launches.clear()
        with torch.no_grad():
            inputs.loss("triton", **arguments)
        for kernel in kernels.values():
            assert not any(launch.get("dlogits_ptr") for launch in kernel.launches)
            kernel.launches.clear()


@pytest.mark.parametrize("loss", LOSSES)
@methods
def test_log_probs_of_the_reference_are_not_read_without_beta(loss: str, method: str) -> None:
    """Whatever stands there: NaN, another shape, another device."""
    results: list[tuple[Tensor, Tensor | None]] = []
    for ref_logps in (None, torch.full((N,), torch.nan), torch.ones(3, 3, device="meta")):
        inputs = Inputs()
        loss_value = inputs.loss(
            "torch", config=config_of(loss), lengths=LENGTHS, ref_logps=ref_logps, method=method
        )
        loss_value.backward()
        results.append((loss_value.detach(), inputs.weight.grad))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and value.isfinite()
        assert gradient is not None and results[0][1] is not None
        assert torch.equal(gradient, results[0][1]) and gradient.abs().sum() > 0
