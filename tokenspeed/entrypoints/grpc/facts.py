"""What a gateway asks about the model, the server and its load."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed import __version__
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.messages import EngineStats, PoolStats
from tokenspeed.errors import InvalidRequest

STARTED = time.time()
ALL = "all"
COUNTERS = ("prompt_tokens", "cached_tokens", "generation_tokens", "num_steps", "num_preemptions", "num_aborts")
"""Since the engine's start, as `EngineStats` has them."""


def model(engine: AsyncEngine, served_names: Sequence[str]) -> pb.GetModelInfoResponse:
    """What the model is. Ids that it does not have are left out."""
    facts, config, tokenizer = engine.facts, engine.config, engine.tokenizer
    return pb.GetModelInfoResponse(
        model_path=config.model or facts.model_name,
        tokenizer_path=config.tokenizer or config.model or facts.model_name,
        served_model_name=_name(engine, served_names),
        model_type=facts.model_type,
        architectures=[facts.architecture],
        max_context_length=facts.max_model_len,
        max_req_input_len=facts.max_model_len - 1,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        bos_token_id=tokenizer.bos_token_id or 0,
        default_sampling_params_json=json.dumps(facts.defaults) if facts.defaults else "",
    )


def server(engine: AsyncEngine, served_names: Sequence[str]) -> pb.GetServerInfoResponse:
    """What runs here and how large it is."""
    facts, config, stats = engine.facts, engine.config, engine.stats()
    groups = config.parallel.attn_dp or 1
    arguments = Struct()
    arguments.update(
        {
            "model": config.model or facts.model_name,
            "model_path": config.model or facts.model_name,
            "served_model_name": _name(engine, served_names),
            "tokenizer": config.tokenizer or config.model or facts.model_name,
            "tp_size": config.parallel.world // groups,
            "dp_size": groups,
            "context_length": facts.max_model_len,
            "max_total_tokens": facts.num_blocks * facts.block_size,
            "max_running_requests": config.max_num_seqs * groups,
            "max_queued_requests": config.max_queued_requests,
            "vocab_size": facts.vocab_size,
            "block_size": facts.block_size,
            "page_size": facts.block_size,
            "disable_radix_cache": not config.enable_prefix_caching,
        }
    )
    started = Timestamp()
    started.FromMicroseconds(int(STARTED * 1e6))
    counters = Struct()
    counters.update({name: getattr(stats, name) for name in COUNTERS})
    return pb.GetServerInfoResponse(
        server_args=arguments,
        scheduler_info=counters,
        active_requests=stats.running + stats.waiting,
        uptime_seconds=time.time() - STARTED,
        max_total_num_tokens=facts.num_blocks * facts.block_size,
        tokenspeed_version=__version__,
        start_time=started,
        constrained_decoding="requested",
    )


def loads(engine: AsyncEngine, request: pb.GetLoadsRequest) -> pb.GetLoadsResponse:
    """Requests and tokens of each pool as of the last step. Raises `InvalidRequest` for a rank that there is not.

    Gateways ask for sections of other engines, too: there is nothing in those.
    """
    wanted = set(request.include)
    stats = engine.stats()
    pools = stats.pools or [_of_one(stats)]
    if request.HasField("dp_rank") and not 0 <= request.dp_rank < len(pools):
        raise InvalidRequest(f"dp_rank must be below {len(pools)}, got {request.dp_rank}", param="dp_rank")
    found = [_load(engine, rank, pool, stats.generation_rate / len(pools)) for rank, pool in enumerate(pools)]
    shown = [found[request.dp_rank]] if request.HasField("dp_rank") else found
    for load in shown:
        if wanted & {"queues", ALL}:
            load.queues.waiting = load.num_waiting_reqs
    return pb.GetLoadsResponse(
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
        version=__version__,
        dp_rank_count=len(pools),
        loads=shown,
        aggregate=pb.AggregateMetrics(
            total_running_reqs=stats.running,
            total_waiting_reqs=stats.waiting,
            total_reqs=stats.running + stats.waiting,
            avg_token_usage=sum(load.token_usage for load in found) / len(found),
            avg_throughput=stats.generation_rate / len(found),
            avg_utilization=sum(load.utilization for load in found) / len(found),
        ),
    )


def _of_one(stats: EngineStats) -> PoolStats:
    """The pool of an engine that has one."""
    return PoolStats(
        running=stats.running,
        waiting=stats.waiting,
        blocks_total=stats.blocks_total,
        blocks_used=stats.blocks_used,
        waiting_uncached_tokens=stats.waiting_uncached_tokens,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
    )


def _load(engine: AsyncEngine, rank: int, pool: PoolStats, rate: float) -> pb.SchedulerLoad:
    """Used tokens are those of blocks that a request holds: what is only cached makes way."""
    block, most = engine.facts.block_size, engine.config.max_num_seqs
    used = pool.blocks_used / pool.blocks_total if pool.blocks_total else 0.0
    return pb.SchedulerLoad(
        dp_rank=rank,
        num_running_reqs=pool.running,
        num_waiting_reqs=pool.waiting,
        num_total_reqs=pool.running + pool.waiting,
        num_used_tokens=pool.blocks_used * block,
        max_total_num_tokens=pool.blocks_total * block,
        max_running_requests=most,
        num_waiting_uncached_tokens=pool.waiting_uncached_tokens,
        token_usage=used,
        active_token_usage=used,
        gen_throughput=rate,
        cache_hit_rate=pool.cached_tokens / pool.prompt_tokens if pool.prompt_tokens else 0.0,
        utilization=pool.running / most,
    )


def _name(engine: AsyncEngine, served_names: Sequence[str]) -> str:
    return served_names[0] if served_names else engine.facts.model_name
