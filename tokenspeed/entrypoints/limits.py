"""What the HTTP and gRPC doors bound, in one place.

The defaults are what the server runs with; tests pass smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_MESSAGE_BYTES = 512 * 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOLS = 1024
MAX_TOOLS_BYTES = 4 * 1024 * 1024
MAX_CALLS = 256
MAX_NAME_CHARS = 256
MAX_SCHEMA_DEPTH = 64
MAX_PROMPTS = 128
MAX_CHOICES = 256
MAX_LABEL_CHARS = 128
MAX_SALT_CHARS = 256
MAX_CACHE_KEY_CHARS = 256
MAX_BAD_WORDS = 256
MAX_BAD_WORD_BYTES = 256
MAX_ID_LIST = 4096
MAX_TEMPLATE_KWARGS_BYTES = 64 * 1024
MAX_TEMPLATE_KWARGS_DEPTH = 16
MAX_BYTES_A_TOKEN = 128
"""No usual vocabulary has a longer token, so text of more than context × this many bytes cannot fit, and is
refused before it is tokenized."""

OFF_LOOP_BYTES = 64 * 1024
"""A larger body is parsed, checked and rendered in a worker thread."""


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, sizes in bytes.

    `header_seconds`: from connecting to the end of the first request's headers. `body_seconds`: for a whole
    body. `idle_seconds`: a connection without a request. `linger_seconds`: how long the rest of
    a refused body is read, so that the client sees the refusal. `keepalive_seconds`: silence on a stream before a
    comment line. `reader_seconds`: how long a client may leave its receive buffer full before its request is
    aborted; at most `write_buffer_bytes` wait for it here. `generate_seconds`: for the token of /health_generate.
    `total_body_bytes`: all bodies being received. `max_message_bytes`: one message over gRPC, either way.
    `heartbeat_seconds`: silence after which an engine is not alive. `max_stored_responses`, `max_stored_bytes`: what is
    kept of an API key's responses, each for `stored_seconds` after it was last used.
    """

    header_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 75.0
    linger_seconds: float = 2.0
    keepalive_seconds: float = 10.0
    reader_seconds: float = 30.0
    generate_seconds: float = 30.0
    max_body_bytes: int = MAX_BODY_BYTES
    total_body_bytes: int = 8 * MAX_BODY_BYTES
    max_message_bytes: int = MAX_MESSAGE_BYTES
    write_buffer_bytes: int = 256 * 1024
    heartbeat_seconds: float = 5.0
    max_stored_responses: int = 1000
    max_stored_bytes: int = MAX_BODY_BYTES
    stored_seconds: float = 24 * 3600.0
