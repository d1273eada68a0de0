"""Decompressing what came from a queue, up to a bound: a message of a megabyte may hold a gigabyte of zeros."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final

from kombu import compression

#: A body may be so many times as large as the largest message before it is compressed (PLATFORM_MAX_MESSAGE).
TIMES: Final = 16
#: Bytes of memory that xz may ask for, whose messages say themselves how much they need.
LZMA_MEMORY: Final = 128 * 1024**2


class TooLarge(ValueError):
    """A body that is decompressed to more than is allowed."""


def _zlib(data: bytes, most: int) -> tuple[bytes, bool]:
    found = zlib.decompressobj()
    return found.decompress(data, most), found.eof


def _bz2(data: bytes, most: int) -> tuple[bytes, bool]:
    found = bz2.BZ2Decompressor()
    return found.decompress(data, most), found.eof


def _lzma(data: bytes, most: int) -> tuple[bytes, bool]:
    found = lzma.LZMADecompressor(memlimit=LZMA_MEMORY)
    return found.decompress(data, most), found.eof


#: By kombu's names: (data, most bytes) -> at most so many, and whether that was all.
_BOUNDED: Final[dict[str, Callable[[bytes, int], tuple[bytes, bool]]]] = {
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), _zlib),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), _bz2),
    **dict.fromkeys(("application/x-lzma", "lzma", "xz"), _lzma),
}


def as_bytes(body: Any) -> bytes:
    """A body as it came, in bytes. Raises `TypeError` for what is none: `bytes(10**10)` would be ten gigabytes."""
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)
    raise TypeError(f"a body is text or bytes, not {type(body).__name__}")


def unpack(body: Any, method: object, most: int) -> bytes:
    """The body, decompressed. Raises `TooLarge`, `TypeError` where it is no body, `KeyError` for an unknown method, or
    what the method raises."""
    data = as_bytes(body)
    bounded = _BOUNDED.get(method) if isinstance(method, str) else None
    if bounded is None:
        # Another one (zstd, brotli, the user's own) is decompressed by what is registered with kombu.
        found: bytes = compression.decompress(data, method)
        whole = len(found) <= most
    else:
        found, whole = bounded(data, most + 1)
    if len(found) > most:
        raise TooLarge(f"a body of {len(data)} bytes holds more than the {most} that are allowed")
    if not whole:
        raise ValueError("the compressed body is not complete")
    return found
