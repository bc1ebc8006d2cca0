"""The peak GPU memory of a run by phase, from its configuration and its model's `config.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from fastgrpo.config import TrainConfig
from fastgrpo.data import check_room, narrowest
from fastgrpo.optim import optimizer_bytes
from fastgrpo.rewards import reward_model_bytes
from fastgrpo.rollout.cache import budget_bytes, cache_bytes, fitting_rows, row_bytes

from .fake_model import build_fake, layers_of
from .loss import LossShape
from .passes import Footprint, Pass
from .sampling import SamplingFootprint

GIB = 2**30
CONTEXT_BYTES = 3 * GIB // 4
"""Allowed for what is not PyTorch's allocator's: CUDA's context, kernels, cuBLAS's workspaces."""
SLACK = 0.05
"""Share of the peak allowed for blocks of the allocator that are free but fit nobody."""

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """What a run is planned for."""

    name: str
    total_memory: int
    on_gpu: bool = True


@dataclass(frozen=True)
class Plan:
    """Bytes on the device by phase and part, each at the peak of its phase."""

    phases: dict[str, dict[str, int]]
    device: Device
    num_parameters: int
    num_trainable: int
    microbatch_tokens: int
    microbatches: int
    rows_decoded: int
    limit: str | None = None
    """What leaves no room for completions, whatever memory there is."""
    refusal: str | None = None
    """What training says of that in place of starting."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes that PyTorch allocates at the peak."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def allowance(self) -> int:
        """Bytes kept for what is not planned: `CONTEXT_BYTES`, and `SLACK` of the peak."""
        return CONTEXT_BYTES + round(SLACK * self.peak)

    @property
    def fits(self) -> bool:
        """Whether the run would start, and the device has peak and allowance."""
        return self.refusal is None and self.peak + self.allowance <= self.device.total_memory


@dataclass(frozen=True)
class Sizes:
    """Parameters and their bytes."""

    parameters: int
    weights: int
    trainable: int
    gradients: int
    equal_layers: bool


