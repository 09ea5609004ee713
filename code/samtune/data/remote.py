"""Files behind a URL (s3://, gs://, https://, ...), through fsspec; local files need none of this.

A file system is asked for anew at every access: fsspec keeps one per process and address, and one
that was made before a fork must not be used after it.

A URL stands in the files of a run, in its log and in Weights & Biases, so it may hold no password
and no key: `$SAMTUNE_NAME` in it is a variable of the environment, looked up at each access and
told to nobody. No other variable is, as a URL may come from the file of a stranger's run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from samtune.errors import UserError

_VARIABLE = re.compile(r"\$(SAMTUNE_\w+)")
_SECRET = re.compile("sig|token|secret|passw|key|credential|auth", re.IGNORECASE)  # in a query
_NAMED_USERS = ("sftp", "ssh", "ftp", "hdfs", "webhdfs", "smb")  # else a user may be a token, too
_BLOCK = 2**20  # bytes that are read ahead where headers are: few requests, little in vain


def is_url(place: str) -> bool:
    """Whether this is a URL, not the path of a local file."""
    return "://" in place


def refuse_secrets(url: str, flag: str) -> None:
    """Raise UserError, which does not repeat it, for a URL with a password or a key in clear."""
    for link in url.split("::"):  # fsspec's chains
        try:
            parts = urlsplit(link)
        except ValueError:
            continue
        login, at, _ = parts.netloc.rpartition("@")
        user, colon, password = login.partition(":")
        words = [password] if colon else []
        words += [user] if at and parts.scheme not in _NAMED_USERS else []
        words += [value for name, value in parse_qsl(parts.query) if _SECRET.search(name)]
        if not all(_VARIABLE.fullmatch(word) for word in words):
            raise UserError(
                f"{flag}: a URL in it holds a password or a key, which would stand in every file "
                "of the run; write $SAMTUNE_NAME in its place, and set SAMTUNE_NAME in the "
                "environment"
            )


@contextmanager
def open_url(url: str) -> Iterator[tuple[BinaryIO, int]]:
    """The file behind a URL, seekable, and its size in bytes. Raises UserError."""
    with _spoken_of(url):
        files, path = _file_system(url)
        size = files.info(path)["size"]
        if size is None:
            raise UserError(f"{url}: its server does not tell its size; copy it to a local disk")
        file = files.open(path, "rb", block_size=_BLOCK)
    try:
        yield _Spoken(file, url), size
    finally:
        file.close()


def read_range(url: str, offset: int, size: int) -> bytes:
    """Some bytes of the file behind a URL, by one request where it can be. Raises UserError."""
    with _spoken_of(url):
        files, path = _file_system(url)
        return files.cat_file(path, start=offset, end=offset + size)


class _Spoken:
    """A file whose errors name its URL; what `tarfile` needs of one."""

    def __init__(self, file: BinaryIO, url: str):
        self.file, self.url = file, url

    def read(self, size: int) -> bytes:
        with _spoken_of(self.url):
            return self.file.read(size)

    def seek(self, offset: int) -> int:
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()


def _file_system(url: str):
    """fsspec's file system for a URL, and the path in it."""
    import fsspec

    if unset := [name for name in _VARIABLE.findall(url) if not os.environ.get(name)]:
        raise UserError(f"{url}: the environment has no {unset[0]}; set it")
    return fsspec.core.url_to_fs(_VARIABLE.sub(lambda name: os.environ[name[1]], url))


def _veiled(said: str, url: str) -> str:
    """What was said about a URL, with the variables' names for their values."""
    for name in _VARIABLE.findall(url):
        value = os.environ.get(name, "")
        for form in filter(None, (value, quote(value), quote(value, safe=""), unquote(value))):
            said = said.replace(form, f"${name}")
    return said


@contextmanager
def _spoken_of(url: str) -> Iterator[None]:
    """Any failure of fsspec or of the package behind it, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:  # fsspec itself, or the package that speaks the protocol
        missing = getattr(error.__cause__ or error, "name", None) or "fsspec"
        package = missing.split(".")[0]
        raise UserError(f"{url}: reading it needs {package}: pip install {package}") from None
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # each protocol has errors of its own, with no common ancestor
        said = _veiled(str(error).strip() or type(error).__name__, url)
        raise UserError(f"{url}: cannot be read ({said})") from None
