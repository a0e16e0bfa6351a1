"""The documentation is true: its code runs, configurations are valid, links lead somewhere, nothing is missing."""

import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import torch

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.config import Config, algorithm_class, algorithm_fields
from polyfed.config.profiles import TABLES, load_profiles
from polyfed.data.catalogue import DATASET_OPTIONS, DATASETS, PARTITION_OPTIONS, PARTITIONS
from polyfed.deploy.settings import Deployment
from polyfed.experiments.catalogue import items
from polyfed.experiments.study import Study, Tune
from polyfed.experiments.views import VIEWS
from polyfed.metrics.catalogue import METRICS
from polyfed.models.catalogue import MODELS, OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(*languages: str) -> Iterator[object]:
    """The fenced blocks of all pages; ``no-run`` behind the language leaves one out."""
    for page in PAGES:
        for number, found in enumerate(BLOCK.finditer(page.read_text())):
            if found[1] in languages and "no-run" not in found[2]:
                yield pytest.param(found[3], id=f"{page.relative_to(ROOT)}-{number}")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory, one thread, and the examples importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in ("own_model", "own_networks", "own_csv", "own_images", "own_series", "compare_algorithms"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("block", list(blocks("toml")))
def test_configurations_are_valid(block: str) -> None:
    tables = tomllib.loads(block)
    if "title" in tables:  # a study
        Path("study.toml").write_text(block)
        for scale in tables.get("scales", {None: {}}):
            Study.load(Path("study.toml"), scale)
    elif tables.keys() & {"rounds", "server"}:  # a deploy.toml
        Deployment.model_validate(tables)
    else:
        Config.parse(tables)


@pytest.mark.parametrize("block", list(blocks("python")))
def test_python_runs(block: str) -> None:
    # Under the name of a module of its own, for a class that is asked for by its module.
    exec(compile(block, "<documentation>", "exec"), {"__name__": "documentation"})


def _commands() -> Iterator[object]:
    for parameter in blocks("sh", "console"):
        for line in parameter.values[0].splitlines():  # type: ignore[attr-defined]
            for command in line.split(" && "):
                if command.startswith("polyfed "):
                    yield pytest.param(shlex.split(command)[1:], id=command)


@pytest.mark.parametrize("arguments", list(_commands()))
def test_commands_exist(arguments: list[str]) -> None:
    import typer

    from polyfed.cli import app

    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    context = command.make_context(arguments[0], list(arguments[1:]))
    Config.load(None, context.params.get("overrides") or ())


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name} links to {target}"


def _row(page: str, key: str) -> list[str]:
    """The cells of the table row that documents ``key``."""
    for line in page.splitlines():
        if line.startswith(f"| `{key}` |"):
            return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    raise AssertionError(f"{key} is not documented")


def _default(value: object) -> str:
    return "none" if value is None or value is MISSING else f"`{json.dumps(value)}`"


def test_every_configuration_key_is_documented_with_its_default() -> None:
    page, defaults = text("docs/configuration.md"), Config.parse({"devices": {}})
    of_kinds = {"classes_per_client": 2, "alpha": 0.5}  # only where the kind takes them
    for name in ("run", "data", "partition", "clients", "train", "devices"):
        section = getattr(defaults, name)
        for key, field in type(section).model_fields.items():
            value = of_kinds.get(key, field.default if field.default_factory is None else {})
            if (name, key) == ("clients", "models"):
                value = ["cnn5"]
            assert _row(page, f"{name}.{key}")[2] == _default(value), f"{name}.{key}"
    for name in ("algorithm", "algorithms", "controls"):
        assert f"[{name}" in page
    assert _row(page, "algorithm.name")[2] == _default(defaults.algorithm.name)
    assert len(Config.model_fields) == 9, "a new section needs a place in docs/configuration.md"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_page_with_all_its_keys(name: str) -> None:
    page = text(f"docs/algorithms/{name}.md")
    cls = algorithm_class(name)
    for key, field in algorithm_fields(cls).items():
        assert _row(page, key)[2] == _default(field.default), key
    for message in (*cls.messages, *cls.states):
        assert message.__name__ in page or message.__name__ == "Nothing"
    assert f"`{name}`" in text("README.md")
    assert f"\n| [`{name}`]({name}.md) |" in text("docs/algorithms/index.md")
    assert re.search(r"\b20\d\d\b", page) or name == "standalone"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_says_what_it_was_compared_with(name: str) -> None:
    """Catches a source that nobody read and no difference is said of, and a list that is empty."""
    page = text(f"docs/algorithms/{name}.md")
    sources = ("the paper's text", "the authors' code", "HtFLlib")
    found = re.findall(r"^### From (.*): (?:read|not read)\n\n(?!#)(.)", page, re.MULTILINE)
    assert [source for source, _ in found] == list(sources)
    assert not re.search("none known", page, re.IGNORECASE)


def test_fedin_is_called_a_reconstruction_in_its_first_line() -> None:
    assert "reconstruction" in text("docs/algorithms/fedin.md").splitlines()[0]


