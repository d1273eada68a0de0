"""Decompression of bodies from a queue, up to a bound: a message of a megabyte may hold a gigabyte of zeros."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final

from kombu import compression

#: A decompressed body may be this many times as large as the largest message (PLATFORM_MAX_MESSAGE).
TIMES: Final = 16
#: Bytes of memory that xz may ask for. Its messages say themselves how much they need.
LZMA_MEMORY: Final = 128 * 1024**2


class TooLarge(ValueError):
    """A body that is decompressed to more bytes than are allowed."""


def _zlib(data: bytes, most: int) -> tuple[bytes, bool]:
    decompressor = zlib.decompressobj()
    return decompressor.decompress(data, most), decompressor.eof


def _bz2(data: bytes, most: int) -> tuple[bytes, bool]:
    decompressor = bz2.BZ2Decompressor()
    return decompressor.decompress(data, most), decompressor.eof


def _lzma(data: bytes, most: int) -> tuple[bytes, bool]:
    decompressor = lzma.LZMADecompressor(memlimit=LZMA_MEMORY)
    return decompressor.decompress(data, most), decompressor.eof


#: kombu's name -> function of (data, most bytes), which returns at most so many bytes, and True if that was all.
_BOUNDED: Final[dict[str, Callable[[bytes, int], tuple[bytes, bool]]]] = {
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), _zlib),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), _bz2),
    **dict.fromkeys(("application/x-lzma", "lzma", "xz"), _lzma),
}


def as_bytes(body: Any) -> bytes:
    """Return a received body in bytes.

    Raises `TypeError` for other types than text and bytes: `bytes(10**10)` would be ten gigabytes.
    """
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)
    raise TypeError(f"a body is text or bytes, not {type(body).__name__}")


def unpack(body: Any, method: object, most: int) -> bytes:
    """Return the body, decompressed.

    Raises `TooLarge`, `TypeError` where it is no body, `KeyError` for an unknown method, `ValueError` for an incomplete
    body, or the error of the method.
    """
    data = as_bytes(body)
    bounded = _BOUNDED.get(method) if isinstance(method, str) else None
    if bounded is None:
        # Another method (zstd, brotli, the user's own) is decompressed by the function registered with kombu.
        unpacked: bytes = compression.decompress(data, method)
        whole = len(unpacked) <= most
    else:
        unpacked, whole = bounded(data, most + 1)
    if len(unpacked) > most:
        raise TooLarge(f"a body of {len(data)} bytes holds more than the {most} that are allowed")
    if not whole:
        raise ValueError("the compressed body is not complete")
    return unpacked
