"""A forward of a causal LM for verl (0.9.1) that returns log-probs and entropies, no logits.

It takes the place of verl's own backends of its fused kernels: the same arguments and output, for
the models that those of `dense_common` are for.

B sequences, L positions, H hidden.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from fastgrpo_kernels import linear_logps


def forward_with_fastgrpo_backend(  # noqa: D417 - the others are those of transformers
    self: Any,
    input_ids: Tensor | None = None,  # (B, L)
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,  # (B, L, H)
    labels: Tensor | None = None,  # (B, L)
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    cache_position: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,  # (B, L)
    **loss_kwargs: Any,
) -> Any:
    """Compute log-probs and entropies in place of logits: a forward of a causal LM, as verl's are.

    Position t predicts `shift_labels[:, t]`; without them the token after it in `labels`, or else
    in `input_ids` (the last position predicts the first token, and means nothing).

    Args:
        self: the causal LM: runs `self.model`, and `self.lm_head` by `linear_logps`.
        temperature: divides the logits.
        labels: tokens to predict, not shifted.
        shift_labels: tokens to predict, each at the position that predicts it.
        return_dict, logits_to_keep: may not ask for a tuple, or for logits.
        **loss_kwargs: go to `self.model`, with the rest.

    Returns:
        verl's CausalLMOutputForPPO with `log_probs` and `entropy`, (B, L) fp32, differentiable.

    Raises:
        ValueError: there is nothing to predict, a tuple or logits are asked for, or the head has an
            adapter or no weight to multiply with.
    """
    if return_dict is False:
        raise ValueError("return_dict=False: the fused head returns log_probs and entropy by name")
    if not isinstance(logits_to_keep, int) or logits_to_keep:
        raise ValueError(f"logits_to_keep={logits_to_keep}: the fused head returns no logits")
    if shift_labels is None:
        tokens = input_ids if labels is None else labels
        if tokens is None:
            raise ValueError("the tokens to predict are missing: give shift_labels, labels or ids")
        shift_labels = tokens.roll(-1, -1)
    _check_lm_head(self)
    asked = {
        "output_attentions": output_attentions,
        "output_hidden_states": output_hidden_states,
        "cache_position": cache_position,
    }
    outputs = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **{name: value for name, value in asked.items() if value is not None},
        **loss_kwargs,
    )
    log_probs, entropy = linear_logps(
        outputs.last_hidden_state,
        self.lm_head.weight,
        shift_labels,
        bias=self.lm_head.bias,
        temperature=temperature,
    )
    return import_module("verl.models.transformers.dense_common").CausalLMOutputForPPO(
        log_probs=log_probs,
        entropy=entropy,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def use_fused_head(model: Any) -> None:
    """Give the class of a causal LM `forward_with_fastgrpo_backend`, as verl gives it its own.

    Args:
        model: a text model of transformers with `model.model` and `model.lm_head`; before adapters
            and sharding.

    Raises:
        ValueError: its logits are not `lm_head(hidden)`, as far as its configuration tells, or it
            does not see text alone; says how to go on.
    """
    name = type(model).__name__
    remedy = "set actor_rollout_ref.model.use_fused_kernels=False"
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"the fused head is for models of text alone, not for {name}: {remedy}")
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise ValueError(f"{name} has no decoder called `model`, as verl expects: {remedy}")
    _check_lm_head(model)
    # Imported here, since it needs transformers.
    from ..head import logit_options

    said = [f"{key} = {value}" for key, value in logit_options(model).items() if value != 1]
    if said:
        raise ValueError(
            f"the logits of {name} are not its LM head's alone, its config says "
            f"{', '.join(said)}: {remedy}"
        )
    type(model).forward = forward_with_fastgrpo_backend


def _check_lm_head(model: Any) -> None:
    """Refuse an LM head that is more than one matrix; adapters come after the model is patched."""
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"lm_head of {type(model).__name__} is {type(head).__name__}, whose weight is not all "
            "there is to its logits: the fused head needs a torch.nn.Linear; leave lm_head out of "
            "adapters (target_modules) and quantisation, or use_fused_kernels=False"
        )
