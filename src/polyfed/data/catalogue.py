"""Names of data sets and partitions with one-line summaries; imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal, cast

#: Name of a data set -> one line about it.
DATASETS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "UCI optical digits, 1,797 grey images of 8x8 shown as 32x32; comes with polyfed",
        "mnist": "MNIST handwritten digits, 60,000 + 10,000 grey images of 28x28 padded to 32x32",
        "fashion-mnist": "Fashion-MNIST clothing, 60,000 + 10,000 grey images of 28x28 padded to 32x32",
        "cifar10": "CIFAR-10 photographs, 50,000 + 10,000 colour images of 32x32, 10 classes",
        "cifar100": "CIFAR-100 photographs, 50,000 + 10,000 colour images of 32x32, 100 classes",
        "svhn": "SVHN house numbers, 73,257 + 26,032 colour images of 32x32, 10 digits; 531,131 more with extra",
        "uci-har": "UCI HAR, 7,352 + 2,947 windows of 9 signals x 128 steps, 6 activities; 30 subjects are the groups",
        "agnews": "AG News, 120,000 + 7,600 titles and descriptions of news in 4 classes; text, as tokens",
        "agnews-noisy": "AG News whose training labels people gave, a fifth of them wrong (NoisyAG-News)",
        "agnews-extra": "AG News with the further training rows of train_extra_joined.csv",
        "leaf": "your own text in LEAF's layout: what follows 80 characters, or some words; users are the groups",
        "breast-cancer": "UCI breast cancer, a table: 569 tumours, 30 measures of cells, 2 classes; comes with polyfed",
        "npz": "your own arrays: x and y, optionally test, groups, units, times and classes, in one .npz file",
        "medmnist": "a file of MedMNIST, or of its layout: medical images of 28x28 to 224x224, grey or colour, by path",
        "csv": "your own table: one .csv file, or a folder with one .csv file per client",
        "parquet": "your own table with types: one .parquet file, or a folder with one .parquet file per client",
        "images": "your own image files: folders by class, or by client and class, or with a table that says both",
        "huggingface": "your own folder of Hugging Face's datasets, as save_to_disk writes it",
        "python": "your own arrays, torch data sets or frames, given from Python: simulate(config, dataset=...)",
    }
)

#: Name of a public data set -> its rows, and how many of them are the official test rows. The other data sets are files
#: of the user's own.
SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "digits": (1797, 0),
        "mnist": (70_000, 10_000),
        "fashion-mnist": (70_000, 10_000),
        "cifar10": (60_000, 10_000),
        "cifar100": (60_000, 10_000),
        "svhn": (99_289, 26_032),
        "uci-har": (10_299, 2_947),
        **dict.fromkeys(("agnews", "agnews-noisy", "agnews-extra"), (127_600, 7_600)),
        "breast-cancer": (569, 0),
    }
)

#: Name of a public data set of texts -> the folder of its files, in the cache and in $POLYFED_DATA.
TEXTS: Mapping[str, str] = MappingProxyType(dict.fromkeys(("agnews", "agnews-noisy", "agnews-extra"), "ag_news_csv"))

#: Most tokens of a text, and of a vocabulary, if no option says so.
LENGTH, VOCABULARY = 64, 8192

#: Name of a public data set -> channels and classes; of a table nobody need know them before it is read.
SHAPES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "digits": (1, 10),
        "mnist": (1, 10),
        "fashion-mnist": (1, 10),
        "cifar10": (3, 10),
        "cifar100": (3, 100),
        "svhn": (3, 10),
        "uci-har": (9, 6),
        **dict.fromkeys(TEXTS, (1, 4)),
    }
)

#: Name of a public data set of signals -> steps of a row. The others are images.
STEPS: Mapping[str, int] = MappingProxyType({"uci-har": 128})


def row_shape(
    name: str, image_size: int | None, options: Mapping[str, object] = MappingProxyType({})
) -> tuple[int, ...]:
    """Return the shape of a row of public data: ``(C, H, W)``, 32 pixels a side by default, ``(C, T)``, ``(T,)``."""
    if name in TEXTS:
        return (cast("int", options.get("length", LENGTH)),)
    channels, side = SHAPES[name][0], image_size or 32
    return (channels, STEPS[name]) if name in STEPS else (channels, side, side)


#: Data sets without images, whatever their files hold.
IMAGELESS = (*STEPS, *TEXTS, "leaf", "breast-cancer")

#: Data sets that come with polyfed.
INSIDE = ("digits", "breast-cancer")

#: Data sets that are tables of the user's own -> the suffix of their files.
TABLES: Mapping[str, str] = MappingProxyType({"csv": ".csv", "parquet": ".parquet"})

#: Data sets whose labels may be numbers to predict.
NUMERIC = ("npz", "python", *TABLES)

#: Options of texts, which say how these become tokens.
TOKENS = ("vocabulary", "length", "tokenizer", "bucket")

#: Options of a table that say what its features are, and so mean nothing where a text is all that is read.
_FEATURES = ("missing", "also_missing", "categorical", "numeric", "union")

_TABLE_OPTIONS = (
    *("label", "classes", "missing", "also_missing", "categorical", "numeric"),
    *("group", "unit", "time", "ignore", "test", "union", "unlabelled", "text", *TOKENS),
)

#: Name of a data set -> options of ``load_dataset`` beyond path, cache and image_size.
DATASET_OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "digits": (),
        "mnist": (),
        "fashion-mnist": (),
        "cifar10": (),
        "cifar100": (),
        "svhn": ("extra",),
        **dict.fromkeys(TEXTS, TOKENS),
        "leaf": ("vocabulary", "length", "bucket"),
        "uci-har": ("statistics",),
        "breast-cancer": (),
        "npz": ("flip", "kind", "layout", "unlabelled"),
        "medmnist": ("flip", "label", "validation"),
        "csv": ("header", *_TABLE_OPTIONS, "delimiter", "decimal", "thousands", "encoding"),
        "parquet": _TABLE_OPTIONS,
        "images": ("channels", "flip", "table", "file", "label", "group", "unit", "time"),
        "huggingface": ("input", "label", "ignore", "group", "unit", "time", "kind", "layout", "channels", "flip"),
        "python": (),
    }
)


def _column(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _listed(value: object, right: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(right, cast("Sequence[object]", value)))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _encoding(value: object) -> bool:
    try:
        return isinstance(value, str) and "1".encode(value).decode(value) == "1"  # some codecs are not of text
    except (LookupError, ValueError):
        return False


def _classes(value: object) -> bool:
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return all(isinstance(text, str) for text in (*mapping, *mapping.values())) and len({*mapping.values()}) > 1
    if not _listed(value, lambda text: isinstance(text, str)):
        return False
    texts = cast("Sequence[str]", value)
    return len({*texts}) == len(texts) > 1


#: Order of the axes of an array -> the kind of its rows. N: rows; C: channels; H, W: height, width; T: steps of time.
LAYOUTS: Mapping[str, Literal["image", "series"]] = MappingProxyType(
    {"NCHW": "image", "NHWC": "image", "NHW": "image", "NTC": "series", "NCT": "series"}
)

_KINDS = ("image", "features", "series", "tokens")


#: Option of a data set -> its valid values, in words and as a test.
_OPTIONS: Mapping[str, tuple[str, Callable[[object], bool]]] = MappingProxyType(
    {
        "flip": ("true or false", lambda value: isinstance(value, bool)),
        "validation": ("true or false", lambda value: isinstance(value, bool)),
        "extra": ("true or false", lambda value: isinstance(value, bool)),
        "vocabulary": ("a whole number of tokens, 3 or more", lambda value: _whole(value, 3)),
        "length": ("a whole number of tokens above 0", lambda value: _whole(value, 1)),
        "bucket": ("a whole number of tokens, or 0 for batches of full length", lambda value: _whole(value, 0)),
        "tokenizer": ("the path of a tokenizer.json", lambda value: value is None or isinstance(value, str)),
        "statistics": ("true or false", lambda value: isinstance(value, bool)),
        "union": ("true or false", lambda value: isinstance(value, bool)),
        "unlabelled": ("true or false", lambda value: isinstance(value, bool)),
        "channels": ("1 (grey) or 3 (colour)", lambda value: value is None or value in (1, 3)),
        "table": ("the name of a csv file in the folder", lambda value: value is None or isinstance(value, str)),
        "input": ("the name of a column", lambda value: value is None or isinstance(value, str)),
        "file": ("the name or number of a column", lambda value: value is None or _column(value)),
        "unit": ("the name or number of a column", lambda value: value is None or _column(value)),
        "time": ("the name or number of a column", lambda value: value is None or _column(value)),
        "kind": (f"one of {', '.join(_KINDS)}", lambda value: value is None or value in _KINDS),
        "layout": (f"one of {', '.join(LAYOUTS)}", lambda value: value is None or value in [*LAYOUTS]),
        "header": ("true or false", lambda value: value is None or isinstance(value, bool)),
        "label": ("the name or number of a column", _column),
        "text": ("the name or number of the column of texts", lambda value: value is None or _column(value)),
        "group": ("the name or number of a column", lambda value: value is None or _column(value)),
        "missing": ("a list of strings", lambda value: _listed(value, lambda text: isinstance(text, str))),
        "also_missing": ("a list of strings", lambda value: _listed(value, lambda text: isinstance(text, str))),
        "categorical": ("a list of columns, each by its name or number", lambda value: _listed(value, _column)),
        "numeric": ("a list of columns, each by its name or number", lambda value: _listed(value, _column)),
        "ignore": ("a list of columns, each by its name or number", lambda value: _listed(value, _column)),
        "test": (
            "the name or number of a column that flags test rows, or the file of the test rows",
            lambda value: value is None or _column(value),
        ),
        "classes": (
            "names of at least two classes by the label's texts, such as { 0 = 'healthy', 1 = 'ill', 2 = 'ill' }, or a "
            "list of at least two different texts",
            lambda value: value is None or _classes(value),
        ),
        "delimiter": (
            "one character of ASCII such as ',' or ';', no quote and no line end",
            lambda value: isinstance(value, str) and len(value) == 1 and value.isascii() and value not in '\0\n\r"',
        ),
        "decimal": ("'.' or ','", lambda value: value in (".", ",")),
        "thousands": ("'.', ',', ' ' or \"'\"", lambda value: value is None or value in (".", ",", " ", "'")),
        "encoding": ("the name of a text encoding, such as 'utf-8', 'latin-1' or 'utf-16'", _encoding),
    }
)


def option_fault(dataset: str, option: str, value: object) -> str | None:
    """Return the fault in the value of a data set's option; None if there is none."""
    expected, right = _OPTIONS[option]
    if option == "vocabulary" and dataset != "leaf":  # of pieces of bytes
        expected, right = "258 or more: 256 bytes, padding and the start of a text", partial(_whole, least=258)
    return None if right(value) else f"got {value!r}; expected {expected}"


