"""Arguments, the --config file and the environment become one configuration, or one line of complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenspeed.config import Parallel
from tokenspeed.entrypoints.flags import FLAGS, GRPC, GRPC_PORT, ServerConfig, is_loopback, parse_flags
from tokenspeed.errors import ConfigError


def parse(*arguments: str, **environment: str) -> ServerConfig:
    return parse_flags(arguments, environment)


def test_nothing_given_serves_the_demonstration_model_on_this_machine_only() -> None:
    config = parse()
    assert (config.engine.model, config.host, config.port) == (None, "127.0.0.1", 8000)
    assert config.engine.enable_prefix_caching
    assert not config.api_keys


def test_every_kind_of_flag_is_read() -> None:
    config = parse(
        "--model", "m.gguf", "--block-size", "32", "--no-enable-prefix-caching", "--kv-cache-memory", "2GiB",
        "--dtype", "bfloat16", "--api-key", "a", "b", "--api-key", "c", "--shutdown-grace", "1.5", "--in-process",
        "--served-model-name", "x", "y", "--log-format", "json",
    )  # fmt: skip
    assert (config.engine.model, config.engine.block_size, config.engine.dtype) == ("m.gguf", 32, "bfloat16")
    assert (config.engine.enable_prefix_caching, config.engine.kv_cache_bytes) == (False, 2 * 2**30)
    assert (config.api_keys, config.served_names) == (["a", "b", "c"], ["x", "y"])
    assert (config.shutdown_grace, config.in_process, config.log_format) == (1.5, True, "json")


def test_no_floor_a_floor_of_0_and_a_promise_are_three_things() -> None:
    assert [parse(*given).engine.tps_floor for given in ((), ("--tps-floor", "0"), ("--tps-floor", "70"))] == [
        None,
        0.0,
        70.0,
    ]
    config = parse("--no-session-admission", "--max-queue-seconds", "12.5", "--record", "calls").engine
    assert (config.session_admission, config.max_queue_seconds, config.record) == (False, 12.5, "calls")


def test_how_a_model_lies_over_ranks_is_one_value() -> None:
    config = parse("-tp", "8", "--attn-tp-size", "8", "--dense-tp-size", "4", "--moe-ep-size", "8").engine
    assert config.parallel == Parallel(world=8, attn_tp=8, dense_tp=4, moe_ep=8)
    assert parse("--tensor-parallel-size", "2", "--watchdog-seconds", "9").engine.watchdog_seconds == 9
    assert parse("-tp", "2", "--attn-copies", "2").engine.parallel == Parallel(world=2, attn_copies=2)
    assert parse().engine.parallel == Parallel()
    launched = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    assert parse("--moe-tp-size", "2", **launched).engine.parallel == Parallel(world=4, moe_tp=2)
    with pytest.raises(ConfigError, match="WORLD_SIZE=4"):
        parse("-tp", "2", **launched)


def test_parsers_are_found_by_themselves_unless_named() -> None:
    config = parse()
    assert (config.tool_call_parser, config.reasoning_parser, config.reasoning_field) == (
        "auto",
        "auto",
        "reasoning_content",
    )
    config = parse("--tool-call-parser", "hermes", "--reasoning-parser", "none", "--reasoning-field", "both")
    assert (config.tool_call_parser, config.reasoning_parser, config.reasoning_field) == ("hermes", "none", "both")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("512MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("2g", 2 * 10**9),
        ("1 TiB", 2**40),
        ("4k", 4000),
    ],
)
def test_sizes_are_bytes_or_have_a_unit(text: str, size: int) -> None:
    assert parse("--kv-cache-memory", text).engine.kv_cache_bytes == size


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 9000\nmax-num-seqs: 8\nblock_size: 32\napi-key: [a]\nserved-model-name: x\ninsecure: true\n")
    config = parse("--config", str(file), "--port", "9001")
    assert (config.port, config.engine.max_num_seqs, config.engine.block_size) == (9001, 8, 32)
    assert (config.api_keys, config.served_names, config.insecure) == (["a"], ["x"], True)
    assert parse("--config", str(file), "--api-key", "b", TOKENSPEED_API_KEY="c").api_keys == ["b"]


def test_keys_may_come_from_the_environment() -> None:
    config = parse(TOKENSPEED_API_KEY="secret", TOKENSPEED_ADMIN_API_KEY="boss")
    assert (config.api_keys, config.admin_api_keys) == (["secret"], ["boss"])
    assert parse("--host", "0.0.0.0", TOKENSPEED_API_KEY="secret").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--flux"], "--flux"),
        (["--por", "1"], "--por"),
        (["extra"], "extra"),
        (["--port"], "--port"),
        (["--tool-call-parser", "qwen"], "must be one of auto, none, deepseek_v3, deepseek_v31, glm45, hermes, "),
        (["--reasoning-parser", "r1"], "must be one of auto, none, deepseek_r1, deepseek_v3, glm45, kimi_k2, "),
        (["--reasoning-field", "thoughts"], "must be one of reasoning_content, reasoning, both, got 'thoughts'"),
        (["--port", "http"], "--port must be an integer, got 'http'"),
        (["--port", "70000"], "--port"),
        (["--dtype", "float8"], "--dtype must be one of auto, float32, bfloat16, got 'float8'"),
        (["--load-format", "pickle"], "--load-format"),
        (["--quantization", "fp8"], "--quantization must be one of none, int8, got 'fp8'"),
        (["--log-level", "loud"], "--log-level"),
        (["--block-size", "7"], "--block-size"),
        (["--overlap", "2"], "--overlap"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["-tp", "0"], "--tensor-parallel-size must be at least 1, got 0"),
        (["--num-threads", "0"], "--num-threads must be at least 1, got 0"),
        (["--num-threads", "1000"], "--num-threads must be at most 256, got 1000"),
        (["-tp", "4", "--attn-tp-size", "3"], "--attn-tp-size 3 does not divide a world of 4 ranks"),
        (["-tp", "4", "--attn-copies", "3"], "--attn-copies 3 does not divide a world of 4 ranks"),
        (["-tp", "4", "--vocab-tp-size", "0"], "--vocab-tp-size must be at least 1"),
        (["--moe-ep-size", "2"], "--moe-ep-size 2 does not divide a world of 1 ranks"),
        (["--watchdog-seconds", "0"], "--watchdog-seconds must be a number above 0, got 0"),
        (["--tps-floor", "-1"], "--tps-floor must be a number of at least 0, got -1"),
        (["--tps-floor", "nan"], "--tps-floor"),
        (["--tps-floor", "inf"], "--tps-floor"),
        (["--tps-floor", "fast"], "--tps-floor must be a number, got 'fast'"),
        (["--max-queue-seconds", "-0.5"], "--max-queue-seconds"),
        (["--max-queue-seconds", "nan"], "--max-queue-seconds"),
        (["--max-num-batched-tokens", "8"], "--max-num-batched-tokens"),
        (["--kv-cache-memory", "much"], "--kv-cache-memory"),
        (["--kv-cache-memory", "1PiB"], "--kv-cache-memory"),
        (["--kv-cache-memory", "0"], "--kv-cache-memory"),
        (["--shutdown-grace", "-1"], "--shutdown-grace"),
        (["--engine-silence", "1"], "--engine-silence must be 0 or between 2 and 86400 seconds, got 1"),
        (["--engine-restarts", "-1"], "--engine-restarts must be between 0 and 1000, got -1"),
        (["--metrics-compat", "sglang"], "--metrics-compat must be one of none, vllm, got 'sglang'"),
        (["--shutdown-grace", "nan"], "--shutdown-grace"),
        (["--trust-remote-code"], "--trust-remote-code is not supported"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is public"),
        (["--host", "::"], "is public"),
        (["--host", "no such host"], "--host"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
        (["--admin-api-key", "schön"], "--admin-api-key"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--ssl-keyfile", "k.pem"], "--ssl-certfile"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
    ],
)
def test_what_cannot_work_is_one_line_that_names_the_flag(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(*arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flux: 1", "unknown key 'flux'"),
        ("port: '9000'", "--port must be an integer"),
        ("port: true", "--port"),
        ("enable-prefix-caching: 1", "--enable-prefix-caching must be true or false"),
        ("kv-cache-memory: true", "--kv-cache-memory"),
        ("api-key: [1]", "--api-key"),
        ("- port", "mapping"),
        ("port: [", "not valid YAML"),
        ("port: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line_too(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        parse("--config", str(file))
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"--config {file}")
    assert "\n" not in str(refused.value)


def test_insecure_allows_a_public_host() -> None:
    assert parse("--host", "0.0.0.0", "--insecure").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_loopback_is_told_from_public(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_every_flag_appears_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(flag.name in text for flag in FLAGS)


def parse_grpc(*arguments: str, **environment: str) -> ServerConfig:
    return parse_flags(arguments, environment, GRPC)


def test_the_program_without_http_serves_grpc_on_its_port() -> None:
    config = parse_grpc()
    assert (config.http, config.grpc_port, config.host) == (False, GRPC_PORT, "127.0.0.1")
    assert parse_grpc("--port", "1234").grpc_port == 1234
    assert (parse().http, parse().grpc_port) == (True, None)
    config = parse("--grpc-port", "0", "--port", "9000")
    assert (config.http, config.port, config.grpc_port) == (True, 9000, 0)


def test_what_only_http_knows_is_no_flag_of_the_program_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_grpc("--help")
    shown = capsys.readouterr().out
    assert f"default: {GRPC_PORT}" in shown and "8000" not in shown
    for flag in FLAGS:
        assert (f" {flag.name} " in shown or f" {flag.name}," in shown) == (flag.field not in GRPC.without), flag.name
    assert {flag.field for flag in FLAGS} >= GRPC.without
    with pytest.raises(ConfigError, match="--tool-call-parser"):
        parse_grpc("--tool-call-parser", "hermes")
    file = tmp_path / "server.yaml"
    file.write_text("tool-call-parser: hermes\n")
    with pytest.raises(ConfigError, match="unknown key 'tool-call-parser'"):
        parse_grpc("--config", str(file))
    file.write_text("port: 1234\n")
    assert parse_grpc("--config", str(file)).grpc_port == 1234


def test_keys_guard_grpc_too_but_none_is_an_administrators() -> None:
    config = parse_grpc("--host", "0.0.0.0", TOKENSPEED_API_KEY="secret", TOKENSPEED_ADMIN_API_KEY="boss")
    assert (config.api_keys, config.admin_api_keys) == (["secret"], [])
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 is public"):
        parse_grpc("--host", "0.0.0.0")
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 is public"):
        parse("--host", "0.0.0.0", "--uds", "/tmp/x", "--grpc-port", "1")
    assert parse("--host", "0.0.0.0", "--uds", "/tmp/x").uds == "/tmp/x"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grpc-port", "70000"], "--grpc-port must be between 0 and 65535, got 70000"),
        (["--grpc-port", "8000"], "--grpc-port must be another port than --port, got 8000 for both"),
        (["--grpc-port", "x"], "--grpc-port must be an integer"),
    ],
)
def test_a_grpc_port_is_a_port_of_its_own(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(*arguments)
    assert words in str(refused.value)


def test_a_wrong_port_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r"^--port must be between 0 and 65535, got 70000"):
        parse_grpc("--port", "70000")
    assert parse("--grpc-port", "8000", "--uds", "/tmp/x").grpc_port == 8000
    assert parse("--grpc-port", "0", "--port", "0").port == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], False),
        (["--grpc-port", "0", "--cache-events"], True),
        (["--grpc-port", "0"], True),
        (["--grpc-port", "0", "--no-cache-events"], False),
        (["--grpc-port", "0", "--no-enable-prefix-caching"], False),
    ],
)
def test_what_is_cached_is_told_where_a_gateway_may_ask(arguments: list[str], told: bool) -> None:
    assert parse(*arguments).engine.cache_events is told


def test_what_is_cached_cannot_be_told_where_nobody_can_ask() -> None:
    with pytest.raises(ConfigError, match="--cache-events is told over gRPC: give --grpc-port"):
        parse("--cache-events")


def test_the_program_for_gateways_tells_it_unless_nothing_is_cached() -> None:
    assert parse_grpc().engine.cache_events
    assert not parse_grpc("--no-enable-prefix-caching").engine.cache_events
    assert not parse_grpc("--no-cache-events").engine.cache_events
