"""One thread from which steps with prompts are enqueued, whichever thread the engine runs in.

Libraries keep by thread what they prepared for a step: a plan of cuDNN's takes 35 to 70 ms to build, and is found again
by the thread alone that built it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

NAME = "tokenspeed-enqueue"


@functools.cache
def the_thread() -> ThreadPoolExecutor:
    """It, as what takes work."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=NAME)


def enqueued(work: Callable[[], Tensor], device: torch.device) -> Tensor:
    """`work`, done on that thread and on the current stream of this one; on a device without streams just done.

    To hand something over and have it back takes two threads' waking, each tens of microseconds: so whoever runs a step
    hands over all of it, and what asks again in there is there already.
    """
    if device.type != "cuda" or threading.current_thread().name.startswith(NAME):
        return work()
    return the_thread().submit(_on_stream, torch.cuda.current_stream(device), work).result()


@torch.inference_mode()
def _on_stream(stream: torch.cuda.Stream, work: Callable[[], Tensor]) -> Tensor:
    # The device too is this thread's own, and not yet the stream's: leaving the stream alone would go back to the first
    # device, and so begin to use it.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        return work()
