"""KV events of the protocol: which blocks can be found, by the hashes and tokens that the engine gave them."""

from __future__ import annotations

from array import array

from smg_grpc_proto.generated import common_pb2 as common

from tokenspeed.engine.cache_watch import CacheBatch, Removed, Stored


def batch_message(batch: CacheBatch, block_size: int) -> common.KvEventBatch:
    """One numbered batch; runs of blocks that follow each other in a chain, or of removed ones, are one event.

    Events bear the batch's number; those of a snapshot, which nobody published, bear 0.
    """
    event_id = batch.number if batch.snapshot is None else 0
    message = common.KvEventBatch(sequence_number=batch.number, timestamp=batch.timestamp)
    if batch.snapshot is not None:
        message.snapshot.index = batch.snapshot.index
        message.snapshot.count = batch.snapshot.count
        message.snapshot.blocks = batch.snapshot.num_blocks
    last: common.KvCacheEvent | None = None
    tail: int | None = None  # the hash at the end of the run in `last`
    for event in batch.events:
        if isinstance(event, Stored):
            if last is None or tail is None or event.parent != tail:
                last = message.events.add()
                last.event_id = event_id
                if event.parent is not None:
                    last.stored.parent_block_hash = event.parent
                last.stored.tier = common.KV_CACHE_TIER_DEVICE
            last.stored.blocks.add(
                block_hash=event.hash, token_ids=array("i", event.token_ids), block_size=block_size
            )
            tail = event.hash
        elif isinstance(event, Removed):
            if last is None or not last.HasField("removed"):
                last = message.events.add()
                last.event_id = event_id
            last.removed.block_hashes.append(event.hash)
            tail = None
        else:
            last = message.events.add()
            last.event_id = event_id
            last.cleared.SetInParent()
            last, tail = None, None
    return message
