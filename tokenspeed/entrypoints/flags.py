"""The command line: one table of flags, read from arguments and from a --config file alike.

A flag exists only when it works. Arguments win over the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import msgspec

from tokenspeed import __version__
from tokenspeed.config import BLOCK_SIZES, STEERED_FLOOR, DType, EngineConfig, LoadFormat, Parallel, Quantization
from tokenspeed.errors import ConfigError
from tokenspeed.parallel.launched import over_launched
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.text.parsers.choose import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS

ENV_API_KEY = "TOKENSPEED_API_KEY"
ENV_ADMIN_API_KEY = "TOKENSPEED_ADMIN_API_KEY"

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
MetricsCompat = Literal["none", "vllm"]
ReasoningField = Literal["reasoning_content", "reasoning", "both"]


GRPC_PORT = 50051


@dataclass(frozen=True, slots=True)
class Program:
    """A server program: its module, what it does, whether it speaks HTTP, and the fields that it has no flags for.

    One without HTTP serves gRPC on --port.
    """

    module: str
    description: str
    http: bool = True
    without: frozenset[str] = frozenset()


HTTP = Program("tokenspeed.entrypoints.api", "Serve a model over HTTP, and over gRPC besides with --grpc-port.")
GRPC = Program(
    "tokenspeed.entrypoints.grpc",
    "Serve a model over gRPC, for the Shepherd Model Gateway.",
    http=False,
    without=frozenset(
        {
            "admin_api_keys",
            "allowed_origins",
            "grpc_port",
            "metrics_compat",
            "reasoning_field",
            "reasoning_parser",
            "tool_call_parser",
            "uds",
        }
    ),
)


def _names(parsers: Iterable[str]) -> str:
    return ", ".join([AUTO, NONE, *parsers])


class Size:
    """A number of bytes: an integer, or text such as 512MiB, 2GiB, 1.5GB."""


@dataclass(frozen=True, slots=True)
class Flag:
    """`field` of `EngineConfig` (when `engine`), of `Parallel` or of `ServerConfig` gets the value.

    A list type takes several.
    """

    name: str
    field: str
    type: Any
    help: str
    engine: bool = False
    short: str | None = None


FLAGS = (
    Flag(
        "--model", "model", str, "folder, .gguf file or Hugging Face hub name; default: the demonstration model", True
    ),
    Flag("--tokenizer", "tokenizer", str, "folder or file with the tokenizer, if not the model's own", True),
    Flag("--chat-template", "chat_template", str, "file with a Jinja chat template, if not the model's own", True),
    Flag("--dtype", "dtype", DType, "type of weights and activations", True),
    Flag("--load-format", "load_format", LoadFormat, "how the checkpoint is stored", True),
    Flag("--quantization", "quantization", Quantization, "int8 rounds weights to 8 bits while loading, on a CPU", True),
    Flag("--max-model-len", "max_model_len", int, "context in tokens; default: the checkpoint's", True),
    Flag("--block-size", "block_size", int, f"tokens in a KV block: {', '.join(map(str, BLOCK_SIZES))}", True),
    Flag("--max-num-seqs", "max_num_seqs", int, "requests that run at once, in each group of ranks", True),
    Flag("--max-num-batched-tokens", "max_num_batched_tokens", int, "tokens in a step; default: by device", True),
    Flag("--max-queued-requests", "max_queued_requests", int, "requests that may wait; more get 429", True),
    Flag("--max-queue-seconds", "max_queue_seconds", float, "longest wait for the KV cache; more get 429", True),
    Flag(
        "--tps-floor",
        "tps_floor",
        float,
        "tokens a second promised to every stream; what would break it gets 429. 0: none; default: "
        f"steer for {STEERED_FLOOR:g}, refuse nobody",
        True,
    ),
    Flag(
        "--session-admission",
        "session_admission",
        bool,
        "a session counts with all its KV blocks, also between turns; those that do not fit wait",
        True,
    ),
    Flag("--enable-prefix-caching", "enable_prefix_caching", bool, "reuse the KV blocks of equal prefixes", True),
    Flag(
        "--kv-cache-memory", "kv_cache_bytes", Size, "bytes for the KV cache, or like 2GiB; default: what is free", True
    ),
    Flag("--overlap", "overlap", int, "steps in flight while the next is planned: 0 or 1", True),
    Flag("--num-threads", "num_threads", int, "CPU threads of the model", True),
    Flag("--seed", "seed", int, "makes requests without a seed of their own reproducible", True),
    Flag("--cache-events", "cache_events", bool, "tell a gateway which KV blocks are cached; default: with gRPC", True),
    Flag("--record", "record", str, "new file for every call of the control plane, prompts included", True),
    Flag(
        "--tensor-parallel-size",
        "world",
        int,
        "ranks that the model lies over, each a process and a GPU; under a launcher its WORLD_SIZE",
        short="-tp",
    ),
    Flag("--attn-tp-size", "attn_tp", int, "ranks that attention's heads are cut over; default: all"),
    Flag("--attn-dp-size", "attn_dp", int, "groups of ranks with requests and a KV pool of their own; default: 1"),
    Flag("--attn-copies", "attn_copies", int, "ranks that attend alike, each to all rows; default: 1"),
    Flag("--dense-tp-size", "dense_tp", int, "ranks that dense layers are cut over; default: as attention, its copies"),
    Flag("--moe-tp-size", "moe_tp", int, "ranks that each expert is cut over; default: what --moe-ep-size leaves"),
    Flag("--moe-ep-size", "moe_ep", int, "ranks that experts are dealt to; default: 1"),
    Flag("--vocab-tp-size", "vocab_tp", int, "ranks that the vocabulary is cut over; default: as dense"),
    Flag("--watchdog-seconds", "watchdog_seconds", float, "longest step of several ranks before they hang", True),
    Flag("--served-model-name", "served_names", list[str], "names that requests may use; default: the model's"),
    Flag("--tool-call-parser", "tool_call_parser", str, f"how the model writes tool calls: {_names(TOOL_PARSERS)}"),
    Flag("--reasoning-parser", "reasoning_parser", str, f"how it writes reasoning: {_names(REASONING_PARSERS)}"),
    Flag("--reasoning-field", "reasoning_field", ReasoningField, "under which name reasoning is sent"),
    Flag("--host", "host", str, "address to listen on"),
    Flag("--port", "port", int, "port to listen on; 0 takes a free one"),
    Flag("--uds", "uds", str, "listen on this Unix socket instead"),
    Flag("--grpc-port", "grpc_port", int, "serve gRPC on this port of --host besides, for the SMG gateway; 0: any"),
    Flag("--api-key", "api_keys", list[str], f"keys that clients must send; or set {ENV_API_KEY}"),
    Flag("--admin-api-key", "admin_api_keys", list[str], f"keys for admin routes; or set {ENV_ADMIN_API_KEY}"),
    Flag(
        "--allowed-origins", "allowed_origins", list[str], "origins whose pages may call this server (CORS); * is any"
    ),
    Flag("--ssl-keyfile", "ssl_keyfile", str, "private key for TLS"),
    Flag("--ssl-certfile", "ssl_certfile", str, "certificate chain for TLS"),
    Flag("--insecure", "insecure", bool, "allow a public --host without --api-key"),
    Flag("--metrics-compat", "metrics_compat", MetricsCompat, "also show /metrics under the names of another engine"),
    Flag("--log-level", "log_level", LogLevel, "what is logged"),
    Flag("--log-format", "log_format", LogFormat, "lines for people or for machines"),
    Flag("--explain-parallel", "explain_parallel", bool, "print how the model lies over ranks, and end"),
    Flag("--in-process", "in_process", bool, "run the engine inside this process, for debuggers"),
    Flag("--engine-restarts", "engine_restarts", int, "how often within 10 minutes a dead engine is started again"),
    Flag("--engine-silence", "engine_silence", float, "seconds of silence after which an engine is replaced; 0: never"),
    Flag("--shutdown-grace", "shutdown_grace", float, "seconds that running requests get after SIGTERM"),
    Flag("--trust-remote-code", "trust_remote_code", bool, "not supported: code from checkpoints never runs"),
)
"""Every flag. `--no-NAME` exists for booleans."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides how the server runs, resolved and checked."""

    engine: EngineConfig
    served_names: list[str] = []
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    reasoning_field: ReasoningField = "reasoning_content"
    metrics_compat: MetricsCompat = "none"
    engine_restarts: int = 5
    engine_silence: float = 60.0
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    http: bool = True
    grpc_port: int | None = None
    api_keys: list[str] = []
    admin_api_keys: list[str] = []
    allowed_origins: list[str] = []
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    insecure: bool = False
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    in_process: bool = False
    shutdown_grace: float = 30.0
    explain_parallel: bool = False
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise `ConfigError` naming the first flag that cannot work."""
        self.engine.check()
        Mesh.of(self.engine.parallel.world, **self.engine.parallel.sizes())
        if self.trust_remote_code:
            raise ConfigError("--trust-remote-code is not supported: code from checkpoints never runs here")
        for flag, name, known in (
            ("--tool-call-parser", self.tool_call_parser, TOOL_PARSERS),
            ("--reasoning-parser", self.reasoning_parser, REASONING_PARSERS),
        ):
            if name not in (AUTO, NONE, *known):
                raise ConfigError(f"{flag} must be one of {_names(known)}, got {name!r}")
        if not 0 <= self.engine_restarts <= 1000:
            raise ConfigError(f"--engine-restarts must be between 0 and 1000, got {self.engine_restarts}")
        if not (self.engine_silence == 0 or 2 <= self.engine_silence <= 86400):
            raise ConfigError(
                f"--engine-silence must be 0 or between 2 and 86400 seconds, got {self.engine_silence:g}"
            )
        self._check_ports()
        if self.engine.cache_events and self.grpc_port is None:
            raise ConfigError("--cache-events is told over gRPC: give --grpc-port")
        if not 0 <= self.shutdown_grace <= 86400:
            raise ConfigError(f"--shutdown-grace must be between 0 and 86400 seconds, got {self.shutdown_grace:g}")
        for flag, keys in (("--api-key", self.api_keys), ("--admin-api-key", self.admin_api_keys)):
            if any(not re.fullmatch(r"[!-~]+", key) for key in keys):
                raise ConfigError(f"{flag} must be printable ASCII without spaces, and not empty")
        if any(not name.strip() for name in self.served_names):
            raise ConfigError("--served-model-name must not be empty")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile must be given together")
        by_network = self.uds is None or self.grpc_port is not None
        if by_network and not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise ConfigError(f"--host {self.host} is public: give --api-key, or --insecure to serve everybody")

    def _check_ports(self) -> None:
        ports = [("--port", self.port)] if self.http else []
        if self.grpc_port is not None:
            ports.append(("--grpc-port" if self.http else "--port", self.grpc_port))
        for flag, port in ports:
            if not 0 <= port <= 65535:
                raise ConfigError(f"{flag} must be between 0 and 65535, got {port}")
        if self.http and self.uds is None and self.grpc_port == self.port != 0:
            raise ConfigError(f"--grpc-port must be another port than --port, got {self.port} for both")


def parse_flags(
    arguments: Sequence[str], environment: Mapping[str, str], program: Program = HTTP
) -> ServerConfig:
    """Resolve arguments, the --config file and the environment, or raise `ConfigError` in one line."""
    flags = [flag for flag in FLAGS if flag.field not in program.without]
    given = vars(_parser(program, flags).parse_args(arguments))
    path = given.pop("config")
    values: dict[str, Any] = {} if path is None else _read_file(path, flags)
    for flag in flags:
        value = given[flag.field]
        if value is not None:
            values[flag.field] = convert(flag, value, strict=False)
    if not program.http:
        values |= {"http": False, "grpc_port": values.pop("port", GRPC_PORT)}
    if "grpc_port" in values:
        values.setdefault("cache_events", values.get("enable_prefix_caching", True))
    for field, variable in (("api_keys", ENV_API_KEY), ("admin_api_keys", ENV_ADMIN_API_KEY)):
        if field not in program.without and not values.get(field) and environment.get(variable):
            values[field] = [environment[variable]]
    parallel = Parallel(**{name: values.pop(name) for name in Parallel.__struct_fields__ if name in values})
    engine = EngineConfig(
        parallel=over_launched(parallel, environment),
        **{flag.field: values.pop(flag.field) for flag in FLAGS if flag.engine and flag.field in values},
    )
    config = ServerConfig(engine=engine, **values)
    config.check()
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _parser(program: Program, flags: Iterable[Flag]) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"python -m {program.module}", description=program.description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="YAML file with these flags as keys; flags win over it")
    defaults = {
        **{field.name: field.default for field in msgspec.structs.fields(EngineConfig)},
        **{field.name: field.default for field in msgspec.structs.fields(Parallel)},
        **{field.name: field.default for field in msgspec.structs.fields(ServerConfig)},
        **({} if program.http else {"port": GRPC_PORT}),
    }
    for flag in flags:
        default = defaults[flag.field]
        shown = f" (default: {default})" if isinstance(default, (int, float, str)) else ""
        options: dict[str, Any] = {"dest": flag.field, "default": None, "help": (flag.help + shown).replace("%", "%%")}
        if flag.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif flag.type == list[str]:
            options |= {"nargs": "+", "action": "extend", "metavar": "VALUE"}
        else:
            options["metavar"] = "|".join(get_args(flag.type)) if get_origin(flag.type) is Literal else "VALUE"
        parser.add_argument(*filter(None, (flag.short, flag.name)), **options)
    return parser


def _read_file(path: str, flags: Iterable[Flag]) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415  (30 ms that most starts do not need)

    try:
        parsed = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ConfigError(f"--config {path} must hold a mapping of flags to values")
    known = {flag.name.removeprefix("--"): flag for flag in flags}
    values: dict[str, Any] = {}
    for key, value in parsed.items():
        flag = known.get(str(key).replace("_", "-"))
        if flag is None:
            raise ConfigError(f"--config {path} has an unknown key {key!r}")
        single = isinstance(value, str) and flag.type == list[str]
        try:
            values[flag.field] = convert(flag, [value] if single else value, strict=True)
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {error}") from None
    return values


def convert(flag: Flag, value: Any, *, strict: bool) -> Any:
    """A value of the flag's type; `strict` for a file, which has types, not for arguments, which are text."""
    if flag.type is Size:
        return _size(flag, value)
    try:
        return msgspec.convert(value, flag.type, strict=strict)
    except msgspec.ValidationError:
        allowed = {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(
            flag.type, "text values"
        )
        if get_origin(flag.type) is Literal:
            allowed = "one of " + ", ".join(get_args(flag.type))
        raise ConfigError(f"{flag.name} must be {allowed}, got {value!r}") from None


def _size(flag: Flag, value: Any) -> int:
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper(), re.ASCII)
    if isinstance(value, bool) or match is None or match[2] not in units:
        raise ConfigError(f"{flag.name} must be a number of bytes, or like 512MiB or 2GiB, got {value!r}")
    return int(float(match[1]) * units[match[2]])


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is reachable from this machine only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
