"""Decoding on a static KV cache: a model reads prompts once, then grows their completions.

A step writes only to tensors whose addresses do not change and never waits for the device, so a
CUDA graph can capture it. Rows that have ended are dropped between steps.

P prompts, G completions a prompt, B completions decoded together, N of them that go on, T
completion positions, S prompt positions (padded on the left), L = S + T cache positions, Q queries,
V vocabulary, E end-of-sequence ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from fastgrpo.rollout import Completions, SamplingParams
from fastgrpo.rollout.cache import filled_layers, keep_rows, new_cache
from fastgrpo.rollout.sampling import sample

StepMaker: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]


def as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step: it runs eagerly."""
    return step


@dataclass(frozen=True)
class Prompts:
    """Prompts the model has read."""

    cache: StaticCache
    logits_PV: Tensor  # of the first token of a completion
    lengths_P1: Tensor
    valid_PS: Tensor  # False on the left padding


class StaticModel:
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

    @property
    def attentions(self) -> tuple[str, ...]:
        """Attentions that take 4-D masks; a model that has none of these is given the first."""
        softcap = getattr(self.config, "attn_logit_softcapping", None)
        if softcap is not None or not getattr(self.model, "_supports_sdpa", True):
            return ("eager",)
        return ("sdpa", "eager")

    def prefill(self, prompt_ids: list[list[int]]) -> Prompts:
        """Read prompts, padded on the left to the longest."""
        length = max(map(len, prompt_ids))
        padded = [[self.pad_token_id] * (length - len(ids)) + ids for ids in prompt_ids]
        ids_PS = torch.tensor(padded, device=self.model.device)
        lengths_P1 = ids_PS.new_tensor([[len(ids)] for ids in prompt_ids])
        columns_S = torch.arange(length, device=ids_PS.device)
        positions_PS = columns_S - (length - lengths_P1)
        valid_PS = positions_PS >= 0
        cache = new_cache(self.config, length)
        logits_PV = self.forward(
            ids_PS,
            positions_PS.clamp(min=0),
            # Padding sees padding: a row that sees nothing would be NaN.
            visible_BQL=valid_PS[:, :, None] == valid_PS[:, None, :],
            columns_Q=columns_S,
            cache=cache,
        )
        return Prompts(cache, logits_PV, lengths_P1, valid_PS)

    def forward(
        self,
        ids_BQ: Tensor,
        positions_BQ: Tensor,
        *,
        visible_BQL: Tensor,  # causality and windows aside
        columns_Q: Tensor,  # where in the cache the queries are
        cache: StaticCache,
    ) -> Tensor:
        """Append tokens to the cache and return the logits after the last, (B, V)."""
        first: Any = cache.layers[0]
        visible_BQL = visible_BQL[..., : first.read(ids_BQ.shape[1])]
        age_QL = columns_Q[:, None] - torch.arange(visible_BQL.shape[-1], device=columns_Q.device)
        masks: dict[str, Tensor] = {}
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


@dataclass(frozen=True)
class _Rows:
    """Completions that are being decoded: the tensors that a step reads and writes."""

    number_B: Tensor  # of the completion, in the order asked for
    max_length_B1: Tensor
    uniforms_BT: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    logps_BT: Tensor
    visible_B1L: Tensor
    token_B1: Tensor
    position_B1: Tensor
    done_B1: Tensor

    def __len__(self) -> int:
        return len(self.number_B)

    def take(self, rows_N: Tensor) -> _Rows:
        """Copy some rows."""
        return _Rows(*(getattr(self, field.name)[rows_N] for field in fields(self)))


