"""From texts to tokens, by the package ``tokenizers``, an extra of polyfed: a vocabulary learnt here, or a file's.

Token 0 is padding, whichever number the tokenizer itself gives padding: these two change places. A learnt
tokenizer begins each text with token 1, for networks that classify by their first token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.base.files import replacing
from polyfed.data.catalogue import LENGTH, VOCABULARY

_PADDING, _START = "[PAD]", "[CLS]"
_VERSION = 2  # raise it when training changes, so that older tokenizers are not used


@dataclass(frozen=True)
class Tokens:
    """How texts become tokens: the options of a data set of texts.

    Args:
        cache: folder of learnt tokenizers.
        vocabulary: most tokens that the tokenizer learns, at least 258.
        length: most tokens of a text.
        tokenizer: a ``tokenizer.json`` to take in place of a learnt one.
        bucket: as of `Dataset`.
    """

    cache: Path
    vocabulary: int = VOCABULARY
    length: int = LENGTH
    tokenizer: str | None = None
    bucket: int = 16

    @property
    def given(self) -> Path | None:
        """The file of a tokenizer; None if it is learnt.

        Raises:
            DataError: there is no such file.
        """
        if self.tokenizer is None:
            return None
        path = Path(self.tokenizer)
        if not path.is_file():
            raise DataError(f"data.options.tokenizer: no file {path}; expected a tokenizer.json; correct the path")
        return path

    def of(self, texts: Sequence[str], training: Sequence[str]) -> tuple[NDArray[np.int64], str]:
        """Return the tokens of texts, ``(N, length)``, and the JSON text of their tokenizer.

        Args:
            texts: all texts.
            training: those that a tokenizer learns from, if no file has one.

        Raises:
            DataError: the package is not installed, or the file has no tokenizer.
        """
        given = self.given
        made = learnt(training, self.vocabulary, self.cache) if given is None else read_utf8(given)
        return encoded(texts, made, self.length, given or "the learnt tokenizer"), made


def read_utf8(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: the file cannot be read, or its bytes are no UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it is damaged or another file, fetch it again") from error


def learnt(texts: Sequence[str], vocabulary: int, cache: Path) -> str:
    """Return the JSON text of a tokenizer of pieces of lower-case words (byte-pair encoding of bytes).

    Unlike the package's WordPiece, this gives the same pieces in each process.

    Args:
        texts: what it learns from: training rows alone.
        vocabulary: most tokens, those of padding, of the start and of the 256 bytes included.
        cache: folder in which it is kept, by a digest of the texts; a folder that cannot be written keeps nothing.

    Raises:
        DataError: the package is not installed.
    """
    content = hashlib.sha256(json.dumps([_VERSION, vocabulary, *texts]).encode()).hexdigest()[:24]
    kept = cache / f"tokenizer-{content}.json"
    with contextlib.suppress(OSError, ValueError):
        text = kept.read_text("utf-8")
        json.loads(text)
        return text
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.normalizer = package.normalizers.Sequence([package.normalizers.NFKC(), package.normalizers.Lowercase()])
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PADDING, _START],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = package.processors.TemplateProcessing(
        single=f"{_START} $A", special_tokens=[(_START, tokenizer.token_to_id(_START))]
    )
    text = str(tokenizer.to_str())
    with contextlib.suppress(OSError), replacing(kept) as handle:
        handle.write(text.encode())
    return text


def encoded(texts: Sequence[str], tokenizer: str, length: int, where: object) -> NDArray[np.int64]:
    """Return the tokens of texts, ``(N, length)``: longer texts are cut, shorter ones end in 0.

    Names of special tokens in a text are text.

    Args:
        texts: the texts.
        tokenizer: the JSON text of a tokenizer, such as that of a pretrained network.
        length: most tokens of a text.
        where: the source of ``tokenizer``, for messages.

    Raises:
        DataError: the package is not installed, or the text describes no tokenizer, or one that cannot encode a text.
    """
    package = _package()
    try:
        made = package.Tokenizer.from_str(tokenizer)
    except Exception as error:  # what the package raises has no class of its own
        raise DataError(
            f"{where}: is no tokenizer.json ({error}); expected a file that the package tokenizers wrote, such as that "
            "beside a pretrained network"
        ) from error
    made.encode_special_tokens = True  # of a text that contains "[PAD]" these are five characters
    made.no_padding()
    made.enable_truncation(length)
    names = (found for name in (_PADDING, "<pad>") if (found := made.token_to_id(name)) is not None)
    padding = next(names, None)
    rows = np.full((len(texts), length), -1, dtype=np.int64)
    try:
        every = made.encode_batch(list(texts))
    except Exception as error:
        raise DataError(
            f"{where}: cannot encode a text ({error}); a tokenizer needs a token for what it does not know"
        ) from error
    for row, found in zip(rows, every, strict=True):
        if len(found.ids) > length:  # what it puts around every text is never cut
            raise DataError(
                f"{where}: puts {len(found.ids)} tokens around a text, more than length = {length}; raise it"
            )
        row[: len(found.ids)] = found.ids
    if padding is None:
        raise DataError(
            f"{where}: has no token {_PADDING!r} or '<pad>'; add one, as texts of unlike length need padding"
        )
    return np.where(rows == -1, 0, np.where(rows == padding, 0, np.where(rows == 0, padding, rows)))


def _package() -> Any:
    # A process that is forked after the package used threads, as a worker is, would be warned of at each fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return import_module("tokenizers")
    except ImportError as error:
        raise DataError(
            f"text needs the package tokenizers, which cannot be imported ({error}); run: pip install 'polyfed[text]'"
        ) from error
