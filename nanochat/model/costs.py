"""What a model costs, in parameters, FLOPs and bytes: one definition for training logs, benchmarks and the server.

A multiply-add is two FLOPs. MFU always divides by the device's dense bf16 peak, whatever precision runs, so that an FP8
run and a bf16 run compare. Attention counts the keys a window lets through, not the full square.
"""

import torch

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GATE_CHANNELS, SMEAR_CHANNELS

# Dense bf16 tensor-core peaks by datasheet, FLOP/s, matched against the device's name in this order.
PEAK_BF16 = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}
# Peak bandwidth of device memory by datasheet, bytes/s.
PEAK_BANDWIDTH = {
    "B200": 8e12,
    "H200": 4.8e12,
    "H100 PCIE": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100": 2.0e12,
}


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters as stored, padding included, by role; "total" is their sum."""
    rows, width, kv_width = config.padded_vocab_size, config.width, config.kv_heads * config.head_dim
    value_layers = sum(config.has_value_embedding(i) for i in range(config.layers))
    per_block = 2 * width * config.heads * config.head_dim + 2 * width * kv_width + 8 * width * width
    counts = {
        "wte": rows * width,
        "value_embeds": value_layers * rows * kv_width,
        "lm_head": rows * width,
        "matrices": config.layers * per_block + value_layers * GATE_CHANNELS * config.kv_heads,
        "scalars": 2 * config.layers + SMEAR_CHANNELS + 2 if config.is_current else 0,
    }
    return counts | {"total": sum(counts.values())}


def scaling_parameters(config: GPTConfig) -> int:
    """The parameters that scaling laws are fitted on here: block matrices and lm_head (padded)."""
    counts = parameter_counts(config)
    return counts["matrices"] + counts["lm_head"]


def linear_parameters(config: GPTConfig) -> int:
    """Parameters that meet every token in a matrix product: block matrices, lm_head and the smear gate."""
    return scaling_parameters(config) + (SMEAR_CHANNELS if config.is_current else 0)


def training_flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Forward and backward: 6 per linear parameter, and 12·H·D per key that a window admits."""
    tokens = config.seq_len if seq_len is None else seq_len
    keys = sum(min(window, tokens) for window in config.windows)
    return 6 * linear_parameters(config) + 12 * config.heads * config.head_dim * keys


def decode_flops(config: GPTConfig, context: int) -> int:
    """Forward FLOPs of one new token behind `context` cached ones."""
    keys = sum(min(window, context) for window in config.windows)
    return 2 * linear_parameters(config) + 4 * config.heads * config.head_dim * keys


def decode_bytes(config: GPTConfig, context: int, rows: int = 1, weight_bits: float = 16, kv_bits: float = 16) -> float:
    """Bytes that one decode step must read: all weights once, as stored, and per row the keys and values in sight.

    Embedding tables count by the rows looked up, not by their size.
    """
    looked_up = (config.width + parameter_counts(config)["value_embeds"] // config.padded_vocab_size) * rows
    keys = sum(min(window + 1, context) for window in config.windows)
    cached = 2 * config.kv_heads * config.head_dim * keys * rows
    return (linear_parameters(config) + looked_up) * weight_bits / 8 + cached * kv_bits / 8


def _by_name(table: dict[str, float], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).upper()
    return next((value for key, value in table.items() if key in name), None)


def peak_bf16_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by datasheet; None where it is not known, and then no MFU is shown."""
    return _by_name(PEAK_BF16, device)


def peak_bandwidth(device: torch.device) -> float | None:
    """Memory bandwidth in bytes/s by datasheet; None where it is not known."""
    return _by_name(PEAK_BANDWIDTH, device)
