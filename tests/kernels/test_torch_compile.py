"""Model and loss as one graph: values and gradients of eager, and no new graph for a new length.

`aot_eager` runs the graph that autograd and functionalization make of a call; `inductor` (slow)
also plans its memory and caches it.

B sequences, T positions, N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import DEVICE
from torch import Tensor, nn
from torch._dynamo.exc import TorchRuntimeError, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from fastgrpo_kernels import (
    GRPOLossConfig,
    GRPOLossOutput,
    _compiled,
    _row_torch,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    selective_logps,
)
from fastgrpo_kernels._reduce import metric_names

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler about torch's own modules

B, H, V = 3, 8, 37
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
Step = Callable[..., dict[str, Tensor]]
Results = dict[str, Tensor | None]


class Model(nn.Module):
    """A body and a head; always the same."""

    def __init__(self, *frozen: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


def named(out: GRPOLossOutput | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    if isinstance(out, tuple):
        return {"logps": out[0], "entropy": out[1], "loss": (out[0] + 0.3 * out[1]).square().sum()}
    metrics = {f"metric {name}": value for name, value in out.metrics.items()}
    return {"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **metrics}


def of_hidden(model: Model, x: Tensor, **k: Any) -> dict[str, Tensor]:
    return named(linear_grpo_loss(model(x), model.head.weight, bias=model.head.bias, **k))


def recomputing(model: Model, x: Tensor, **k: Any) -> dict[str, Tensor]:
    return of_hidden(model, x, method="recompute", **k)


def of_logits(model: Model, x: Tensor, **k: Any) -> dict[str, Tensor]:
    return named(grpo_loss(model.head(model(x)), **k))


def logps_of_hidden(
    model: Model, x: Tensor, completion_ids: Tensor, completion_mask: Tensor, backend: str, **_: Any
) -> dict[str, Tensor]:
    head = model.head
    options: dict[str, Any] = {"mask": completion_mask, "temperature": 0.9, "backend": backend}
    return named(linear_logps(model(x), head.weight, completion_ids, bias=head.bias, **options))


def logps_of_logits(
    model: Model, x: Tensor, completion_ids: Tensor, completion_mask: Tensor, backend: str, **_: Any
) -> dict[str, Tensor]:
    options: dict[str, Any] = {"mask": completion_mask, "temperature": 0.9, "backend": backend}
    return named(selective_logps(model.head(model(x)), completion_ids, **options))


LOSSES = (of_hidden, recomputing, of_logits)
FUNCTIONS = (*LOSSES, logps_of_hidden, logps_of_logits)
losses = pytest.mark.parametrize("step", LOSSES)
functions = pytest.mark.parametrize("step", FUNCTIONS)
compilers = pytest.mark.parametrize("compiler", COMPILERS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def batch(length: int, **changed: Any) -> dict[str, Any]:
    shape = (B, length)
    values = {
        "x": torch.randn(*shape, H),
        "completion_ids": torch.randint(V, shape),
        "advantages": torch.randn(B),
        "completion_mask": torch.rand(shape) < 0.8,
        "old_logps": -3.6 + 0.3 * torch.randn(shape),
        "ref_logps": -3.6 + 0.3 * torch.randn(shape),
    }
    on_device = {name: value.to(DEVICE) for name, value in values.items()}
    return {**on_device, "backend": "torch", "config": GRPOLossConfig(beta=0.1), **changed}


def results(step: Step, model: Model, **k: Any) -> Results:
    """Return outputs and gradients; the upstream gradient is not 1."""
    model.zero_grad()
    found = step(model, **k)
    if found["loss"].requires_grad:
        (3 * found["loss"]).backward()
    for name in found.keys() - {"loss", "logps", "entropy"}:
        assert not found[name].requires_grad, name
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return {n: None if x is None else x.detach() for n, x in (found | gradients).items()}


def assert_same(found: Results, expected: Results, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(
            found[name],
            wanted,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
            **tolerance,
        )


class Compiled:
    """A step as one graph, and how many were made."""

    def __init__(self, step: Step, compiler: str = "aot_eager") -> None:
        self.step, self.counter = step, CompileCounterWithBackend(compiler)
        self.compiled = torch.compile(step, fullgraph=True, backend=self.counter)

    def check(self, model: Model, may_compile: bool = True, **k: Any) -> Results:
        with torch.compiler.set_stance("default" if may_compile else "fail_on_recompile"):
            found = results(self.compiled, model, **k)
        assert_same(found, results(self.step, model, **k))
        return found

    @property
    def graphs(self) -> int:
        return self.counter.frame_count


# ---------------------------------------------------------------- lengths


@compilers
@functions
def test_a_new_length_compiles_nothing_once_lengths_vary(step: Step, compiler: str) -> None:
    compiled, model = Compiled(step, compiler), Model()
    for length in (5, 7):
        compiled.check(model, **batch(length))
    for length in (9, 16):
        compiled.check(model, may_compile=False, **batch(length))
    assert compiled.graphs == 2


@functions
def test_triton(step: Step) -> None:
    Compiled(step).check(Model(), **batch(2, backend="triton"))


@pytest.mark.parametrize("step", [of_hidden, recomputing])
@pytest.mark.parametrize("loss_type", ["grpo", "gmpo"])
def test_packed_lengths(step: Step, loss_type: Any) -> None:
    compiled, model = Compiled(step), Model()
    for number, length in enumerate((11, 13, 17, 19)):
        packed = {
            "x": torch.randn(length, H, device=DEVICE),
            "completion_ids": torch.randint(V, (length,), device=DEVICE),
            "advantages": torch.randn(2, device=DEVICE),
            "old_logps": torch.full((length,), -3.5, device=DEVICE),
            "cu_seqlens": torch.tensor([0, 4, length], dtype=torch.int32, device=DEVICE),
            "config": GRPOLossConfig(loss_type=loss_type),
        }
        compiled.check(model, may_compile=number < 2, **packed)


def test_the_step_s_number_of_tokens_may_change() -> None:
    compiled, model = Compiled(of_hidden), Model()
    for number, tokens in enumerate((40, 41, 55, 60)):
        compiled.check(model, number < 2, **batch(6, num_items_in_batch=tokens))
    for number, tokens in enumerate((40, 41)):
        tensor = torch.tensor(tokens, device=DEVICE)
        compiled.check(model, number < 1, **batch(6, num_items_in_batch=tensor))


# ---------------------------------------------------------------- options

CONFIGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.1},
    {"beta": 0.3, "temperature": 0.5},
    {"loss_type": "dr_grpo", "max_completion_length": 7},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "gmpo", "entropy_coef": 0.1, "logit_softcap": 2.0},
]


@compilers
@losses
def test_a_new_config_is_never_answered_with_the_old_one(step: Step, compiler: str) -> None:
    compiled, model, k = Compiled(step, compiler), Model(), batch(6)
    seen: set[float] = set()
    with torch._dynamo.config.patch(recompile_limit=64):
        for fields in CONFIGS:
            found = compiled.check(model, **k | {"config": GRPOLossConfig(**fields)})
            assert found["loss"] is not None
            seen.add(found["loss"].item())
    graphs = compiled.graphs
    for fields in CONFIGS:
        compiled.check(model, may_compile=False, **k | {"config": GRPOLossConfig(**fields)})
    assert compiled.graphs == graphs
    assert len(seen) == len(CONFIGS)


@pytest.mark.slow
def test_a_float_is_never_that_of_a_cached_graph() -> None:
    """Where torch 2.13 fails if a float stays a symbol: from the second graph of a value on."""

    def step(model: Model, temperature: float, x: Tensor, completion_ids: Tensor, **_: Any):
        return named(selective_logps(model.head(model(x)), completion_ids, temperature=temperature))

    model, k = Model(), batch(6)
    for _ in range(2):
        torch._dynamo.reset()
        compiled = Compiled(step, "inductor")
        for temperature in (0.1, 0.2, 0.3, 0.4, 0.5):
            compiled.check(model, temperature=temperature, **k)


def test_a_config_made_in_the_graph() -> None:
    def step(model: Model, beta: float, **k: Any) -> dict[str, Tensor]:
        return of_hidden(model, **k | {"config": GRPOLossConfig(beta=beta)})

    compiled, k = Compiled(step), batch(6)
    for beta in (0.1, 0.3, 0.7):
        compiled.check(Model(), beta=beta, **k)


@pytest.mark.parametrize("step", [of_hidden, recomputing])
@pytest.mark.parametrize(
    "options",
    [{"statistics": "active"}, {"skip_rows": False}, {"chunk_rows": 4}, {"fp32_logits": True}],
    ids=str,
)
def test_options(step: Step, options: dict[str, Any]) -> None:
    advantages = torch.tensor([1.0, 0.0, -1.0], device=DEVICE)
    k = batch(6, advantages=advantages, config=GRPOLossConfig(loss_type="grpo"), **options)
    found = Compiled(step).check(Model(), **k)
    logps = found["logps"]
    assert logps is not None
    assert logps[1].isnan().any() == (options == {"statistics": "active"})


def test_inplace_is_a_permission_that_is_not_used() -> None:
    def step(logits: Tensor) -> Tensor:
        k = batch(6, inplace=True)
        del k["x"]
        return grpo_loss(logits, **k).loss

    logits = torch.randn(B, 6, V, device=DEVICE, requires_grad=True)
    before = logits.detach().clone()
    torch.compile(step, fullgraph=True, backend="aot_eager")(logits).backward()
    assert torch.equal(logits, before)
    assert logits.grad is not None and logits.grad.abs().sum() > 0


# ---------------------------------------------------------------- gradients


@functions
@pytest.mark.parametrize(
    "frozen",
    [
        ("head.weight",),
        ("body.weight", "body.bias"),
        ("body.weight", "body.bias", "head.weight", "head.bias"),
    ],
    ids=str,
)
def test_frozen_parameters(step: Step, frozen: tuple[str, ...]) -> None:
    Compiled(step).check(Model(*frozen), **batch(6))


@functions
def test_without_gradient_and_with_it_again(step: Step) -> None:
    compiled, model, k = Compiled(step), Model(), batch(6)
    compiled.check(model, **k)
    with torch.no_grad():
        found = compiled.check(model, **k)
    assert found["dbody.weight"] is None
    compiled.check(model, may_compile=False, **k)


@functions
def test_backward_twice(step: Step) -> None:
    model, k = Model(), batch(6)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(model, **k)["loss"]
    first = torch.autograd.grad(2 * loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("step", [logps_of_hidden, logps_of_logits])
@pytest.mark.parametrize("of", ["logps", "entropy"])
def test_the_gradient_of_one_result(step: Step, of: str) -> None:
    def one(model: Model, **k: Any) -> dict[str, Tensor]:
        return {"loss": step(model, **k)[of].square().sum()}

    Compiled(one).check(Model(), **batch(6))


@pytest.mark.parametrize("step", [recomputing, of_logits, logps_of_hidden, logps_of_logits])
def test_backward_does_not_compute_the_log_probs_again(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    statistics_rows = _row_torch.statistics_rows

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        statistics_rows(*args, **kwargs)

    monkeypatch.setattr(_row_torch, "statistics_rows", counted)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(Model(), **batch(6))
    in_forward = len(calls)
    found["loss"].backward()
    assert in_forward > 0 and len(calls) == in_forward


@compilers
def test_gradients_too_small_for_fp16_survive(compiler: str) -> None:
    """As in eager calls, the power of two in 1 / denominator comes after the upstream gradient."""
    ids = torch.randint(V, (B, 6), device=DEVICE)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        advantages = torch.full((B,), 1e-3, device=DEVICE)
        out = linear_grpo_loss(
            hidden, weight, ids, advantages, num_items_in_batch=2**20, backend="torch"
        )
        return out.loss * 2**20

    leaves = torch.randn(B, 6, H), torch.randn(V, H)
    leaves = [x.to(DEVICE).half().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for x, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(x, wanted)


# ---------------------------------------------------------------- autocast


def halves(found: Results, expected: Results) -> None:
    """The compiler rounds the body in other places: one unit of bf16 at the largest value."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        value = found[name]
        assert value is not None and wanted is not None and value.dtype == wanted.dtype, name
        atol = 2e-2 * float(wanted.abs().max()) + 1e-6
        torch.testing.assert_close(value, wanted, atol=atol, rtol=2e-2, msg=name)


