"""The default rollout engine: one prefill a prompt, then one-token steps on a static KV cache.

A step writes only to tensors whose addresses never change and never waits for the device, so a
CUDA graph can capture it. Not here: the capture, dropping finished rows, recurrent models.

P prompts, G completions a prompt, B completions decoded together, T completion positions, S prompt
positions (padded on the left), L = S + T cache positions, Q queries, V vocabulary, K candidate
tokens, E end-of-sequence ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from fastgrpo.model import evaluating
from fastgrpo.rollout import Completions, SamplingParams

_STEPS_BETWEEN_CHECKS = 16  # on a GPU, where a check waits for the device


class StaticCacheRollout:
    """Sample from the Hugging Face causal LM that is being trained: no second copy, no server."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch: int | None = None,
    ):
        """Bind the engine to a model.

        Args:
            model: a decoder-only causal LM whose layers attend fully or in a sliding window.
            eos_token_ids: any of these ends a completion.
            pad_token_id: fills a completion after its end; may be one of `eos_token_ids`.
            max_batch: completions decoded at once, which bounds the KV cache; None for all.

        Raises:
            ValueError: `max_batch` is below 1, or the model cannot decode on a static cache.
        """
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, or None for no bound, got {max_batch}")
        self._model = _StaticModel(model, list(eos_token_ids), pad_token_id)
        self._max_batch = max_batch

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[list[int]],  # P prompts of any length
        num_generations: int,
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
    ) -> Completions:
        """Sample `num_generations` completions of each prompt.

        Args:
            prompt_ids: the token ids of each prompt, without padding.
            num_generations: completions a prompt (G).
            sampling: how tokens are drawn.
            generator: the source of randomness, on the model's device; None for the global one.

        Returns:
            P * G completions on the model's device.

        Raises:
            ValueError: there is no prompt, a prompt is empty, `num_generations` is below 1, or
                prompt and completion do not fit in the model's positions.
        """
        self._model.check(prompt_ids, num_generations, sampling.max_completion_length)
        rows = self._max_batch or len(prompt_ids) * num_generations
        prompts_at_once = max(1, rows // num_generations)
        copies_at_once = min(rows, num_generations)
        parts: list[Completions] = []
        with evaluating(self._model.model, ("sdpa", "eager")):  # they take 4-D masks
            for i in range(0, len(prompt_ids), prompts_at_once):
                prompts = self._model.prefill(prompt_ids[i : i + prompts_at_once])
                for j in range(0, num_generations, copies_at_once):
                    copies = min(copies_at_once, num_generations - j)
                    decoder = _Decoder(self._model, prompts, copies, sampling, generator)
                    parts.append(decoder.run())
                    del decoder  # its cache, before the next is allocated
        mask_BT = torch.cat([part.mask for part in parts])
        longest = int(mask_BT.any(0).sum())
        return Completions(
            ids=torch.cat([part.ids for part in parts])[:, :longest],
            mask=mask_BT[:, :longest],
            logps=torch.cat([part.logps for part in parts])[:, :longest],
            finished=torch.cat([part.finished for part in parts]),
        )


@dataclass(frozen=True)
class _Prompts:
    """Prompts the model has read."""

    cache: StaticCache
    logits_PV: torch.Tensor  # of the first token of a completion
    lengths_P1: torch.Tensor
    valid_PS: torch.Tensor  # False on the left padding


class _Layer(StaticLayer):
    """All positions of a layer, whatever its window, in the type of the values.

    A window is left to the mask: the static sliding layer would roll its whole cache at every step
    and count positions on the host. Under autocast the rotary embedding returns fp32 keys.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        static: Any = super()
        return static.update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


class _StaticModel:
    """A causal LM and its special tokens, run on static caches with masks of our own."""

    def __init__(self, model: PreTrainedModel, eos_token_ids: list[int], pad_token_id: int):
        self.model: Any = model
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id
        self.config: Any = self.model.config.get_text_config(decoder=True)
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds: set[str] = set(getattr(self.config, "layer_types", None) or ())
        kinds = kinds or {"full_attention" if window is None else "sliding_attention"}
        if (
            not kinds <= {"full_attention", "sliding_attention"}
            or getattr(model, "_is_stateful", False)
            or self.config.is_encoder_decoder
        ):
            raise ValueError(
                f"{type(model).__name__} (layers: {', '.join(sorted(kinds))}) is not supported: "
                "its state does not fit a static KV cache; use a decoder-only model with full or "
                "sliding-window attention"
            )
        self.windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}

    def check(self, prompt_ids: list[list[int]], num_generations: int, max_length: int) -> None:
        """Raise a ValueError for what cannot be sampled."""
        if not prompt_ids:
            raise ValueError("prompt_ids is empty: give at least one prompt")
        if [] in prompt_ids:
            raise ValueError(f"prompt {prompt_ids.index([])} is empty: give it at least one token")
        if num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {num_generations}")
        longest = max(map(len, prompt_ids))
        limit: int | None = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and longest + max_length > limit:
            raise ValueError(
                f"the longest prompt has {longest} tokens, which with max_completion_length "
                f"{max_length} exceeds the model's max_position_embeddings {limit}: shorten the "
                "prompt or max_completion_length"
            )

    def prefill(self, prompt_ids: list[list[int]]) -> _Prompts:
        """Read prompts, padded on the left to the longest."""
        length = max(map(len, prompt_ids))
        padded = [[self.pad_token_id] * (length - len(ids)) + ids for ids in prompt_ids]
        ids_PS = torch.tensor(padded, device=self.model.device)
        lengths_P1 = ids_PS.new_tensor([[len(ids)] for ids in prompt_ids])
        columns_S = torch.arange(length, device=ids_PS.device)
        positions_PS = columns_S - (length - lengths_P1)
        valid_PS = positions_PS >= 0
        cache = self.new_cache(length)
        logits_PV = self.forward(
            ids_PS,
            positions_PS.clamp(min=0),
            # Padding sees padding: a row that sees nothing would be NaN.
            visible_BQL=valid_PS[:, :, None] == valid_PS[:, None, :],
            columns_Q=columns_S,
            cache=cache,
        )
        return _Prompts(cache, logits_PV, lengths_P1, valid_PS)

    def new_cache(self, length: int) -> StaticCache:
        """Make an empty cache; its layers allocate at their first update."""
        cache: Any = StaticCache(config=self.config, max_cache_len=length)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, StaticLayer):  # else it shares the cache of another layer
                cache.layers[i] = _Layer(max_cache_len=length)
        return cache

    def forward(
        self,
        ids_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        *,
        visible_BQL: torch.Tensor,  # causality and windows aside
        columns_Q: torch.Tensor,  # where in the cache the queries are
        cache: StaticCache,
    ) -> torch.Tensor:
        """Append tokens to the cache and return the logits after the last, (B, V)."""
        age_QL = columns_Q[:, None] - torch.arange(visible_BQL.shape[-1], device=columns_Q.device)
        masks: dict[str, torch.Tensor] = {}
        for kind, window in self.windows.items():
            in_reach_QL = age_QL >= 0 if window is None else (age_QL >= 0) & (age_QL < window)
            mask_B1QL = (visible_BQL & in_reach_QL)[:, None]
            if self.model.config._attn_implementation == "eager":  # adds the mask to its scores
                scores_B1QL = torch.zeros_like(mask_B1QL, dtype=self.model.dtype)
                mask_B1QL = scores_B1QL.masked_fill(~mask_B1QL, float("-inf"))
            masks[kind] = mask_B1QL
        output = self.model(
            input_ids=ids_BQ,
            position_ids=positions_BQ,
            # Models that mix kinds of layers take a mask for each kind, the others take one mask.
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


class _Decoder:
    """The completions of some prompts while they grow."""

    def __init__(
        self,
        model: _StaticModel,
        prompts: _Prompts,
        copies: int,
        sampling: SamplingParams,
        generator: torch.Generator | None,
    ):
        self.model, self.sampling, self.generator = model, sampling, generator
        P, S = prompts.valid_PS.shape
        B, T = P * copies, sampling.max_completion_length
        new = prompts.lengths_P1  # int64, on the model's device

        self.cache: Any = model.new_cache(S + T)
        for i, layer in enumerate(prompts.cache.layers):
            if isinstance(layer, _Layer) and layer.keys is not None and layer.values is not None:
                keys_BKSD = layer.keys.repeat_interleave(copies, 0)
                self.cache.update(keys_BKSD, layer.values.repeat_interleave(copies, 0), i)

        self.visible_B1L = new.new_ones(B, 1, S + T, dtype=torch.bool)
        self.visible_B1L[:, 0, :S] = prompts.valid_PS.repeat_interleave(copies, 0)
        self.eos_E = new.new_tensor(model.eos_token_ids)
        self.token_B1 = new.new_zeros(B, 1)
        self.position_B1 = prompts.lengths_P1.repeat_interleave(copies, 0)
        self.column_1 = new.new_full((1,), S)
        self.written_1 = new.new_zeros(1)
        self.done_B1 = new.new_zeros(B, 1, dtype=torch.bool)
        self.ids_BT = new.new_full((B, T), model.pad_token_id)
        self.mask_BT = new.new_zeros(B, T, dtype=torch.bool)
        self.logps_BT = new.new_zeros(B, T, dtype=torch.float32)
        self.record(prompts.logits_PV.repeat_interleave(copies, 0))

    def run(self) -> Completions:
        """Step until every completion has ended."""
        between_checks = 1 if self.ids_BT.device.type == "cpu" else _STEPS_BETWEEN_CHECKS
        for i in range(self.sampling.max_completion_length - 1):
            if i % between_checks == 0 and bool(self.done_B1.all()):
                break
            self.step()
        return Completions(self.ids_BT, self.mask_BT, self.logps_BT, self.done_B1[:, 0])

    def step(self) -> None:
        """Feed the last token of every row and sample the next, with no wait for the device."""
        logits_BV = self.model.forward(
            self.token_B1,
            self.position_B1,
            visible_BQL=self.visible_B1L,
            columns_Q=self.column_1,
            cache=self.cache,
        )
        self.position_B1 += 1
        self.column_1 += 1
        self.record(logits_BV)

    def record(self, logits_BV: torch.Tensor) -> None:
        """Sample a token a row and write it down; rows that have ended get padding."""
        token_B1, logp_B1 = _sample(logits_BV, self.sampling, self.generator)
        token_B1 = token_B1.masked_fill(self.done_B1, self.model.pad_token_id)
        self.token_B1.copy_(token_B1)
        self.ids_BT.index_copy_(1, self.written_1, token_B1)
        self.mask_BT.index_copy_(1, self.written_1, ~self.done_B1)
        self.logps_BT.index_copy_(1, self.written_1, logp_B1.masked_fill(self.done_B1, 0.0))
        self.done_B1 |= (token_B1 == self.eos_E).any(-1, keepdim=True)
        self.written_1 += 1


def _sample(
    logits_BV: torch.Tensor, sampling: SamplingParams, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token a row; return it and its log-prob over the whole vocabulary, both (B, 1)."""
    if sampling.temperature == 0:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
        return token_B1, logits_BV.float().log_softmax(-1).gather(-1, token_B1)
    logps_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    scores_BK, candidates_BK = logps_BV, None
    if sampling.top_k or sampling.top_p < 1:
        vocabulary = logps_BV.shape[-1]
        scores_BK, candidates_BK = logps_BV.topk(min(sampling.top_k or vocabulary, vocabulary))
        probs_BK = scores_BK.softmax(-1)
        outside_BK = probs_BK.cumsum(-1) - probs_BK >= sampling.top_p
        scores_BK = scores_BK.masked_fill(outside_BK, float("-inf"))
    # Of exponential clocks with the probabilities as rates, each is the first to ring with its
    # probability; torch.multinomial draws from the same distribution but waits for the device.
    clocks_BK = torch.empty_like(scores_BK).exponential_(generator=generator)
    token_B1 = (scores_BK - clocks_BK.log_()).argmax(-1, keepdim=True)
    if candidates_BK is not None:
        token_B1 = candidates_BK.gather(-1, token_B1)
    return token_B1, logps_BV.gather(-1, token_B1)
