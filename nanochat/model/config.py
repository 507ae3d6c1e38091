"""The shape of a model. One dial, depth, sets all of it (`GPTConfig.from_depth`); every field can also be set alone.

Two architectures exist. "2026" is today's: value embeddings, smear, backout, per-layer scalars, sliding windows.
"2025-10" is the one that nanochat began with, a plain transformer with rotary embeddings and QK norm; it is kept so
that checkpoints of that time load, and because Hugging Face transformers knows it by the name NanoChat.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nanochat.errors import UsageError

Architecture = Literal["2026", "2025-10"]
VOCAB_MULTIPLE = 64  # tables are padded to it, so that matrix products meet whole tiles
WINDOW_MULTIPLE = 128  # a short window is a whole number of attention tiles


@dataclass(frozen=True)
class GPTConfig:
    """Sizes in tokens, layers, channels and heads. Invalid combinations raise UsageError when the config is made."""

    vocab_size: int
    seq_len: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    window_pattern: str = "SSSL"
    architecture: Architecture = "2026"
    bf16_rotary: bool = False  # rotary tables hold bfloat16 values whatever the compute dtype, as at first

    @classmethod
    def from_depth(
        cls,
        depth: int,
        vocab_size: int,
        seq_len: int = 2048,
        head_dim: int = 128,
        window_pattern: str = "SSSL",
        kv_heads: int | None = None,
        architecture: Architecture = "2026",
        aspect_ratio: int = 64,
    ) -> "GPTConfig":
        """The model of `depth` layers: width = aspect_ratio·depth rounded up to whole heads."""
        if depth < 1:
            raise UsageError(f"depth {depth} is too small; a model has at least 1 layer")
        if head_dim < 2:
            raise UsageError(f"head size {head_dim} is too small; it is an even number of at least 2")
        heads = -(-aspect_ratio * depth // head_dim)
        return cls(
            vocab_size=vocab_size,
            seq_len=seq_len,
            layers=depth,
            width=heads * head_dim,
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            window_pattern=window_pattern,
            architecture=architecture,
        )

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "layers", "width", "heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.heads * self.head_dim != self.width:
            raise UsageError(f"{self.heads} heads of {self.head_dim} channels do not make a width of {self.width}")
        if self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads; use a divisor")
        if self.head_dim % 2:
            raise UsageError(f"head size {self.head_dim} is odd; rotary embeddings turn pairs of channels")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise UsageError(f"window pattern {self.window_pattern!r}: use the letters S (short) and L (long)")
        if self.architecture not in ("2026", "2025-10"):
            raise UsageError(f"unknown architecture {self.architecture!r}; use 2026 or 2025-10")
        if self.is_current and self.width < 24:
            raise UsageError(f"width {self.width} is below 24, what the smear gate reads; raise depth or head size")

    @property
    def is_current(self) -> bool:
        """True for today's architecture, with value embeddings, smear, backout and per-layer scalars."""
        return self.architecture == "2026"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables and of lm_head as stored; logits are cropped to vocab_size."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many keys before its own a query sees. The last layer always sees everything."""
        if not self.is_current:
            return (self.seq_len,) * self.layers
        short = -(-self.seq_len // (4 * WINDOW_MULTIPLE)) * WINDOW_MULTIPLE
        size = {"S": short, "L": self.seq_len}
        tiled = [size[self.window_pattern[i % len(self.window_pattern)]] for i in range(self.layers)]
        return (*tiled[:-1], self.seq_len)

    @property
    def rope_base(self) -> float:
        return 100_000.0 if self.is_current else 10_000.0

    @property
    def qk_scale(self) -> float:
        """What normalised queries and keys are multiplied by: sharper attention than 1."""
        return 1.2 if self.is_current else 1.0

    @property
    def middle_layer(self) -> int:
        """The layer whose output is subtracted again before the head (backout)."""
        return self.layers // 2

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer mixes a value embedding into its values, the last one always."""
        return self.is_current and layer % 2 == (self.layers - 1) % 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError(f"unknown model settings {sorted(unknown)}; was this file written by a newer version?")
        return cls(**values)