class Planner:
    """Plans runs of one architecture; what fake passes have shown is kept for the next plan."""

    def __init__(self, architecture: PreTrainedConfig, device: Device, prompt_length: int) -> None:
        """Take what stays the same.

        Args:
            architecture: the model's `config.json`.
            device: what is planned for.
            prompt_length: tokens of the longest prompt.
        """
        self.architecture, self.device, self.prompt_length = architecture, device, prompt_length
        self._kept: dict[Hashable, Any] = {}

    def limits(self, config: TrainConfig) -> dict[str, int]:
        """Return the tokens that prompt and completion may have together, by what has that room."""
        text = self.architecture.get_text_config()
        return config.limits(getattr(text, "max_position_embeddings", None) or 2**31)

    def limit(self, config: TrainConfig) -> str | None:
        """Return what leaves no room for prompts of this length, if something does."""
        return narrowest(self.limits(config))[0] if self.refusal(config) else None

    def refusal(self, config: TrainConfig) -> str | None:
        """Return why training would refuse prompts of this length, if it would."""
        most = config.max_completion_length
        try:
            check_room("the longest prompt", self.prompt_length, most, self.limits(config))
        except ValueError as error:
            return str(error)
        return None

    def plan(self, config: TrainConfig, *, like: TrainConfig | None = None) -> Plan:
        """Return the peak of each phase of a run.

        Args:
            config: the run.
            like: a run planned before that needs no less for sampling and log-probs, and stands
                for this one there; what is left then is quick.

        Raises:
            ValueError: the model cannot do what the configuration asks for, or not be planned.
        """
        sizes = self.sizes(config)
        optimizer = optimizer_bytes(sizes.trainable, config)
        device_states = (
            optimizer.device if self.device.on_gpu else optimizer.device + optimizer.host
        )
        has_reference = config.loss.beta > 0 and not config.use_peft
        offloaded = config.offload_ref_model and self.device.on_gpu
        vllm = round(config.vllm_gpu_memory_utilization * self.device.total_memory)
        vllm = vllm if config.use_vllm and self.device.on_gpu else 0
        always = {
            "weights": sizes.weights,
            "optimizer": device_states,
            "reference": sizes.weights if has_reference and not offloaded else 0,
            "reward models": reward_model_bytes(
                config.reward_funcs,
                on_gpu=self.device.on_gpu,
                trust_remote_code=config.trust_remote_code,
            ),
            "vLLM": 0 if config.vllm_enable_sleep_mode else vllm,
        }
        tokens, passes = self._microbatch(config)
        sampling, rows = self._sampling(config, like or config, sum(always.values()))
        phases = {"sampling": always | ({"vLLM": vllm} if config.use_vllm else sampling)}
        moves = config.optimizer_steps_per_generation > 1 or config.use_vllm
        if moves or config.loss.beta > 0:
            asked = {"reference": sizes.weights} if has_reference else {}
            model = like or config
            logps = self._pass(config, model, tokens, with_backward=False, frozen=not moves)
            phases["log-probs"] = always | asked | logps
        phases["training"] = always | self._training(config, sizes, tokens, passes)
        phases["optimizer step"] = always | {
            "gradients": sizes.gradients,
            "optimizer": device_states + optimizer.step,
        }
        return Plan(
            phases,
            self.device,
            sizes.parameters,
            sizes.trainable,
            tokens,
            passes,
            rows,
            self.limit(config),
            self.refusal(config),
        )

    def bf16(self, config: TrainConfig) -> bool:
        """Say whether products are computed under bf16 autocast."""
        return self.device.on_gpu if config.bf16 is None else config.bf16

    def packed(self, config: TrainConfig) -> bool:
        """Say whether sequences are packed instead of padded."""
        if config.padding_free is False or config.attn_implementation in ("sdpa", "eager"):
            return False
        kinds = getattr(self.architecture.get_text_config(), "layer_types", None) or ()
        return set(kinds) <= {"full_attention", "sliding_attention"}

    def sequence_length(self, config: TrainConfig) -> int:
        """Return the tokens of the longest prompt and completion."""
        return self.prompt_length + config.max_completion_length

    def step_tokens(self, config: TrainConfig) -> int:
        """Return the tokens of an optimisation step at most."""
        return config.completions_per_step * self.sequence_length(config)

    def _microbatch(self, config: TrainConfig) -> tuple[int, int]:
        """Return the tokens of a forward and backward pass, and the passes of a step."""
        length, step = self.sequence_length(config), self.step_tokens(config)
        tokens = config.max_tokens_per_microbatch or length * config.per_device_train_batch_size
        if not self.packed(config):
            tokens = max(tokens // length, 1) * length
        tokens = min(max(tokens, length), step)
        return tokens, math.ceil(step / tokens)

    def _training(
        self, config: TrainConfig, sizes: Sizes, tokens: int, passes: int
    ) -> dict[str, int]:
        found = self._pass(config, config, tokens, with_backward=True, gradients_exist=passes > 1)
        # Gradients of earlier passes are there all along, and no business of the pass.
        return found if passes == 1 else found | {"gradients": sizes.gradients}

    def _pass(
        self,
        config: TrainConfig,
        model: TrainConfig,
        tokens: int,
        *,
        with_backward: bool,
        frozen: bool = False,
        gradients_exist: bool = False,
    ) -> dict[str, int]:
        """Return the parts of a pass at its peak, through the model of a configuration."""
        loss, length = self._loss(config), self.sequence_length(config)
        rows = tokens * config.max_completion_length // length
        this = Pass(
            config=model,
            bf16=self.bf16(config),
            on_gpu=self.device.on_gpu,
            loss=loss.kind(rows),
            with_backward=with_backward,
            padded_length=None if self.packed(config) else length,
            frozen=frozen,
            gradients_exist=gradients_exist,
        )
        key = self._model_key(model, with_backward=with_backward), *vars(this).values()
        footprint = self._keep(
            tuple(x for x in key if x is not model),
            lambda: Footprint(self.architecture, this, equal_layers=self.sizes(model).equal_layers),
        )
        if with_backward:
            return footprint.peak(tokens, loss.forward(tokens, rows), loss.backward(tokens, rows))
        return footprint.peak(tokens, loss.forward(tokens, rows, with_gradient=False))

    def _sampling(
        self, config: TrainConfig, model: TrainConfig, used: int
    ) -> tuple[dict[str, int], int]:
        """Return the parts of sampling at its peak, and the completions decoded at once."""
        bf16, length = self.bf16(config), self.sequence_length(config)
        dtype = torch.bfloat16 if bf16 else getattr(torch, config.dtype)
        prompts = config.prompts_per_step * config.optimizer_steps_per_generation
        budget = (self.device.total_memory - CONTEXT_BYTES - used) // 2
        if not self.device.on_gpu:
            budget = budget_bytes(torch.device("cpu"))
        truncated = config.top_p < 1 or config.top_k > 0
        each = row_bytes(self.architecture, length, dtype, truncated=truncated)
        rows = config.max_generation_batch_size or fitting_rows(
            budget, each, config.num_generations
        )
        group = config.num_generations
        prompts_at_once = min(max(1, rows // group), prompts)
        rows = prompts_at_once * min(rows, group)

        if config.use_vllm:
            return {}, rows
        key = ("sampling", self._model_key(model), config.temperature == 1, truncated, config.top_k)
        footprint = self._keep(
            key,
            lambda: SamplingFootprint(
                self.architecture,
                model,
                self.prompt_length,
                bf16=bf16,
                equal_layers=self.sizes(model).equal_layers,
            ),
        )
        found = footprint.peak(prompts_at_once, rows, config.max_completion_length)
        cache = cache_bytes(self.architecture, rows, length, dtype)
        # A random number a token, and the results of all that has been sampled.
        state = prompts * group * config.max_completion_length * (8 + 8 + 4 + 1)
        activations = max(found["activations"] - cache, 0) + state
        return {**found, "activations": activations, "KV cache": cache}, rows

    def _loss(self, config: TrainConfig) -> LossShape:
        text = self.architecture.get_text_config()
        weight_dtype = getattr(torch, config.dtype)
        return LossShape(
            hidden_size=text.hidden_size,
            vocabulary=text.vocab_size,
            dtype=torch.bfloat16 if self.bf16(config) else weight_dtype,
            weight_dtype=weight_dtype,
            trains_head=not config.use_peft,
            on_gpu=self.device.on_gpu,
            total_memory=self.device.total_memory,
        )

    def sizes(self, config: TrainConfig) -> Sizes:
        """Return what the parameters of a run's model take."""

        def measure() -> Sizes:
            model = build_fake(self.architecture, config, bf16=self.bf16(config))
            parameters = list(model.parameters())
            trained = [p for p in parameters if p.requires_grad]
            shapes = [
                [(name, p.shape, p.dtype) for name, p in layer.named_parameters()]
                for layer in layers_of(model)
            ]
            return Sizes(
                # Of 4-bit weights two are in a byte.
                parameters=sum(p.numel() * (1 + (p.dtype == torch.uint8)) for p in parameters),
                weights=sum(x.nbytes for x in (*parameters, *model.buffers())),
                trainable=sum(p.numel() for p in trained),
                gradients=sum(p.nbytes for p in trained),
                equal_layers=all(shape == shapes[0] for shape in shapes),
            )

        return self._keep(("sizes", self._model_key(config)), measure)

    def _model_key(self, config: TrainConfig, *, with_backward: bool = False) -> Hashable:
        """Return all that decides how the model is made and runs."""
        names = ["dtype", "attn_implementation", "use_peft", "load_in_4bit", "use_bnb_nested_quant"]
        names += ["lora_r", "lora_dropout", "lora_target_modules"] if config.use_peft else []
        names += ["gradient_checkpointing", "activation_offloading"] if with_backward else []
        return self.bf16(config), *(str(getattr(config, name)) for name in names)

    def _keep(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
