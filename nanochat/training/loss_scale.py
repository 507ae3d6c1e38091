"""Dynamic loss scaling for float16, whose gradients below 6e-8 vanish and above 65,504 overflow.

The loss is multiplied by a scale before the backward pass and the gradients divided by it after. A step whose
gradients overflow is skipped and the scale halved; after GROWTH_INTERVAL good steps it doubles. All ranks decide alike.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import NanochatError
from nanochat.runtime import Runtime

INITIAL_SCALE = 2.0**16
SMALLEST_SCALE = 1.0
GROWTH_INTERVAL = 2000


class LossScaler:
    """Holds the scale; `unscale` after the backward pass says whether the step may be made."""

    def __init__(self, runtime: Runtime, scale: float = INITIAL_SCALE, good_steps: int = 0) -> None:
        self.runtime, self.scale, self.good_steps = runtime, scale, good_steps

    def unscale(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Divides the gradients by the scale in place and adapts it. True: one overflowed on some rank, so skip."""
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        found = torch.zeros((), dtype=torch.float32, device=self.runtime.device)
        torch._foreach_mul_(grads, 1.0 / self.scale)
        if grads:
            norms = torch.stack([norm.float() for norm in torch._foreach_norm(grads)])
            found = (~torch.isfinite(norms)).any().float()
        if self.runtime.distributed:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        overflow = bool(found.item())
        self._adapt(overflow)
        return overflow

    def _adapt(self, overflow: bool) -> None:
        if overflow:
            self.scale, self.good_steps = self.scale / 2, 0
            if self.scale < SMALLEST_SCALE:
                raise NanochatError(
                    f"float16 gradients overflow even at a loss scale of {2 * self.scale:g}; "
                    "use --dtype bfloat16 or float32"
                )
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}
