"""The files of a tokenizer in one zip, as a gateway without access to the checkpoint wants them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator

from smg_grpc_proto.generated import common_pb2 as common

from tokenspeed.checkpoint.source import resolve
from tokenspeed.config import EngineConfig
from tokenspeed.text.bundle import tokenizer_files

CHUNK_BYTES = 1 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)


def zipped(config: EngineConfig) -> bytes:
    """The same bytes for the same files: no times are in it. Raises `CheckpointError` where files cannot be read."""
    source = resolve(config.model, config.load_format)
    files = tokenizer_files(source, tokenizer=config.tokenizer, chat_template=config.chat_template)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def chunks_of(bundle: bytes) -> Iterator[common.GetTokenizerChunk]:
    """At least one chunk; the last one says the digest of all."""
    for start in range(0, max(1, len(bundle)), CHUNK_BYTES):
        chunk = common.GetTokenizerChunk(data=bundle[start : start + CHUNK_BYTES])
        if start + CHUNK_BYTES >= len(bundle):
            chunk.sha256 = hashlib.sha256(bundle).hexdigest()
        yield chunk
