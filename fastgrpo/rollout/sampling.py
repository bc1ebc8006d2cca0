"""Drawing tokens: one uniform number a row, and no wait for the device.

B rows, V vocabulary, K candidate tokens, N blocks of W columns, M of either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.rollout import SamplingParams

_BLOCK = 128  # divides most vocabularies, and leaves about a thousand blocks of the largest


def sample(
    logits_BV: Tensor,  # overwritten
    sampling: SamplingParams,
    uniform_B1: Tensor,  # fp64 in [0, 1); not read when decoding is greedy
) -> tuple[Tensor, Tensor]:
    """Draw a token a row; return it and its log-prob over the whole vocabulary, both (B, 1)."""
    greedy = sampling.temperature == 0
    if not greedy and sampling.temperature != 1:
        logits_BV = logits_BV.float().div_(sampling.temperature)
    probs_BV = logits_BV.softmax(-1, dtype=torch.float32)
    blocks_BNW, mass_BN = _blocks(probs_BV)
    total_B1 = mass_BN.sum(-1, keepdim=True)
    if greedy:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
    elif sampling.top_k or sampling.top_p < 1:
        vocabulary = probs_BV.shape[-1]
        kept_BK, candidates_BK = probs_BV.topk(min(sampling.top_k or vocabulary, vocabulary))
        before_BK = kept_BK.cumsum(-1, dtype=torch.float64) - kept_BK
        outside_BK = before_BK >= sampling.top_p * kept_BK.sum(-1, keepdim=True)
        kept_BK.masked_fill_(outside_BK, 0)
        _drop_unlikely(kept_BK, sampling.min_p)
        token_B1 = candidates_BK.gather(-1, draw(*_blocks(kept_BK), uniform_B1))
    else:
        if sampling.min_p:
            _drop_unlikely(probs_BV, sampling.min_p)  # what is drawn keeps its probability
            blocks_BNW, mass_BN = _blocks(probs_BV)
        token_B1 = draw(blocks_BNW, mass_BN, uniform_B1)
    # In fp32, 150 000 probabilities miss 1 by 1e-5.
    return token_B1, (probs_BV.gather(-1, token_B1) / total_B1).log().float()


def _drop_unlikely(probs_BM: Tensor, min_p: float | None) -> None:
    """Set to 0 what is less than `min_p` times as likely as the likeliest of its row."""
    if min_p:
        probs_BM.masked_fill_(probs_BM < min_p * probs_BM.amax(-1, keepdim=True), 0)


def draw(
    blocks_BNW: Tensor,  # not negative, something in each row above 0
    mass_BN: Tensor,  # fp64 sums of the blocks
    uniform_B1: Tensor,  # fp64 in [0, 1)
) -> Tensor:
    """Return the column of each row that inverts its cumulative distribution, (B, 1).

    It takes two short cumulative sums in fp64, over the blocks and over the columns of one, not
    one over the vocabulary. A column of weight 0 is never drawn.
    """
    block_B1, inside_B1 = _invert(mass_BN, uniform_B1)
    # `take_along_dim` would make it with a remainder of indices that are in range.
    index_B1W = block_B1[:, :, None].expand(-1, -1, blocks_BNW.shape[-1])
    block_BW = blocks_BNW.gather(1, index_B1W)[:, 0]
    column_B1, _ = _invert(block_BW.double(), inside_B1)
    return block_B1 * blocks_BNW.shape[-1] + column_B1


def _blocks(weights_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Cut rows into blocks, (B, N, W), and sum these, (B, N) in fp64."""
    width = min(_BLOCK, weights_BV.shape[-1])
    missing = -weights_BV.shape[-1] % width
    padded_BV = F.pad(weights_BV, (0, missing)) if missing else weights_BV  # it always copies
    blocks_BNW = padded_BV.unflatten(-1, (-1, width))
    return blocks_BNW, blocks_BNW.sum(-1).double()


def _invert(mass_BM: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return whose mass a share of the total falls into, and at which share of that mass."""
    upto_BM = mass_BM.cumsum(-1)
    # What has no mass cannot be met, even where a parallel sum is not monotone by a rounding.
    upto_BM = upto_BM.masked_fill(mass_BM == 0, -1)
    total_B1 = upto_BM.amax(-1, keepdim=True)
    # A product just below the total may round up to it, which lies beyond all.
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
    share_B1 = (uniform_B1 * total_B1).minimum(below_B1)
    index_B1 = (upto_BM > share_B1).byte().argmax(-1, keepdim=True)  # the first
    mass_B1 = mass_BM.gather(-1, index_B1)
    start_B1 = upto_BM.gather(-1, index_B1) - mass_B1
    return index_B1, ((share_B1 - start_B1) / mass_B1).clamp(0, 1)