def option_misfits(dataset: str, options: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (option, fault) for the options of a table that do not go together."""
    if dataset not in TABLES:
        return
    if options.get("text") is None:
        yield from (
            (option, "says how texts become tokens; name the column of texts by the option `text`, or leave it out")
            for option in TOKENS
            if option in options
        )
        return
    yield from (
        (option, f"means nothing beside text = {options['text']!r}, as no other column is a feature; leave it out")
        for option in _FEATURES
        if option in options
    )


#: Kind of partition -> one line about it.
PARTITIONS: Mapping[str, str] = MappingProxyType(
    {
        "iid": "rows dealt at random, equal numbers for all clients",
        "classes": "each client holds classes_per_client classes, of uneven shares",
        "dirichlet": "each class is spread over the clients by Dirichlet(alpha); sizes differ",
        "balanced-dirichlet": "each client draws its class mix from Dirichlet(alpha); equal sizes",
        "natural": "one client per group of the data set, such as a hospital or a person",
        "resampled": "clients share rows: each draws from the whole set, its class mix from Dirichlet(alpha)",
    }
)

#: Kinds of partition that need no classes.
CLASSLESS = ("iid", "natural")

#: Kind of partition -> its own options of ``make_partition``.
PARTITION_OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "iid": (),
        "classes": ("classes_per_client",),
        "dirichlet": ("alpha",),
        "balanced-dirichlet": ("alpha", "tests"),
        "natural": ("groups",),
        "resampled": ("alpha",),
    }
)
