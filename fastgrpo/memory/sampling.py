"""What sampling on a static cache keeps: its own code run on fake tensors, two steps of it.

P prompts, G completions of each, T completion positions, R runs, F factors, E operations, K kinds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from fastgrpo.config import TrainConfig
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.cache import filled_layers
from fastgrpo.rollout.decoder import Decoder, StaticModel

from .fake_model import build_fake, layers_of, move_to_cpu
from .live import KINDS, LiveBytes, without_values

# Prompts, completions of each and positions of these in the runs: none is 1, which PyTorch treats
# in its own way.
_SHAPES = ((2, 2, 3), (3, 2, 3), (2, 3, 3), (2, 2, 6))


class SamplingFootprint:
    """The bytes alive at the operations of sampling, for any number of prompts and completions."""

    def __init__(
        self,
        architecture: PreTrainedConfig,
        config: TrainConfig,
        prompt_length: int,
        *,
        bf16: bool,
        equal_layers: bool,
    ) -> None:
        """Sample a few completions with a few layers, if these are all equal.

        Raises:
            ValueError: the model cannot be sampled on a static cache.
        """

        def run(layers: int | None, prompts: int, copies: int, steps: int) -> torch.Tensor:
            events = _run(
                architecture, config, (layers, prompts, prompt_length, copies, steps),
                bf16=bf16,
            )  # fmt: skip
            return torch.tensor(events, dtype=torch.float64)

        depth: int = architecture.get_text_config().num_hidden_layers
        depths = (2, 3) if depth > 2 and equal_layers else (None,)
        found = [torch.stack([run(layers, *shape) for shape in _SHAPES]) for layers in depths]
        # Beyond two layers each adds the same at every operation.
        bytes_REK = found[0] + (depth - 2) * (found[-1] - found[0])
        factors_RF = torch.tensor(
            [_factors(P, P * G, T) for P, G, T in _SHAPES], dtype=torch.float64
        )
        bytes_FX = torch.linalg.solve(factors_RF, bytes_REK.flatten(1))
        self.bytes_FEK = bytes_FX.view_as(bytes_REK)

    def peak(self, prompts: int, completions: int, steps: int) -> dict[str, int]:
        """Return the bytes of each kind at the peak.

        Args:
            prompts: read at once.
            completions: decoded at once.
            steps: tokens of a completion.
        """
        factors_F = torch.tensor(_factors(prompts, completions, steps), dtype=torch.float64)
        bytes_EK = torch.einsum("f,fek->ek", factors_F, self.bytes_FEK)
        peak_K = bytes_EK[bytes_EK.sum(1).argmax()]
        return dict(zip(KINDS, map(round, peak_K.tolist()), strict=True))


def _factors(prompts: int, completions: int, steps: int) -> list[float]:
    """Return what the bytes are linear in."""
    return [1.0, float(prompts), float(completions), float(completions * steps)]


def _run(
    architecture: PreTrainedConfig,
    config: TrainConfig,
    shape: tuple[int | None, int, int, int, int],
    *,
    bf16: bool,
) -> list[list[int]]:
    """Read prompts and take one step of their completions; return the bytes alive all along."""
    layers, prompts, prompt_length, copies, steps = shape
    model: Any = build_fake(architecture, config, bf16=bf16, layers=layers).eval()
    base: Any = getattr(model, "get_base_model", lambda: model)()
    static = StaticModel(base, [0], 0)
    base.set_attn_implementation(static.attentions[0])
    sampling = SamplingParams(
        max_completion_length=steps,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )
    with without_values(architecture.model_type), torch.no_grad():
        move_to_cpu(model)
        uniforms_BT = torch.zeros(prompts * copies, steps, dtype=torch.float64)
        live = LiveBytes([*model.parameters(), *model.buffers(), uniforms_BT])
        live.recording = layers is None

        def record(*_: Any) -> None:
            live.recording = True

        layers_of(model)[-1].register_forward_pre_hook(record)
        with live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            read = static.prefill([[0] * prompt_length] * prompts)
            # Caches grow layer by layer, and are whole from the last layer on.
            live.recording = layers is None
            decoder = Decoder(static, read, copies, sampling, uniforms_BT)
            decoder.step()
            # Rows that have ended are dropped layer by layer: one is held twice, at most in full.
            _, layer = filled_layers(decoder.cache)[-1]
            rows_B = torch.zeros(prompts * copies, dtype=torch.long)
            _kept = [x[rows_B] for x in (layer.keys, layer.values) if x is not None]
    return live.events_EK
