"""What gateways, load balancers and tools ask: /v1/load, /v1/loads, /server_info, /model_info, /openapi.json.

The names are those that they read: SGLang's for a rank's load, and for what a server and a model are.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tokenspeed import __version__
from tokenspeed.entrypoints.answers import encode
from tokenspeed.entrypoints.door import Door, door_of
from tokenspeed.entrypoints.openapi import document


async def load(request: web.Request) -> web.Response:
    """How busy the engine is, as of its last heartbeat; `loads` has the same for each rank, of which there is one."""
    door = door_of(request)
    door.require_ready()
    stats = door.engine.stats()
    totals = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "kv_cache_usage_perc": stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
        "streams_below_floor": stats.streams_below_floor,
        "num_sessions_resident": stats.sessions_resident,
        "num_sessions_waiting": stats.sessions_waiting,
    }
    return _json({"version": __version__, **totals, "dp_rank_count": 1, "loads": [_rank_load(door)]})


async def server_info(request: web.Request) -> web.Response:
    """What this server runs and how large it is."""
    door = door_of(request)
    door.require_ready()
    facts, config = door.engine.facts, door.engine.config
    groups = config.parallel.attn_dp or 1
    return _json(
        {
            "version": __version__,
            "model_path": facts.model_name,
            "served_model_name": door.model.names[0],
            "context_length": facts.max_model_len,
            "max_total_tokens": facts.num_blocks * facts.block_size,
            "max_running_requests": config.max_num_seqs * groups,
            "max_queued_requests": config.max_queued_requests,
            "disable_radix_cache": not config.enable_prefix_caching,
            "tool_call_parser": door.answer_format.tools,
            "reasoning_parser": door.answer_format.reasoning,
            "tp_size": config.parallel.world // groups,
            "dp_size": groups,
            "internal_states": [_rank_load(door)],
        }
    )


async def model_info(request: web.Request) -> web.Response:
    """What the model is."""
    door = door_of(request)
    door.require_ready()
    facts = door.engine.facts
    return _json(
        {
            "model_path": facts.model_name,
            "served_model_name": door.model.names[0],
            "is_generation": True,
            "model_type": facts.model_type,
            "architectures": [facts.architecture],
            "max_model_len": facts.max_model_len,
            "vocab_size": facts.vocab_size,
            "eos_token_ids": facts.eos_token_ids,
            "default_sampling_params": facts.defaults,
        }
    )


async def openapi(request: web.Request) -> web.Response:
    """The whole API as an OpenAPI document."""
    return _json(document())


def _rank_load(door: Door) -> dict[str, Any]:
    stats, facts = door.engine.stats(), door.engine.facts
    return {
        "dp_rank": 0,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_total_reqs": stats.running + stats.waiting,
        "num_used_tokens": stats.blocks_used * facts.block_size,
        "max_total_num_tokens": facts.num_blocks * facts.block_size,
        "token_usage": stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
        "cache_hit_rate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
    }


def _json(payload: dict[str, Any]) -> web.Response:
    return web.Response(body=encode(payload), content_type="application/json")
