"""Weights as the CPU kernels stream them: 32-bit words whose lanes are output channels (csrc/cpu_kernels.h).

    fp32   the weight
    bf16   rounded to nearest even: half the bytes
    int8   w ≈ s·q, −127 ≤ q ≤ 127, one float32 s per output: a quarter
    int4   w ≈ s·q + o, 0 ≤ q ≤ 15, float16 s and o per output and group of 64 inputs: 4.5 bits

int4 tries a few ranges narrower than min … max, fits s and o to each by least squares, and keeps the one with the
smallest squared error: clipping an outlier often costs less than a coarser step for the other 63. The group of 64 is
the trade-off: 32 would cost another half bit, a ninth of the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "int4")
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}
INTEGER = ("int8", "int4")  # whose products round their inputs too
PANEL = 32
GROUP = 64
RANGES = (1.0, 0.92, 0.84)  # shares of a group's range that int4 tries
ROWS = 64  # outputs quantized at a time: their copies stay in a core's cache


@dataclass(frozen=True)
class PackedWeight:
    """A packed (outputs, inputs) matrix. words: (panels, blocks, 32) int32; scales: empty where the format has none."""

    format: str
    outputs: int
    inputs: int
    words: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.words, self.scales))


def pack(weight: Tensor, format: str) -> PackedWeight:
    """Packs a weight (outputs, inputs), any float dtype, on the CPU."""
    if format not in FORMATS:
        raise ValueError(f"weights {format!r}: use one of {', '.join(FORMATS)}")
    outputs, inputs = weight.shape
    multiple = GROUP if format in INTEGER else PER_WORD[format]
    weight = torch.nn.functional.pad(
        weight.detach().to("cpu", torch.float32), (0, -inputs % multiple, 0, -outputs % PANEL)
    )
    scales = torch.empty(0)
    if format == "fp32":
        codes = weight.contiguous().view(torch.int32)
    elif format == "bf16":
        codes = weight.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    elif format == "int8":
        scales = weight.abs().amax(1).clamp_min(1e-30) / 127
        codes = (weight / scales[:, None]).round().to(torch.int32)
    else:
        parts = [_int4(part) for part in weight.split(ROWS)]
        codes, pairs = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        groups = pairs.size(1)  # (outputs, groups, 2) → (panel, group, 2, lane)
        scales = pairs.view(-1, PANEL, groups, 2).permute(0, 2, 3, 1).contiguous()
    return PackedWeight(format, outputs, inputs, _words(codes, PER_WORD[format]), scales)


def unpack(packed: PackedWeight) -> Tensor:
    """The (outputs, inputs) float32 matrix that a packed weight stands for."""
    per, words = PER_WORD[packed.format], packed.words
    bits = 32 // per
    shifted = torch.stack([words << (32 - bits * (i + 1)) for i in range(per)], -1)  # (panels, blocks, 32, per), on top
    if packed.format in ("fp32", "bf16"):
        values = (shifted & (-1 << (32 - bits))).view(torch.float32)
    elif packed.format == "int8":
        values = (shifted >> 24).float()
    else:
        values = ((shifted >> 28) & 15).float()
    dense = values.permute(0, 2, 1, 3).reshape(words.size(0) * PANEL, -1)
    if packed.format == "int8":
        dense = dense * packed.scales[:, None]
    if packed.format == "int4":
        pairs = packed.scales.float().permute(2, 0, 3, 1).reshape(2, len(dense), -1)  # scale, offset per output, group
        scale, offset = pairs.repeat_interleave(GROUP, dim=2)
        dense = dense * scale + offset
    return dense[: packed.outputs, : packed.inputs]


def round_inputs(x: Tensor, format: str) -> Tensor:
    """What a product with int8 or int4 weights makes of its inputs (..., inputs) float32: integers from −127 to 127,
    times a scale per group. The other formats take them as they are."""
    if format not in INTEGER:
        return x
    groups = torch.nn.functional.pad(x, (0, -x.size(-1) % GROUP)).unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 1e-35, 1 / step, 0.0)
    return ((groups * inverse).round() * step).flatten(-2)[..., : x.size(-1)]


def _words(codes: Tensor, per: int) -> Tensor:
    """(outputs, inputs) int32 codes → (panels, inputs/per, 32) words, the first code in the low bits."""
    panels = codes.size(0) // PANEL
    codes = codes.view(panels, PANEL, -1, per)
    bits = 32 // per
    mask = -1 if per == 1 else (1 << bits) - 1
    words = codes[..., 0] & mask
    for i in range(1, per):
        words = words | ((codes[..., i] & mask) << (bits * i))
    return words.transpose(1, 2).contiguous()


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, inputs) → int32 codes of that shape and (rows, groups, 2) float16: scale and offset."""
    w = weight.view(weight.size(0), -1, GROUP)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    middle, reach = (low + high) / 2, (high - low) / 2
    best = torch.full_like(low, torch.inf)
    codes, scale, offset = torch.zeros_like(w), torch.zeros_like(low), torch.zeros_like(low)
    for share in RANGES:
        s, o = (reach * (share * 2 / 15)).clamp_min(1e-7), middle - reach * share
        q = ((w - o) / s).round_().clamp_(0, 15)
        s, o = _fit(w, q, s, o)
        q = ((w - o) / s).round_().clamp_(0, 15)
        error = (q * s + o - w).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, scale, offset = (torch.where(better, n, c) for n, c in ((q, codes), (s, scale), (o, offset)))
    return codes.to(torch.int32).view_as(weight), torch.cat([scale, offset], -1).half()


def _fit(w: Tensor, q: Tensor, s: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale and offset of given codes, rounded to what is stored; s and o where it has none."""
    mean_q, mean_w = q.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    centered = q - mean_q
    spread = centered.square().sum(-1, keepdim=True)
    slope = (centered * w).sum(-1, keepdim=True) / spread.clamp_min(1e-12)
    usable = (spread > 1e-6) & (slope > 1e-7)
    s = torch.where(usable, slope, s).half().float().clamp_min(1e-7)
    return s, torch.where(usable, mean_w - s * mean_q, o).half().float()