def test_catalogues_are_documented() -> None:
    data, models = text("docs/data.md"), text("docs/models.md")
    for name in (*DATASETS, *PARTITIONS):
        _row(data, name)
    for option in {
        option for options in (*DATASET_OPTIONS.values(), *PARTITION_OPTIONS.values()) for option in options
    }:
        assert f"`{option}`" in data, option
    for name, line in MODELS.items():
        count = re.search(r"([\d,]+) parameters", line)
        assert not count or _row(models, name)[1] == count[1], name
    for option in {option for options in OPTIONS.values() for option in options}:
        assert f"`{option}`" in models, option


def test_metrics_are_documented() -> None:
    for name in METRICS:
        _row(text("docs/metrics.md"), name)


def test_the_tables_of_devices_are_documented(tmp_path: Path) -> None:
    page = text("docs/clocks.md")
    for table in TABLES:
        assert f"**`{table}`**" in page
        for found in load_profiles(table):
            cells = [found.share, found.compute_gflops, found.memory_mb, found.down_mbps, found.up_mbps]
            day = f"{found.hours[0]:g} / {found.hours[12]:g}"
            assert _row(page, found.device)[1:] == [*(f"{cell:g}" for cell in cells), day], found.device
    (tmp_path / "wards.csv").write_text(re.search(r"```csv\n(.*?)```", page, re.DOTALL)[1])
    desktop, tablet = load_profiles(str(tmp_path / "wards.csv"))
    assert (desktop.hours, tablet.share, tablet.hours[6:8]) == ((1.0,) * 24, 3.0, (0.5, 0.0))
    phone = load_profiles("cross-device")[1]
    legs = phone.seconds(10**6, 2 * 10**9, 10**6)
    assert f"{' + '.join(f'{leg:.3f}' for leg in legs)} = {sum(legs):.3f} s" in page


def test_studies_are_documented() -> None:
    page = text("docs/experiments.md")
    for name in (*items(), *VIEWS):
        _row(page, name)
    for key in (*Study.model_fields, *Tune.model_fields):
        assert f"`{key}" in page, key


def test_exit_codes_are_documented() -> None:
    from polyfed.base import errors

    page = text("docs/run-directory.md")
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.PolyfedError):
            assert f"| {cls.exit_code} | `{cls.__name__}` |" in page


#: Keys below which names of models, predictors and so on stand.
_NAMED = ("predictors", "by_model", "by_capacity", "global", "global_local", "step_peak", "correct")
_NAMED += ("metrics", "majority", "by_class", "pooled_by_class")


def _keys(value: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            named = path and (path[-1] in _NAMED or path[-2:-1] == ("by_class",))
            yield from _keys(below, (*path, "NAME" if named else key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _keys(value[0], path)
    else:
        yield ".".join(path)


_MEASURED = {"rounds": 1, "metrics": ["auroc", "accuracy", "ece"], "predictions": True, "targets": ["auroc=0.01"]}
_NAMES = {"count": 2, "models": ["mlp(hidden=(8,))"], "names": ["Ulm", "Bonn"]}
#: Of eight rounds of two clients some are void and some are not.
_SILOS = {"profiles": "cross-silo", "start_hour": 9.0, "dropout": 0.2, "deadline": 1.0, "min_replies": 2}


@pytest.mark.parametrize("more", [{}, {"devices": _SILOS}, {"run": _MEASURED, "clients": _NAMES}])
def test_every_key_of_the_results_is_documented(more: dict[str, Any]) -> None:
    from polyfed import simulate

    config = Config.parse(
        {
            "run": {"rounds": 8 if more else 1, "targets": [0.01]},
            "data": {"image_size": 16},
            "partition": {"samples_per_client": 20},
            "clients": {"count": 2, "models": ["mlp(hidden=(8,))"]},
            "algorithm": {"name": "fedavg"},
            **more,
        }
    )
    summary = simulate(config, out=Path("run")).summary
    assert "devices" not in more or 0 < summary["simulated"]["void"] < 8
    page = text("docs/run-directory.md")
    sections = {
        name: page.split(f"## `{name}`")[1].split("\n## ")[0]
        for name in ("rounds.jsonl", "clients.jsonl", "summary.json")
    }
    for name, section in sections.items():
        lines = (
            [json.loads(line) for line in Path("run", name).read_text().splitlines()]
            if name != "summary.json"
            else [summary]
        )
        for key in {key for line in lines for key in _keys(line)}:
            key = re.sub(r"targets.auroc", "targets.METRIC", key)
            key = re.sub(r"(?<=failed)\.\d+$", "", key)  # by client
            assert f"`{key}`" in section, f"{name}: {key}"
    for name in json.loads(Path("run/environment.json").read_text()):
        assert f"`{name}`" in page
    for path in Path("run").iterdir():
        assert f"`{path.name}" in page, path.name


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("own_model", ["1"]),
        ("own_networks", ["1"]),
        ("own_csv", ["1"]),
        ("four_hospitals", ["1"]),
        ("own_images", ["1"]),
        ("own_series", ["1"]),
        ("compare_algorithms", ["1", "1"]),
    ],
)
def test_examples_run(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "runs" in capsys.readouterr().out
    assert list(Path("runs").iterdir())


@pytest.mark.parametrize("name", ["Pretrained", "Gru", "Convolutions", "Transformer", "Tokens"])
def test_the_networks_that_the_page_shows_are_those_of_the_example(name: str) -> None:
    example = text("examples/own_networks.py")
    shown = re.search(rf"^class {name}\(.*?(?=^(?:class|def) )", example, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[0].rstrip() in text("docs/models.md")
