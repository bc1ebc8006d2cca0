"""Products of matrices: accumulated in fp32, rounded once, in what the device is quick at."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import MIB


def multiplies(x: Tensor) -> bool:
    """Say whether products of the type of `x` are fast on its device.

    A CPU without instructions for a 16-bit type takes up to 100 times as long as in fp32.
    """
    if x.device.type != "cpu" or x.dtype.itemsize > 2:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, accumulated in fp32 over a long inner dimension."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    if multiplies(a):
        return torch.mm(a, b)
    total = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    step = _slice_rows(a.shape[0] + b.shape[1], total.dtype)
    for first in range(0, a.shape[1], step):
        part = slice(first, first + step)
        torch.addmm(total, a[:, part].float(), b[part].float(), out=total)
    return total


def product_into(result: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Write a @ b + bias, accumulated in fp32, to a tensor of their type or a wider one."""
    if a.dtype == result.dtype and multiplies(a):
        if bias is None:
            torch.mm(a, b, out=result)
        else:
            torch.addmm(bias, a, b, out=result)
        return
    if a.is_cuda:
        torch.mm(a, b, out_dtype=result.dtype, out=result)
        if bias is not None:
            result += bias
        return
    wide = torch.promote_types(result.dtype, torch.float32)
    a = a.to(wide)
    step = _slice_rows(a.shape[1], wide)
    for first in range(0, b.shape[1], step):
        part = slice(first, first + step)
        out = result[:, part] if result.dtype == wide else None
        found = torch.mm(a, b[:, part].to(wide), out=out)
        if bias is not None:
            found += bias[part]
        if out is None:
            result[:, part] = found


def add_product(
    total: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, *, beta: int = 1
) -> None:
    """Add scale * a @ b to `total`, computed in its type and rounded once; beta 0: write it."""
    if scale is None and a.dtype == total.dtype and multiplies(a):
        torch.addmm(total, a, b, beta=beta, out=total)
        return
    if scale is None and a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
        return
    # In slices: the CPU has no product of 16-bit matrices with an fp32 result, and a factor that is
    # known to the device only has no other place.
    wide = torch.promote_types(a.dtype, torch.float32)
    b = b if a.is_cuda else b.to(wide)
    step = _slice_rows(max(a.shape[1], b.shape[1]), wide)
    for first in range(0, a.shape[0], step):
        a_part, part = a[first : first + step], total[first : first + step]
        if scale is None and total.dtype == wide:
            torch.addmm(part, _converted(a_part, wide), b, beta=beta, out=part)
            continue
        mixed = a.is_cuda and a.dtype != wide
        found = (
            torch.mm(a_part, b, out_dtype=wide) if mixed else torch.mm(_converted(a_part, wide), b)
        )
        found = found if scale is None else found.mul_(scale)
        part.copy_(found if beta == 0 else part + found)


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a matrix row by row as it lies in memory: a transposed one would be turned around."""
    return x.to(dtype) if x.stride(1) == 1 else x.t().to(dtype).t()


def _slice_rows(width: int, dtype: torch.dtype) -> int:
    """Return how many rows of `width` make 16 MiB."""
    return max(1, 16 * MIB // (max(width, 1) * dtype.itemsize))


def scaled(
    gradient: Tensor | None, scale: Tensor | None, dtype: torch.dtype, *, in_place: bool = False
) -> Tensor | None:
    """Return gradient * scale, multiplied in fp32 and rounded once to `dtype`, slice by slice.

    With `in_place` in the gradient's own memory, if that has the type.
    """
    if gradient is None or (scale is None and gradient.dtype == dtype):
        return gradient
    if in_place and scale is not None and gradient.dtype == dtype == scale.dtype:
        return gradient.mul_(scale)
    result = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    flat, out = gradient.view(-1), result.view(-1)
    step = 16 * MIB
    for first in range(0, len(flat), step):
        part = flat[first : first + step].to(wide)
        if scale is not None:
            part = part * scale if gradient.dtype == wide else part.mul_(scale)
        out[first : first + step] = part
    return result
