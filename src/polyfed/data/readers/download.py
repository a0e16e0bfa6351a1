"""Downloads official files once into the cache; only files with the right checksum get there."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from polyfed.base.errors import DataError
from polyfed.base.files import replacing
from polyfed.data.readers.idx import IDX_NAMES
from polyfed.data.readers.svhn import svhn_names


@dataclass(frozen=True)
class RemoteFile:
    """A file, where it comes from, and its known digest (a guard against damage, and MD5 none against malice).

    Args:
        name: file name in the cache.
        url: address of the file.
        digest: hexadecimal MD5 or SHA-256 of the content, told apart by its length.
    """

    name: str
    url: str
    digest: str

    @property
    def kind(self) -> str:
        """The kind of digest."""
        return "md5" if len(self.digest) == 32 else "sha256"


def _mnist_files(base: str, sums: tuple[str, str, str, str]) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(f"{name}.gz", f"{base}{name}.gz", md5) for name, md5 in zip(IDX_NAMES, sums, strict=True))


#: Data set -> its official files.
OFFICIAL_FILES: Mapping[str, tuple[RemoteFile, ...]] = MappingProxyType(
    {
        "mnist": _mnist_files(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
        "fashion-mnist": _mnist_files(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        "cifar10": (
            RemoteFile(
                "cifar-10-binary.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c32a1d4ab5d03f1284b67883e8d87530",
            ),
        ),
        "cifar100": (
            RemoteFile(
                "cifar-100-binary.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                "03b5dce01913d631647c71ecec9e9cb8",
            ),
        ),
        "svhn": tuple(
            RemoteFile(name, f"http://ufldl.stanford.edu/housenumbers/{name}", digest)
            for name, digest in zip(
                svhn_names(extra=True),
                (
                    "e26dedcc434d2e4c54c9b2d4a06d8373",
                    "a93ce644f1a588dc4d68dda5feec44a7",
                    "eb5a983be6a315427106f1b164d9cef3",
                ),
                strict=True,
            )
        ),
        "agnews": tuple(
            RemoteFile(
                name, f"https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/{name}", md5
            )
            for name, md5 in (
                ("train.csv", "b1a00f826fdfbd249f79597b59e1dc12"),
                ("test.csv", "d52ea96a97a2d943681189a97654912d"),
            )
        ),
        "uci-har": (
            RemoteFile(
                "human+activity+recognition+using+smartphones.zip",
                "https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip",
                "c00b803081a5c797cd5e4b83700a9810b38d53d9d84e01917e090e1fdbc81031",
            ),
        ),
    }
)


def digest_of(path: Path, kind: str = "md5") -> str:
    """Hexadecimal digest of a file's content: "md5" or "sha256"."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def fetch(file: RemoteFile, folder: Path, *, opener: Callable[..., Any] | None = None) -> Path:
    """Return the file in ``folder``; download and check it if it is absent or its digest is wrong.

    Args:
        file: the file to fetch.
        folder: the folder to keep it in.
        opener: opens a URL, with a timeout in seconds; None stands for ``urllib.request.urlopen``.

    Raises:
        DataError: no network, a content with another digest, or a folder that cannot be written to.
    """
    target = folder / file.name
    if target.is_file() and digest_of(target, file.kind) == file.digest:
        return target
    logging.getLogger(__name__).info("downloading %s to %s", file.url, target)
    digest = hashlib.new(file.kind, usedforsecurity=False)
    try:
        with (
            (opener or urllib.request.urlopen)(file.url, timeout=30.0) as response,
            replacing(target) as handle,
        ):
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                handle.write(chunk)
            if digest.hexdigest() != file.digest:  # inside the block, so that the file never gets its name
                raise DataError(
                    f"{file.url}: {handle.tell()} bytes with {file.kind} {digest.hexdigest()}; expected {file.kind} "
                    f"{file.digest}; the download was cut short or the file changed; try again, or fetch it by hand "
                    "and set the data path"
                )
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{file.url}: could not be downloaded to {target} ({error}); try again, or fetch it by hand and set the "
            "data path"
        ) from error
    return target
