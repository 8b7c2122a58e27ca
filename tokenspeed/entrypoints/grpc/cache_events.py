"""KV events of the protocol: which blocks can be found, told by the hashes that the control plane gave them."""

from __future__ import annotations

from typing import Any

from smg_grpc_proto.generated import common_pb2 as common


def batch_message(batch: Any, block_size: int) -> common.KvEventBatch:
    """One numbered batch."""
    raise NotImplementedError
