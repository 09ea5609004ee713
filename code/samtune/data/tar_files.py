"""Pictures inside tar files: an index of where each lies, and its bytes; nothing is unpacked.

An index is made from the headers, seeking over the contents. So any picture can be read by itself,
in any order, and everything that knows files knows these. A compressed tar has no such places.
"""

from __future__ import annotations

import os
import tarfile
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from samtune.data.limits import check_bytes
from samtune.data.remote import is_url, open_url, read_range
from samtune.errors import UserError

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAIL = 2**20  # bytes that are looked at behind the last member; writers pad by less
_OPEN_SHARDS = 64  # that a process keeps open
_MOST_HEADER = 2**20  # bytes of a member's header, which is read as a whole


class Shard(NamedTuple):
    """A tar file as it was when it was indexed. place: path or URL. size: in bytes.

    modified: in nanoseconds; 0 behind a URL.
    """

    place: str
    size: int
    modified: int = 0


class TarMember(NamedTuple):
    """The address of one file in a tar; stands where a `Path` may stand.

    member: its path in the tar. offset, size: of its content, in bytes.
    """

    shard: Shard
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{PurePosixPath(self.shard.place).name}[{self.member}]"

    @property
    def stem(self) -> str:
        """The path in the tar without the last extension."""
        return os.path.splitext(self.member)[0]

    def __str__(self) -> str:
        return f"{self.shard.place}[{self.member}]"


class ShardIndex(NamedTuple):
    """What lies in a tar. passed_over: how many other members there are, by extension."""

    members: list[TarMember]
    passed_over: Counter


def index_tar(place: str, extensions: Collection[str]) -> ShardIndex:
    """The files of a tar whose names end with one of these (".png"), in the order of the tar.

    Hidden files and folders are passed over, links and other files too, but counted. Raises
    UserError for a tar that is missing, compressed, truncated or damaged, for a name that leads out
    of it, and for a member too large to be a picture.
    """
    with _opened(place) as (file, shard):
        head = file.read(tarfile.BLOCKSIZE)
        if head.startswith(_COMPRESSED):
            raise UserError(
                f"{place}: is compressed, so that no place in it can be read alone; unpack it to a "
                "plain .tar (images are compressed already)"
            )
        index = ShardIndex([], Counter())
        if head and not head.strip(b"\0"):  # without members; Python 3.10 calls it damaged
            _check_end(file, 0, place)
            return index
        file.seek(0)
        try:
            with tarfile.open(
                fileobj=_Bounded(file), mode="r:", encoding="utf-8", errors="strict"
            ) as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # it keeps them all
                    _add(index, shard, info, extensions)
                _check_end(file, tar.offset, place)
        except UserError:
            raise
        except Exception as error:  # a damaged header makes `tarfile` stumble over anything
            raise UserError(f"{place}: is no tar, or a damaged one ({error}); replace it") from None
    return index


def read_bytes(path: str | Path | TarMember) -> bytes:
    """The content of a file or of a member of a tar. Raises OSError for the one, else UserError.

    Members are read by their place, so threads and forked processes do not disturb each other.
    """
    if not isinstance(path, TarMember):
        return Path(path).read_bytes()
    shard, _, offset, size = path
    if is_url(shard.place):
        content = read_range(shard.place, offset, size)
    else:
        try:
            content = _local(shard).read(offset, size)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    if len(content) != size:
        raise UserError(f"{path}: the tar ends before it; replace the tar")
    return content


class _Bounded:
    """A file for `tarfile`, which believes any length in a header: a negative one leads it in
    circles, a huge one fills the memory."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


class _LocalTar:
    """A local tar that stays open until nobody holds it any more.

    So a thread can still read what another one has pushed out of the cache.
    """

    def __init__(self, shard: Shard):
        self.shard = shard
        self.descriptor = os.open(shard.place, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        found = os.fstat(self.descriptor)
        if (found.st_size, found.st_mtime_ns) != (self.shard.size, self.shard.modified):
            raise UserError(
                f"{self.shard.place}: has changed since it was indexed; start again, and write "
                "shards under new names while a run reads them"
            )
        return os.pread(self.descriptor, size, offset)


@lru_cache(maxsize=_OPEN_SHARDS)
def _local(shard: Shard) -> _LocalTar:
    return _LocalTar(shard)


@contextmanager
def _opened(place: str) -> Iterator[tuple[BinaryIO, Shard]]:
    """A tar to be indexed."""
    if is_url(place):
        with open_url(place) as (file, size):
            yield file, Shard(place, size)
        return
    try:
        file = open(place, "rb")  # noqa: SIM115 - errors of its use are another matter
    except FileNotFoundError:
        raise UserError(f"{place}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{place}: is a folder; name its shards, {place}/*.tar") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    with file:
        status = os.fstat(file.fileno())
        yield file, Shard(place, status.st_size, status.st_mtime_ns)


def _add(index: ShardIndex, shard: Shard, info: tarfile.TarInfo, extensions) -> None:
    """Put one member into the index, or count it."""
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if "\0" in info.name:
        raise UserError(f"{shard.place}: the name {info.name!r} is none of a file; repack it")
    if info.name.startswith("/") or ".." in parts:
        raise UserError(f"{shard.place}: the member {info.name} leads out of the tar; repack it")
    if info.size < 0 or (info.isreg() and info.offset_data + info.size > shard.size):
        raise UserError(f"{shard.place}: ends within the member {info.name}; replace it")
    if info.isdir() or not parts or parts[-1].startswith("."):
        return
    extension = os.path.splitext(parts[-1])[1].lower()
    if not info.isreg() or info.issparse():
        index.passed_over["links and special files"] += 1
    elif extension not in extensions:
        index.passed_over[extension or "no extension"] += 1
    else:
        check_bytes(info.size, f"{shard.place}[{info.name}]")
        index.members.append(TarMember(shard, "/".join(parts), info.offset_data, info.size))


def _check_end(file: BinaryIO, offset: int, place: str) -> None:
    """Behind the last member there are blocks of zeros; `tarfile` is content with anything."""
    file.seek(offset)
    tail = file.read(_TAIL)
    if len(tail) < tarfile.BLOCKSIZE:
        raise UserError(f"{place}: has no end mark, so it is truncated; replace it")
    if tail.strip(b"\0"):
        raise UserError(
            f"{place}: is damaged after byte {offset}, or several tars joined; replace it, or give "
            "joined ones apart"
        )
