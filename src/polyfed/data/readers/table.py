"""The rules for a table of the user's own, whatever its format: what each column is, and what is refused.

A column of numbers is a number; a column of text is a category, which becomes one column of zeros and ones per value
(all NaN where it is missing, so that imputation gives the category's frequency). Whatever could be read in two ways is
an error that names the option which decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.arrays import in_order, ranked
from polyfed.data.columns import Column, ColumnKind
from polyfed.data.dataset import check_digits
from polyfed.data.readers.cells import Padded, Sheet, Table, read_cells
from polyfed.data.readers.rules import MISSING, Rules
from polyfed.data.readers.tokenizer import Tokens

_MAX_CATEGORIES = 1000  # beyond this a column is an identifier or free text, not a category
_FEW = 20  # so many categories are plausible in the smallest table
_NAMELESS = re.compile(r"(Unnamed: \d+(\.\d+)?)?")  # pandas writes the second form when it reads and writes the first
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_DATE = re.compile(r"(\d{4}-\d{1,2}-\d{1,2}|\d{1,2}([./-])\d{1,2}\2(\d{4}|\d{2}))([ T]\d{1,2}:\d{2}.*)?$")
#: Numbers that often stand for a missing value where all other values are far from them.
_SENTINELS = (*(-9.0, -99.0, -999.0, -9999.0, -99999.0), *(999.0, 9999.0, 99999.0, 999999.0))
_NEEDED = ("label", "group", "unit", "time", "test")  # their columns may not be missing from a file
_TRUE, _FALSE = ("1", "1.0", "true", "yes", "test"), ("0", "0.0", "false", "no", "train")


def table_files(path: Path, suffix: str, test: object = None) -> list[Path]:
    """The files of a table: the file, or those of a folder by name; at the end the file of the test rows, if any.

    Args:
        path: a file or a folder.
        suffix: of the files in a folder, in small letters; files may have it in any case.
        test: the option of this name.

    Raises:
        DataError: there is no such file.
        ConfigError: a file of test rows beside a folder.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; expected a {suffix} file or a folder of them; correct the path"
        )
    beside = path.parent / test if isinstance(test, str) and test else None
    if beside is None or not (beside.is_file() or beside.suffix.lower() == suffix):
        beside = None
    if path.is_file():
        if beside is None:
            return [path]
        if not beside.is_file() or beside.samefile(path):
            raise DataError(
                f"{beside}: no file of test rows apart from {path.name}; correct the option `test`, which names it "
                f"relative to {path.parent}"
            )
        return [path, beside]
    if beside is not None:
        raise ConfigError(f"test: got {test!r}, but {path} is a folder; expected a column of its files that flags rows")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == suffix and file.is_file())
    if not files:
        raise DataError(f"{path}: no *{suffix} file in this folder; expected one per client; correct the path")
    stems = [file.stem for file in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise DataError(f"{path}: several files are called {', '.join(twice)}; expected one per client; rename them")
    return files


def read_table(
    path: Path, suffix: str, open_sheet: Callable[[Path], Sheet], rules: Rules, tokens: Tokens | None = None
) -> dict[str, Any]:
    """The fields of the `Dataset` of a table.

    Args:
        path: a file, or a folder of files, one per client (file name = group); of the same columns, unless the rules
            say otherwise.
        suffix: of the files in a folder.
        open_sheet: opens a file.
        rules: the options.
        tokens: how texts become tokens, if the rules name their column.

    Returns:
        Fields by name. With ``task = "regression"`` y is ``(N,)`` float64 and classes is empty.

    Raises:
        DataError: no rows, a missing label, one class only, or a cell or column that cannot be what it should be.
        ConfigError: options that contradict each other, or a guess that an option must replace.
    """
    if path.is_dir() and rules.group is not None:
        raise ConfigError(f"group: {path} is a folder, whose files are the groups; leave the option out")
    files = table_files(path, suffix, rules.test)
    apart = path.is_file() and len(files) > 1
    sheets = [open_sheet(file) for file in files]
    if rules.union:
        _check_named(rules)
        every = (*(name for sheet in sheets for name in sheet.names), *(column.name for column in rules.agreed or ()))
        sheets = [Padded(sheet, tuple(dict.fromkeys(every))) for sheet in sheets]
    names = sheets[0].names
    for sheet in sheets[1:]:
        if sorted(sheet.names) != sorted(names):
            own, others = (", ".join(name or "(no name)" for name in each) for each in (sheet.names, names))
            unlike = path.is_dir() and rules.text is None
            more = "; files that lack columns of others take the option `union`" if unlike else ""
            raise DataError(f"{sheet.path}: columns {own}; expected those of {sheets[0].path.name}: {others}{more}")
    _check_order(sheets, rules)
    roles = _roles(names, rules, path, apart)
    for at, role in roles.items():
        for sheet in sheets:
            if role in _NEEDED and isinstance(sheet, Padded) and names[at] not in sheet.given:
                raise DataError(f"{sheet.path}: lacks the {role}'s column {names[at]!r}; add it, or leave the file out")
    table = read_cells(sheets, roles, rules, path)
    _find_index(table, roles)
    shown = {column.name: column for column in rules.agreed or ()}
    features = [at for at in range(len(names)) if roles.get(at, "category") in ("category", "number")]
    if rules.agreed is not None:
        features = [names.index(name) for name, column in shown.items() if column.kind in ("number", "category")]
    if not features and rules.text is None:
        raise DataError(f"{path}: no feature columns beside the label; columns are {', '.join(names)}")
    found = {at: Column(names[at], role) for at, role in roles.items() if role not in ("category", "number")}
    label = next(at for at, role in roles.items() if role == "label")
    found[label], y, classes = _label(table, label, shown.get(names[label]))
    x = np.empty(0) if rules.text is not None else _features(table, features, shown, roles, found)
    order = sorted(found) if rules.agreed is None else [*features, *sorted(found.keys() - set(features))]
    group = next((at for at, role in roles.items() if role == "group"), None)
    groups, group_names = (None, ()) if group is None else _groups(table, group)
    if path.is_dir():
        group_names = tuple(file.stem for file in files)
        groups = np.repeat(np.arange(len(files)), np.diff(table.starts)).astype(np.int64)
    flags = next((at for at, role in roles.items() if role == "test"), None)
    test_rows = None if flags is None else _test_rows(table, flags)
    unit, time = (next((at for at, role in roles.items() if role == key), None) for key in ("unit", "time"))
    if apart:
        test_rows = np.arange(table.starts[1], table.starts[2], dtype=np.int64)
    form: dict[str, Any] = {}
    if tokens is not None and rules.text is not None:
        x, tokenizer = _tokens(table, next(at for at, role in roles.items() if role == "text"), test_rows, tokens)
        form = {"declared": "tokens", "bucket": tokens.bucket, "tokenizer": tokenizer}
    return form | {
        "name": path.stem,
        "x": torch.from_numpy(x),
        "y": torch.from_numpy(y),
        "classes": classes,
        "mean": (),
        "std": (),
        "test_rows": test_rows,
        "groups": groups,
        "group_names": group_names,
        "columns": tuple(found[at] for at in order),
        "units": None if unit is None else _groups(table, unit, "unit")[0],
        "times": None if time is None else _times(table, time),
        "unlabelled": rules.unlabelled,
    }


def _tokens(
    table: Table, at: int, test_rows: NDArray[np.int64] | None, tokens: Tokens
) -> tuple[NDArray[np.int64], str]:
    """``(N, T)`` tokens of a column of texts, and their tokenizer, which learns from rows that are no official test."""
    codes, texts = table.given(at, "text", ("",))
    training = np.delete(codes, [] if test_rows is None else test_rows)
    found, tokenizer = tokens.of(texts, [texts[code] for code in training])
    return found[codes], tokenizer


def _check_named(rules: Rules) -> None:
    """Refuse numbers of columns where files have unlike columns."""
    one = {"label": rules.label, "group": rules.group, "unit": rules.unit, "time": rules.time, "test": rules.test}
    lists = {"ignore": rules.ignore, "categorical": rules.categorical, "numeric": rules.numeric}
    if any(column.kind == "label" for column in rules.agreed or ()):
        del one["label"]
    given = [*one.items(), *((option, column) for option, columns in lists.items() for column in columns)]
    if faults := [
        f"{option}: got {column}; expected a name, as the numbers of columns differ from file to file with union = true"
        for option, column in given
        if isinstance(column, int)
    ]:
        raise ConfigError(*faults)


def _check_order(sheets: Sequence[Sheet], rules: Rules) -> None:
    """Refuse a number for a column that has another name in another file."""
    given = {"group": rules.group, "unit": rules.unit, "time": rules.time, "test": rules.test, "text": rules.text}
    if not any(column.kind == "label" for column in rules.agreed or ()):
        given |= {"label": rules.label}
    lists = {"ignore": rules.ignore, "categorical": rules.categorical, "numeric": rules.numeric}
    wanted = [*given.items(), *((option, column) for option, columns in lists.items() for column in columns)]
    first, faults = sheets[0], list[str]()
    for option, column in wanted:
        if not isinstance(column, int) or not -len(first.names) <= column < len(first.names):
            continue
        for sheet in sheets[1:]:
            if sheet.names[column] != first.names[column]:
                faults.append(
                    f"{option}: column {column} is {first.names[column]!r} in {first.path.name}, but "
                    f"{sheet.names[column]!r} in {sheet.path.name}; give its name"
                )
                break
    if faults:
        raise ConfigError(*faults)


def _roles(names: tuple[str, ...], rules: Rules, path: Path, apart: bool) -> dict[int, ColumnKind]:
    """What the options say of each column; features of which they say nothing are left out."""
    count, faults, clashes = len(names), list[str](), list[str]()
    roles: dict[int, ColumnKind] = {}
    agreed: dict[str, ColumnKind] = {column.name: column.kind for column in rules.agreed or ()}
    label = next((name for name, kind in agreed.items() if kind == "label"), rules.label)
    if isinstance(rules.label, str) and label != rules.label:
        clashes.append(f"label: got {rules.label!r}, but the sites agreed on {label!r}; change it")
    wanted: tuple[tuple[str, ColumnKind, Sequence[str | int | None]], ...] = (
        ("label", "label", [label]),
        ("group", "group", [rules.group]),
        ("unit", "unit", [rules.unit]),
        ("time", "time", [rules.time]),
        ("test", "test", [None if apart else rules.test]),
        ("text", "text", [rules.text]),
        ("ignore", "ignored", rules.ignore),
        ("categorical", "category", rules.categorical),
        ("numeric", "number", rules.numeric),
    )
    for option, role, columns in wanted:
        for column in columns:
            if isinstance(column, int) and -count <= column < count:
                at = column % count
            elif isinstance(column, str) and column in names:
                at = names.index(column)
            else:
                if column is not None:
                    faults.append(
                        f"{path}: no column {column!r} for option {option!r}; the columns are {', '.join(names)} "
                        f"(numbers 0 to {count - 1})"
                    )
                continue
            if role == "label" and column == -1 and _PANDAS_INDEX.fullmatch(names[at]):
                clashes.append(f"label: the last column of {path} is the index {names[at]!r}; name the label's column")
            if role == "number" and agreed.get(names[at]) == "category":
                clashes.append(f"numeric: the sites agreed that {names[at]!r} is a category; leave it out here")
            if role == "category" and agreed.get(names[at]) == "number":
                clashes.append(f"categorical: the sites agreed that {names[at]!r} holds numbers; leave it out here")
            if roles.setdefault(at, role) != role and (
                role not in ("category", "number") or roles[at] in ("category", "number")
            ):
                clashes.append(f"{option}: column {names[at]!r} is the {roles[at]} too; choose another")
    for at, name in enumerate(names):
        if agreed.get(name) in ("number", "category") and roles.get(at, "category") not in ("category", "number"):
            clashes.append(f"{name}: the {roles[at]} by an option, but the sites agreed on it as a feature; change one")
        if agreed.get(name) in ("index", "ignored", "group", "test", "unit", "time"):
            roles.setdefault(at, "ignored")
        elif agreed.get(name) in ("number", "category"):
            roles.setdefault(at, agreed[name])
    used = {name for name, kind in agreed.items() if kind in ("number", "category", "label")}
    more = [names[at] for at in range(count) if at not in roles and not _nameless(names[at])]
    if rules.agreed is not None and not faults and (used - set(names) or set(more) - used):
        lacks, has = sorted(used - set(names)), [name for name in more if name not in used]
        faults.append(
            f"{path}: the sites agreed on the columns {', '.join(agreed)}; this table lacks "
            f"{', '.join(lacks) or 'none'} and has {', '.join(has) or 'none'} beside them; rename columns, or name "
            "them in `ignore`"
        )
    if faults:
        raise DataError("\n".join(faults))
    if clashes:
        raise ConfigError(*clashes)
    if rules.text is not None:
        for at in range(count):
            roles.setdefault(at, "unused")
    return roles


def _nameless(name: str) -> bool:
    return bool(_NAMELESS.fullmatch(name) or _PANDAS_INDEX.fullmatch(name))


def _find_index(table: Table, roles: dict[int, ColumnKind]) -> None:
    """Leave out nameless leading columns that count the rows; refuse any other nameless column."""
    leading = True
    for at, name in enumerate(table.names):
        leading = leading and bool(_NAMELESS.fullmatch(name))
        if roles.get(at, "category") not in ("category", "number") or not _nameless(name):
            continue
        counts = _PANDAS_INDEX.fullmatch(name) is not None
        if leading and not table.cells[at].text:
            values = table.cells[at].joined()
            counts = all(
                values[begin] in {0, 1, begin, begin + 1}
                and np.array_equal(values[begin:end], values[begin] + np.arange(end - begin))
                for begin, end in zip(table.starts, table.starts[1:], strict=False)
            )
        if not counts:
            raise DataError(
                f"{table.sheets[0].path}: column {at} has no name and is no index, which would be in front and "
                "count 0, 1, 2 or 1, 2, 3 and so on, in every file; name it in the file, or leave it out with "
                f"`ignore = [{repr(name) if table.rules.union else at}]`"
            )
        roles[at] = "index"


def _label(
    table: Table, at: int, agreed: Column | None
) -> tuple[Column, NDArray[np.int64] | NDArray[np.float64], tuple[str, ...]]:
    """The record of the label, y and the names of the classes."""
    rules, name = table.rules, table.names[at]
    if rules.task == "regression":
        sure = at in rules.numeric or name in rules.numeric
        column, values = _number_column(table, at, sure=sure, label=True)
        if column.missing:
            bad = int(np.flatnonzero(np.isnan(values))[0])
            raise DataError(f"{table.place(bad)}: the label {name!r} is missing; fill it or drop the row")
        return Column(name, "label", low=column.low, high=column.high), values, ()
    given = rules.classes
    codes, texts = table.given(at, "label", set(rules.missing) - set(given or ()))
    if given is None:
        named = {text: text for text in texts}
        if any(sheet.guessed for sheet in table.sheets) and name in named:
            raise unclear_header(table.path, f"its label cell {name!r} is a class too")
        if agreed is None and texts:
            _check_classes(table, name, texts, codes[codes >= 0])
        classes = _in_order(texts)
    else:
        named = dict(given) if isinstance(given, Mapping) else {text: text for text in given}
        classes = tuple(dict.fromkeys(named.values()))
    if agreed is not None:
        classes = agreed.categories
    code = {text: number for number, text in enumerate(classes)}
    for number, text in enumerate(texts):
        if named.get(text) not in code:
            where = f"{table.first(codes, number)}: got {text!r} in the label {name!r}; "
            if text not in named:
                raise DataError(f"{where}expected one of the texts of `classes`: {', '.join(named)}; add it there")
            raise DataError(
                f"{where}the sites agreed on the classes {', '.join(classes)}; rename it by the option `classes`, or "
                "agree on it with the other sites"
            )
    numbers = np.asarray([*(code[named[text]] for text in texts), -1], dtype=np.int64)  # the last is that of -1
    return Column(name, "label", classes, missing=int((codes < 0).sum())), numbers[codes], classes


def _check_classes(table: Table, name: str, texts: Sequence[str], codes: NDArray[np.int32]) -> None:
    """Refuse a label that is no class."""
    numbers = [_float(text) for text in texts]
    numeric = None not in numbers
    fraction = next((t for t, n in zip(texts, numbers, strict=True) if n is not None and not n.is_integer()), None)
    advice = 'for a quantity set `task = "regression"`; otherwise choose another label column'
    if numeric and fraction is not None:
        raise DataError(
            f"{table.path}: the label {name!r} holds fractions, such as {fraction!r}; expected classes (whole "
            f"numbers or names); {advice} or bin the values"
        )
    if (len(texts) > 10 and len(codes) < 3 * len(texts)) or (numeric and 5 < len(texts) == len(codes)):
        raise DataError(
            f"{table.path}: the label {name!r} has {len(texts)} different values in {len(codes)} rows; expected "
            f"classes that occur several times each; {advice if numeric else 'choose another label column'}, or name "
            "the classes in `classes`"
        )
    if len(texts) < 2:
        raise DataError(
            f"{table.path}: got one class, {texts[0]!r}, in {name!r}; expected at least 2; name all classes in "
            "`classes` if the others are elsewhere"
        )


def _float(text: str) -> float | None:
    """Return the finite number that a text is, with a decimal point; None if it is none."""
    value = Rules().number(text)
    return value if value is not None and math.isfinite(value) else None


def _in_order(texts: Sequence[str]) -> tuple[str, ...]:
    """Texts that are all numbers in the order of their numbers, any others in alphabetical order."""
    if any(_float(text) is None for text in texts):
        return tuple(sorted(texts))
    return tuple(sorted(texts, key=lambda text: (Decimal(text), text)))


def _nothing(table: Table, at: int) -> bool:
    """Whether a column of texts has no text but those that stand for a missing value."""
    return table.cells[at].text and set(table.cells[at].texts) <= set(table.rules.missing)


def number_cells(table: Table, at: int, *, label: bool = False) -> NDArray[np.float64]:
    """The cells of a column of numbers, ``(N,)``, NaN where missing; ``label`` says that it is to be predicted.

    Raises:
        DataError: a text, or a number that float32 does not hold; the text names its line.
    """
    cells, name = table.cells[at], table.names[at]
    if _nothing(table, at):
        return np.full(table.starts[-1], math.nan)
    if cells.text:
        _refuse_text(table, at, label=label)
    values = cells.joined()
    bad = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
    if len(bad):
        raise DataError(
            f"{table.place(int(bad[0]))}: '{values[bad[0]]:g}' in {name!r} is not a finite number of float32; correct "
            "the cell, or name it in `missing`"
        )
    return values


def _number_column(
    table: Table, at: int, *, sure: bool = False, label: bool = False
) -> tuple[Column, NDArray[np.float64]]:
    """The record and the cells of a column of numbers; refuse texts, and codes unless it is ``sure`` of numbers."""
    name, values, code = table.names[at], number_cells(table, at, label=label), table.cells[at].code
    if code is not None and not sure:
        raise DataError(
            f"{table.path}: column {name!r} holds {code!r}, which may be a number or a code; name the column in "
            + ("`numeric`, or choose another label column" if label else "`numeric` or in `categorical`")
        )
    check_digits(values, f"{table.path}: column {name!r}")
    there = values[~np.isnan(values)]
    low, high = (float(there.min()), float(there.max())) if len(there) else (None, None)
    doubt = _sentinel(there)
    return Column(name, "number", missing=len(values) - len(there), low=low, high=high, doubt=doubt), values


def _sentinel(values: NDArray[np.float64]) -> float | None:
    """The number that may stand for a missing value: -999 where all others are at least 0, 999 far above all others."""
    for number in (values.min(), values.max()) if len(values) else ():
        others = values[values != number]
        if number in _SENTINELS and len(others) and (others.min() >= 0 if number < 0 else others.max() < number / 3):
            return float(number)
    return None


def _refuse_text(table: Table, at: int, *, unless: bool = False, label: bool = False) -> None:
    """Refuse a column for its first text; with ``unless`` only if half of its cells, or of its values, are numbers."""
    rules, cells, name = table.rules, table.cells[at], table.names[at]
    codes, texts = cells.joined(), list(cells.texts)
    counts = np.bincount(codes[codes >= 0], minlength=len(texts))
    here = [code for code, text in enumerate(texts) if text not in rules.missing]
    numbers = [code for code in here if rules.number(texts[code]) is not None]
    words = sorted(set(here) - set(numbers))
    likely = numbers + [code for code in words if rules.hint(texts[code])]
    if unless and 2 * len(likely) < len(here) and 2 * counts[likely].sum() < counts[here].sum():
        return
    odd = words[0] if words else here[0]
    others = int(counts[words].sum()) - 1
    typed = any(sheet.typed for sheet in table.sheets)
    hint = "if the column were saved as numbers" if typed and not words else None if typed else rules.hint(texts[odd])
    alike = int(counts[numbers].sum())
    odd_rows = np.flatnonzero(np.isin(codes, words))
    where = {int(at) for at in np.searchsorted(table.starts, odd_rows, side="right") - 1}
    alone = len(where) == 1 < len(table.sheets) and alike and not (typed and not words)
    raise DataError(
        f"{table.first(codes, odd)}: got {texts[odd]!r} in column {name!r}; expected a number"
        + (f", as in {alike} of its {len(codes)} cells" if alike and words else "")
        + (f" ({others} other cells are no numbers either)" if others > 0 else "")
        + (f"; it would be a number {hint}" if hint else "")
        + (f"; only {table.sheets[where.pop()].path.name} has such cells: convert this file" if alone else "")
        + (
            "; it is one of the usual spellings of a missing value, which `missing` replaces: use `also_missing`"
            if texts[odd] in MISSING
            else ""
        )
        + (
            "; a regression predicts this column: correct the cell or drop the row, name another `label`, or set "
            'data.task = "classification" if the texts are classes'
            if label
            else "; correct the cell, name it in `missing` or `also_missing` if it stands for a missing value, or name "
            "the column in `categorical` or `ignore`"
        )
    )


def _category_column(table: Table, at: int, agreed: Column | None, sure: bool) -> tuple[Column, NDArray[np.int32]]:
    """The record of a category, and the number of the category of each row, -1 where it is missing."""
    rules, cells, name = table.rules, table.cells[at], table.names[at]
    if not sure and not cells.declared:
        _refuse_text(table, at, unless=True)
    codes, texts = cells.joined(), list(cells.texts)
    levels = agreed.categories if agreed else tuple(sorted(set(texts) - set(rules.missing)))
    if "+" in levels and "-" in cells.texts and tuple(rules.missing) == MISSING:
        raise DataError(
            f"{table.path}: column {name!r} has '+' and '-', which may stand for a missing value or for its opposite; "
            "give the option `missing`, with or without '-'"
        )
    rows = len(codes)
    if len(levels) > _MAX_CATEGORIES or (not (sure or cells.declared) and _FEW < len(levels) > rows / 2):
        free = sum(" " in level for level in levels) > len(levels) / 2
        raise DataError(
            f"{table.path}: column {name!r} has {len(levels)} different texts in {rows} rows; expected categories "
            f"that occur several times each, at most {_MAX_CATEGORIES}; name the column in `ignore` if it is an "
            "identifier, a date or free text, merge its categories, or name it in `categorical`"
            + ("; to predict from free text alone, name its column in `text`: it becomes tokens" if free else "")
        )
    if not (sure or cells.declared) and len(levels) > 2 and all(map(_DATE.match, levels)):
        raise DataError(
            f"{table.path}: column {name!r} holds {len(levels)} dates, such as {levels[0]!r}; name it in `time`, "
            "`unit` or `ignore`, or in `categorical` if each is a category"
        )
    number = {level: place for place, level in enumerate(levels)}
    for code, text in enumerate(texts):
        if text not in number and text not in rules.missing:
            raise DataError(
                f"{table.first(codes, code)}: got {text!r} in column {name!r}; the sites agreed on the categories "
                f"{', '.join(levels)}; correct the cell, name it in `missing`, or agree on it with the other sites"
            )
    places = np.asarray([*(number.get(text, -1) for text in texts), -1], dtype=np.int32)[codes]
    return Column(name, "category", levels, missing=int((places < 0).sum())), places


def _features(
    table: Table,
    features: Sequence[int],
    agreed: Mapping[str, Column],
    roles: Mapping[int, ColumnKind],
    found: dict[int, Column],
) -> NDArray[Any]:
    """``(N, F)`` features; adds the record of each column to ``found``.

    The cells of a column are given up as soon as they are in x: the cells of all columns, once more, and as narrow as
    possible, are all the memory needed beside x. Whole numbers up to 127 and categories, if there is nothing else, are
    kept as float32, which gives the same numbers once they are standardised.
    """
    places: dict[int, NDArray[np.int32]] = {}
    for at in features:
        cells, role = table.cells[at], roles.get(at)
        if role != "category" and _nothing(table, at):  # numbers, as a csv file has it
            cells.parts, cells.text = [np.full(table.starts[-1], math.nan, dtype=np.float16)], False
        if cells.text and role == "number":
            _refuse_text(table, at)
        if cells.text:
            sure = bool(agreed) or role == "category"
            found[at], places[at] = _category_column(table, at, agreed.get(table.names[at]), sure)
            table.cells[at].parts.clear()
        else:
            found[at], _ = _number_column(table, at, sure=role == "number")
    small = all(
        part.dtype == np.float16 and np.array_equal(part, np.clip(np.rint(part), -127, 127), equal_nan=True)
        for at in features
        for part in table.cells[at].parts
    )
    width = sum(len(found[at].categories) if at in places else 1 for at in features)
    x = np.empty((table.starts[-1], width), dtype=np.float32 if small else np.float64)
    begin = 0
    for at in features:
        if at not in places:
            x[:, begin] = table.cells[at].joined()
            table.cells[at].parts.clear()
            begin += 1
            continue
        for level in range(len(found[at].categories)):
            x[:, begin] = np.where(places[at] < 0, math.nan, places[at] == level)
            begin += 1
        del places[at]
        places[at] = np.empty(0, dtype=np.int32)
    return x


def _times(table: Table, at: int) -> NDArray[np.int64]:
    codes, texts = table.given(at, "time", table.rules.missing)
    return ranked(np.array(texts), len(texts), f"{table.path}: column {table.names[at]!r}")[codes]


def _groups(table: Table, at: int, role: str = "group") -> tuple[NDArray[np.int64], tuple[str, ...]]:
    codes, texts = table.given(at, role, table.rules.missing)
    names = in_order(texts, units=role == "unit")
    number = {name: place for place, name in enumerate(names)}
    return np.asarray([number[text] for text in texts], dtype=np.int64)[codes], tuple(names)


def _test_rows(table: Table, at: int) -> NDArray[np.int64]:
    codes, texts = table.given(at, "test flag", table.rules.missing)
    for code, text in enumerate(texts):
        if text.casefold() not in (*_TRUE, *_FALSE):
            raise DataError(
                f"{table.first(codes, code)}: got {text!r} in the test column {table.names[at]!r}; expected one of "
                f"{', '.join((*_TRUE, *_FALSE))}; correct the cell"
            )
    rows = np.flatnonzero(np.asarray([text.casefold() in _TRUE for text in texts])[codes])
    if len(rows) in (0, len(codes)):
        raise DataError(
            f"{table.path}: the test column {table.names[at]!r} flags {len(rows)} of {len(codes)} rows; expected some "
            "rows for training and some for the test"
        )
    return rows.astype(np.int64)


def unclear_header(path: Path, why: str) -> ConfigError:
    """The error for a first line that may be names or data."""
    return ConfigError(f"header: the first line of {path} may be names or data, as {why}; set header to true or false")