class Decoder:
    """The completions of some prompts while they grow."""

    def __init__(
        self,
        model: StaticModel,
        prompts: Prompts,
        copies: int,
        sampling: SamplingParams,
        uniforms_BT: Tensor,  # fp64 in [0, 1): a number for each token, wherever it is decoded
        *,
        grows: bool = False,  # its cache: steps attend to less, but cannot become a CUDA graph
        max_lengths: Sequence[int] | None = None,  # P, of a prompt's completions; None: T
    ):
        self.model, self.sampling = model, sampling
        P, S = prompts.valid_PS.shape
        B, T = P * copies, sampling.max_completion_length
        new = prompts.lengths_P1  # int64, on the model's device

        self.cache: Any = new_cache(model.config, S + T, grows=grows)
        for i, layer in filled_layers(prompts.cache):
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None
            self.cache.update(
                keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), i
            )

        visible_B1L = new.new_ones(B, 1, S + T, dtype=torch.bool)
        visible_B1L[:, 0, :S] = prompts.valid_PS.repeat_interleave(copies, 0)
        self.eos_E = new.new_tensor([*model.eos_token_ids, *sampling.stop_token_ids])
        max_length_P1 = new.new_tensor(max_lengths or [T] * P)[:, None]
        self.column_1 = new.new_full((1,), S)
        self.written_1 = new.new_zeros(1)
        self.ended: list[_Rows] = []
        self.rows = _Rows(
            number_B=torch.arange(B, device=new.device),
            max_length_B1=max_length_P1.repeat_interleave(copies, 0),
            uniforms_BT=uniforms_BT,
            ids_BT=new.new_full((B, T), model.pad_token_id),
            mask_BT=new.new_zeros(B, T, dtype=torch.bool),
            logps_BT=new.new_zeros(B, T, dtype=torch.float32),
            visible_B1L=visible_B1L,
            token_B1=new.new_zeros(B, 1),
            position_B1=prompts.lengths_P1.repeat_interleave(copies, 0),
            done_B1=new.new_zeros(B, 1, dtype=torch.bool),
        )
        self.record(prompts.logits_PV.repeat_interleave(copies, 0))

    def run(
        self,
        *,
        make_step: StepMaker = as_it_is,
        steps_between_checks: int,
        share_to_go_on: float,
    ) -> Completions:
        """Step until every completion has ended.

        Args:
            make_step: returns what is called in place of `step`, anew after rows were dropped.
            steps_between_checks: a check waits for the device.
            share_to_go_on: rows that have ended are dropped when no more than this share goes on.
        """
        step = make_step(self.step)
        for i in range(self.sampling.max_completion_length - 1):
            if i % steps_between_checks == 0:
                going_on = int((~self.rows.done_B1).sum())
                if going_on == 0:
                    break
                if going_on <= share_to_go_on * len(self.rows):
                    del step  # a graph writes to the tensors that are about to go
                    self.drop_ended()
                    step = make_step(self.step)
            step()
        return self.completions()

    def drop_ended(self) -> None:
        """Go on with fewer rows."""
        rows, done_B = self.rows, self.rows.done_B1[:, 0]
        self.ended.append(rows.take(done_B.nonzero()[:, 0]))
        going_on_N = (~done_B).nonzero()[:, 0]
        self.rows = rows.take(going_on_N)
        keep_rows(self.cache, going_on_N)

    def completions(self) -> Completions:
        """Return all rows, in the order asked for."""
        parts = [*self.ended, self.rows]
        order_B = torch.cat([part.number_B for part in parts]).argsort()
        ids_BT = torch.cat([part.ids_BT for part in parts])[order_B]
        mask_BT = torch.cat([part.mask_BT for part in parts])[order_B]
        last_B1 = ids_BT.gather(1, mask_BT.sum(1, keepdim=True) - 1)
        return Completions(
            ids=ids_BT,
            mask=mask_BT,
            logps=torch.cat([part.logps_BT for part in parts])[order_B],
            finished=(last_B1 == self.eos_E).any(-1),
        )

    def step(self) -> None:
        """Feed the last token of every row and sample the next, with no wait for the device."""
        rows = self.rows
        logits_BV = self.model.forward(
            rows.token_B1,
            rows.position_B1,
            visible_BQL=rows.visible_B1L,
            columns_Q=self.column_1,
            cache=self.cache,
        )
        rows.position_B1.add_(~rows.done_B1)  # a model may have no more positions
        self.column_1 += 1
        self.record(logits_BV)

    def record(self, logits_BV: Tensor) -> None:
        """Sample a token a row and write it down; rows that have ended get padding."""
        rows, column_1 = self.rows, self.written_1
        uniform_B1 = rows.uniforms_BT.index_select(1, column_1)
        token_B1, logp_B1 = sample(logits_BV, self.sampling, uniform_B1)
        token_B1 = token_B1.masked_fill(rows.done_B1, self.model.pad_token_id)
        rows.token_B1.copy_(token_B1)
        rows.ids_BT.index_copy_(1, column_1, token_B1)
        rows.mask_BT.index_copy_(1, column_1, ~rows.done_B1)
        rows.logps_BT.index_copy_(1, column_1, logp_B1.masked_fill(rows.done_B1, 0.0))
        rows.done_B1.logical_or_((token_B1 == self.eos_E).any(-1, keepdim=True))
        self.written_1 += 1
        rows.done_B1.logical_or_(self.written_1 >= rows.max_length_B1)
