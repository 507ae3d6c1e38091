"""Work that one rank does for all: its result, or its error, reaches every rank, so that none waits for ever."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nanochat.errors import NanochatError
from nanochat.runtime import Runtime

T = TypeVar("T")


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its (picklable) result, or raises its NanochatError, on every rank."""
    if not runtime.distributed:
        return work()
    message: list[Any] = [None, None]
    if runtime.is_main:
        try:
            message[0] = work()
        except NanochatError as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]
