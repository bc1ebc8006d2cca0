"""The loss by the signature of Liger's `LigerFusedLinearGRPOLoss`: one import line changes.

Written against liger-kernel 0.8.5, which need not be installed. Options mean what they mean there,
also where our own functions differ; what cannot be had is refused when the module is made.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgrpo_kernels import GRPOLossConfig, linear_grpo_loss, linear_logps
from fastgrpo_kernels.config import LOG_MAX, LOG_MIN, Number

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_STEP_MEANS = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole step
_TOKENS_ONLY = ("cispo", "sapo", "vespo")
_LOSS_TYPES = (*_CLIPPED, *_TOKENS_ONLY)


class FusedLinearGRPOLoss(nn.Module):
    """The GRPO loss of an LM head, called as `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`.

    Differences from Liger, beside speed and memory:

    - What stands behind the mask never counts, a NaN included (but for `vllm_is_ratio`, below). So
      `luspo` is refused where Liger trains on padding: at token level, and with a KL divergence.
    - In 16 bits the gradients of the logits are rounded as PyTorch rounds them; Liger multiplies
      them in fp32, at the price of fp32 products.
    - A reference that `use_ref_model=False` would leave unread is refused.
    - Exponents of log-ratios stop at 60, where Liger overflows.
    - Rows that cannot contribute (advantage 0, no KL divergence) are not computed: a NaN in them,
      which Liger would meet, goes unseen.
    - `GRPOLossConfig` refuses what has no meaning: a `delta` inside the clip range, bounds or
      temperatures that are negative. It warns of `cispo` with `epsilon_high` below 1.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        """Keep the options; each may be changed later, as an attribute of its name.

        Args:
            beta: weight of the KL divergence to the reference.
            compiled: changes nothing: it is Liger's torch code that needs a compiler.
            use_ref_model: whether there is a reference. False with beta other than 0: the policy
                is its own reference, and the divergence 0.
            chunk_size: changes nothing: rows are chunked by a budget of bytes, not by sequences
                (`linear_grpo_loss` has `chunk_rows`).
            epsilon_low: ratios are clipped below at 1 - epsilon_low.
            epsilon_high: and above at 1 + epsilon_high; `cispo`: at epsilon_high itself.
            loss_type: grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo or vespo.
            max_completion_length: the constant in the denominator of `dr_grpo`.
            importance_sampling_level: "token", or "sequence" for the clipped losses.
            sapo_temperature_pos: where the advantage is positive.
            sapo_temperature_neg: elsewhere.
            temperature: divides the logits.
            delta: upper bound of the ratio in the unclipped branch, which `cispo`, `sapo` and
                `vespo` do not have.
            use_bias_correction_kl: multiply the KL divergence by the ratio.
            vespo_k_pos: exponent where the advantage is not negative.
            vespo_lambda_pos: rate there; 1e-4 at least.
            vespo_k_neg: exponent where the advantage is negative.
            vespo_lambda_neg: rate there; 1e-4 at least.

        Raises:
            ValueError: a value is outside its range, or two values exclude each other.
        """
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._config()  # refuses before the first step what no step can compute

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B,), (B, 1) or (B, T)
        num_items_in_batch: Number | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss and its gradients without the logits of all tokens.

        Args:
            _input: last hidden states; `_input[:, t]` predicts `selected_token_ids[:, t]`.
            lin_weight: the LM head, used in the type of `_input`; a frozen one costs no product.
            selected_token_ids: the tokens that were sampled.
            attention_mask: 0 and 1 of any type: tokens that count.
            advantages: one a sequence; (B, T) works as well.
            bias: of the LM head.
            ref_per_token_logps: log-probs of the reference; None: from `ref_input`, if beta is not
                0.
            old_per_token_logps: log-probs at the start of the optimisation step; None: on-policy.
            ref_input: hidden states of the reference.
            ref_weight: LM head of the reference.
            ref_bias: of that head.
            vllm_is_ratio: correction for the sampler. One a token, `vespo` multiplies and `luspo`
                averages them over all positions, as in Liger: give 1 behind the mask, as TRL does.
            num_items_in_batch: counted tokens of the whole step over all ranks, for `dapo`,
                `cispo` and `vespo`, whose loss is multiplied by the number of ranks; the others
                do not use it. None: those of this call over all ranks.

        Returns:
            The loss, and a tuple of detached means over counted tokens: the KL divergence if beta
            is not 0, then the fraction of clipped tokens, 0 for `sapo` and `vespo`.

        Raises:
            ValueError: shapes, types, devices or values that do not fit; the message holds them.
            TypeError: something else than a tensor.
        """
        config = self._config()
        _check_shapes(
            selected_token_ids,
            {"_input": _input, "ref_input": ref_input},
            {
                "attention_mask": attention_mask,
                "ref_per_token_logps": ref_per_token_logps,
                "old_per_token_logps": old_per_token_logps,
            },
        )
        if self.use_ref_model:
            if ref_per_token_logps is None and (ref_input is None or ref_weight is None):
                raise ValueError(
                    "use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight: "
                    "give them, or use_ref_model=False"
                )
            if ref_per_token_logps is not None and ref_input is not None:
                warnings.warn(
                    "ref_per_token_logps and ref_input are both given: the first is used",
                    stacklevel=2,
                )
        elif self.beta and (ref_per_token_logps is not None or ref_input is not None):
            raise ValueError(
                f"use_ref_model=False would leave the reference unread at beta={self.beta}: set it "
                "to True, or give no reference"
            )
        if config.beta and ref_per_token_logps is None:
            assert ref_input is not None and ref_weight is not None
            with torch.no_grad():
                ref_per_token_logps, _ = linear_logps(
                    ref_input,
                    _in_type_of(ref_input, ref_weight),
                    selected_token_ids,
                    bias=_in_type_of(ref_input, ref_bias),
                    mask=attention_mask,
                    temperature=self.temperature,
                )
        out = linear_grpo_loss(
            _input,
            _in_type_of(_input, lin_weight),
            selected_token_ids,
            advantages,
            bias=_in_type_of(_input, bias),
            completion_mask=attention_mask,
            old_logps=old_per_token_logps,
            ref_logps=ref_per_token_logps,
            importance_sampling_ratio=self._correction(vllm_is_ratio, attention_mask),
            num_items_in_batch=self._denominator(num_items_in_batch, attention_mask, _input.device),
            # A row with an advantage of 0 is not clipped, one with a ratio of 0 may be.
            statistics="active" if vllm_is_ratio is None else "all",
            config=config,
        )
        mask_BT = attention_mask.to(_input.device) != 0
        metrics = [self._clip_fraction(out.logps, old_per_token_logps, advantages, mask_BT)]
        if self.beta:
            metrics.insert(0, out.metrics["kl"] if config.beta else torch.zeros_like(metrics[0]))
        return out.loss, tuple(metrics)

    def _config(self) -> GRPOLossConfig:
        """Return the options as ours; attributes may have changed since the last call."""
        beta = self.beta if self.use_ref_model else 0.0
        level: Any = self.importance_sampling_level
        by_sequence = level == "sequence"
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"loss_type must be one of {', '.join(_LOSS_TYPES)}, got {self.loss_type!r}"
            )
        if by_sequence and self.loss_type in _TOKENS_ONLY:
            raise ValueError(
                f"importance_sampling_level='sequence' is not defined for loss_type="
                f"{self.loss_type!r} in Liger: use 'token', or fastgrpo.linear_grpo_loss"
            )
        if self.loss_type == "luspo" and (not by_sequence or beta):
            raise ValueError(
                f"loss_type='luspo' with importance_sampling_level={level!r} and beta={beta} "
                "trains on padding in Liger: use 'sequence' and beta=0, or "
                "fastgrpo.linear_grpo_loss, which masks it"
            )
        return GRPOLossConfig(
            loss_type=self.loss_type,
            importance_sampling_level=level,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=max(self.vespo_lambda_pos, 1e-4),
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=max(self.vespo_lambda_neg, 1e-4),
        )

    def _correction(self, ratio: Tensor | None, mask: Tensor) -> Tensor | None:
        """Return the sampler correction such that ours does with it what Liger does."""
        if ratio is None:
            return None
        B, T = mask.shape
        if tuple(ratio.shape) not in ((B,), (B, 1), (B, T)):
            raise ValueError(
                f"vllm_is_ratio must be ({B},), ({B}, 1) or ({B}, {T}), got {tuple(ratio.shape)}"
            )
        if ratio.dim() == 1 or ratio.shape[1] == 1:
            return ratio
        # Liger lets the ratios of all positions into one of the sequence, masked ones too.
        ratio_BT = ratio.detach().float()
        if self.loss_type == "luspo":
            return ratio_BT.mean(1)
        if self.loss_type != "vespo":
            return ratio
        # Their product, which may be beyond the bounds of one: each counted token takes its share.
        log_B1 = ratio_BT.log().clamp(LOG_MIN, LOG_MAX).sum(1, keepdim=True)
        length_B1 = (mask.to(ratio.device) != 0).sum(1, keepdim=True)
        return (log_B1 / length_B1).exp().expand(B, T)

    def _denominator(
        self, num_items_in_batch: Number | None, mask: Tensor, device: torch.device
    ) -> Number | None:
        """Return the tokens of the step a rank: Liger leaves it to DDP to average over ranks."""
        if self.loss_type not in _STEP_MEANS:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            return num_items_in_batch
        if num_items_in_batch is None:
            num_items_in_batch = (mask != 0).sum().to(device)
            dist.all_reduce(num_items_in_batch)
        return num_items_in_batch / dist.get_world_size()

    def _clip_fraction(
        self, logps_BT: Tensor, old_BT: Tensor | None, advantages: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the fraction of counted tokens whose ratio, or their sequence's, is clipped."""
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        if self.loss_type == "cispo":
            low, high = -math.inf, self.epsilon_high
        elif self.loss_type in _TOKENS_ONLY:
            return logps_BT.new_zeros(())
        log_ratio = torch.zeros_like(logps_BT)
        if old_BT is not None:
            log_ratio = torch.where(mask_BT, logps_BT - old_BT, 0)
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        ratio = log_ratio.exp()
        advantages = advantages.to(ratio.device)
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        return (clipped & mask_BT).sum() / mask_BT.sum().clamp(min=1)


def _check_shapes(ids: Tensor, rows: dict[str, Any], tokens: dict[str, Any]) -> None:
    """Refuse, by Liger's names, what is not (B, T, H) or (B, T) as the ids are."""
    for name, x in {"selected_token_ids": ids, **rows, **tokens}.items():
        if x is None and name.startswith(("ref_", "old_")):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        wanted = "(B, T, H)" if name in rows else "(B, T)"
        shape = x.shape[:-1] if name in rows else x.shape
        if len(shape) != 2 or shape != ids.shape:
            raise ValueError(
                f"{name} must be {wanted}, got {tuple(x.shape)} with selected_token_ids "
                f"{tuple(ids.shape)}"
            )


def _in_type_of(hidden: Tensor, x: Any) -> Any:
    """Convert a head as Liger does; what is no tensor is left to the loss to refuse."""
    return x.to(hidden.dtype) if isinstance(x, Tensor) else x