@compilers
@functions
def test_autocast_around(step: Step, compiler: str) -> None:
    compiled, model, k = Compiled(step, compiler), Model(), batch(6)
    with torch.autocast(DEVICE, torch.bfloat16):
        halves(results(compiled.compiled, model, **k), results(step, model, **k))
    compiled.check(model, **k)


@pytest.mark.parametrize("step", [of_hidden, logps_of_logits])
def test_autocast_inside(step: Step) -> None:
    def inside(model: Model, **k: Any) -> dict[str, Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            return step(model, **k)

    model, k = Model(), batch(6)
    halves(results(Compiled(inside).compiled, model, **k), results(inside, model, **k))


# ---------------------------------------------------------------- limits


def test_errors_keep_their_text() -> None:
    k = batch(6)
    k["completion_ids"][0, 0], k["completion_mask"][0, 0] = V, True
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"holds 37 at token 0, outside \[0, 37\)"):
            Compiled(of_hidden).compiled(Model(), **k)
    k = batch(6) | {"completion_ids": batch(7)["completion_ids"]}
    with pytest.raises(TorchRuntimeError, match="hidden must be"):
        Compiled(of_hidden).compiled(Model(), **k)
    with pytest.raises(TypeError, match="unexpected keyword argument 'advantage'"):
        Compiled(of_hidden).compiled(Model(), **batch(6, advantage=1.0))


