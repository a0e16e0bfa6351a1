"""What pytest loads where polyfed is installed: two options, and the laws when they are asked for. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from polyfed.base.errors import ConfigError

LAWS = Path(__file__).with_name("laws.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    group = parser.getgroup("polyfed", "laws of federated algorithms")
    group.addoption(
        "--algorithm",
        action="append",
        default=[],
        dest="polyfed_algorithms",
        metavar="NAME",
        help="run polyfed's laws for this algorithm, such as my_pkg.my_file:MyAlgorithm or fedavg; repeatable",
    )
    group.addoption(
        "--law-config",
        default=None,
        dest="polyfed_law_config",
        metavar="FILE",
        help="TOML tables on top of the laws' configuration, such as [clients] models and keys of [algorithm]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """With ``--algorithm``: add the laws to what is collected; they are all of it if no path was given.

    Raises:
        pytest.UsageError: an algorithm that cannot be imported, or settings that are not there.
    """
    pytest.register_assert_rewrite("polyfed.testing.laws")
    names: list[str] = config.getoption("polyfed_algorithms", None) or []
    if not names:
        return
    from polyfed.base.imports import search_working_directory
    from polyfed.config import algorithm_class

    search_working_directory()
    for name in names:
        try:
            algorithm_class(name)
        except ConfigError as error:
            raise pytest.UsageError(f"--algorithm: {error}") from error
    settings: str | None = config.getoption("polyfed_law_config", None)
    if settings is not None and not Path(settings).is_file():
        raise pytest.UsageError(f"--law-config: no file {settings!r}")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args.clear()
    if str(LAWS) not in config.args:
        config.args.append(str(LAWS))


def _exemption(item: pytest.Item) -> str | None:
    """Why a law does not apply to its algorithm, if that says so."""
    module, parameters = getattr(getattr(item, "function", None), "__module__", ""), getattr(item, "callspec", None)
    if module != "polyfed.testing.laws" or parameters is None or "subject" not in parameters.params:
        return None
    from polyfed.config import algorithm_class

    law = item.name.partition("[")[0].removeprefix("test_")
    name = str(parameters.params["subject"])
    try:
        exempt: Mapping[str, str] = getattr(algorithm_class(name), "exempt", {})
    except ConfigError:  # the law itself will say so
        return None
    return f"{law} does not apply to {name}: {exempt[law]}" if law in exempt else None


_SAID = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the laws that an algorithm declares itself exempt from; `pytest_report_collectionfinish` says which."""
    reasons = {item: reason for item, reason in zip(items, map(_exemption, items), strict=True) if reason is not None}
    config.stash[_SAID] = sorted({*reasons.values()})
    if reasons:
        config.hook.pytest_deselected(items=[*reasons])
        items[:] = [item for item in items if item not in reasons]


def pytest_report_collectionfinish(config: pytest.Config) -> Any:
    """Say which laws do not apply, and why."""
    return config.stash.get(_SAID, [])