def test_grad_buffer_is_outside_of_the_graph() -> None:
    k, found = batch(6), []
    for compiler in (None, "aot_eager"):
        model, buffer = Model(), torch.zeros(V, H, device=DEVICE)
        step = of_hidden
        if compiler is not None:
            step = torch.compile(of_hidden, backend=compiler)
        found.append(results(step, model, **k, grad_buffer=buffer, grad_scale=0.5))
        found[-1]["buffer"] = buffer
        assert found[-1]["dhead.weight"] is None and buffer.abs().sum() > 0
    assert_same(found[1], found[0])
    with pytest.raises(
        Unsupported, match="linear_grpo_loss with grad_buffer writes into an argument"
    ):
        Compiled(of_hidden).compiled(Model(), **k, grad_buffer=torch.zeros(V, H, device=DEVICE))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    meeting = (tmp_path / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="the mesh is one of gloo")
def test_a_sharded_head_is_gathered_in_the_graph(mesh: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    model, k = Model(), batch(6)

    def step(x: Tensor, weight: Tensor, **k: Any) -> Tensor:
        return linear_grpo_loss(model(x), weight, **k).loss * 2

    gradients: list[Tensor] = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight = distribute_tensor(model.head.weight.detach(), mesh).requires_grad_()
        function(weight=weight, **k).backward()
        assert isinstance(weight.grad, type(weight))
        gradients.append(weight.grad.full_tensor())
    torch.testing.assert_close(gradients[1], gradients[0])


# ---------------------------------------------------------------- what a graph has to know before


@pytest.mark.parametrize("layout", ["sequences", "no sequence", "packed", "packed sequences"])
def test_the_names_of_the_metrics(layout: str) -> None:
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gmpo")
    tried = 0
    for loss_type, level, beta, coef in itertools.product(
        loss_types, ("token", "sequence"), (0.0, 0.1), (0.0, 0.1)
    ):
        k: dict[str, Any] = {"ref_logps": None if beta == 0 else torch.zeros(2, 3)}
        hidden, ids, advantages = torch.zeros(2, 3, H), torch.zeros(2, 3).long(), torch.ones(2)
        if layout == "no sequence":
            hidden, ids, advantages = hidden[:0], ids[:0], advantages[:0]
            k = {name: None if value is None else value[:0] for name, value in k.items()}
        elif layout.startswith("packed"):
            hidden, ids, advantages = hidden.view(6, H), ids.view(6), torch.ones(6)
            k = {name: None if value is None else value.view(6) for name, value in k.items()}
        if layout == "packed sequences":
            k["cu_seqlens"] = torch.tensor([0, 4, 6], dtype=torch.int32)
        number = {"sequences": 2, "no sequence": 0, "packed": None, "packed sequences": 2}[layout]
        try:
            config = GRPOLossConfig(
                loss_type=loss_type, importance_sampling_level=level, beta=beta, entropy_coef=coef,
                max_completion_length=5,
            )  # fmt: skip
            out = linear_grpo_loss(
                hidden, torch.zeros(V, H), ids, advantages, config=config, backend="torch", **k
            )
        except ValueError:
            continue  # not defined, or not without sequences
        tried += 1
        names = metric_names(
            loss_type, with_kl=beta != 0, with_entropy_bonus=coef != 0, num_sequences=number
        )
        assert set(names) == out.metrics.keys() and len(names) == len(out.metrics)
    assert tried >= 12


@pytest.mark.parametrize("name", ["linear_grpo_loss", "recompute", "grpo_loss"])
def test_the_operators_are_what_they_say(name: str) -> None:
    """Torch's own checks: shapes and types that are said before, memory shared with nothing."""
    k = batch(6)
    x = k.pop("x").requires_grad_()
    k["method"] = "recompute" if name == "recompute" else "single_pass"
    if name == "grpo_loss":
        k |= {"logits": torch.randn(B, 6, V, device=DEVICE, requires_grad=True)}
        del k["method"]
    else:
        name = "linear_grpo_loss"
        k |= {"hidden": x, "weight": torch.randn(V, H, device=DEVICE, requires_grad=True)}
    call = name, *_compiled._pack(dict(_compiled._flat(k)))
    utilities = ("test_schema", "test_faketensor")
    operators = _compiled._operators
    torch.library.opcheck(operators.forward.default, call, test_utils=utilities)
    with torch.no_grad():
        results, statistics, gradients = operators.forward(*call)
    assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)
    if not gradients:
        upstream = [torch.ones_like(results[0])]
        call = *call, statistics, [0], upstream
        torch.library.opcheck(operators.backward.default, call, test_utils=utilities)
