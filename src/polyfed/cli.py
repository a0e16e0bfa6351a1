"""The command `polyfed`. Heavy modules are imported by the command that needs them, so that help comes at once."""

from __future__ import annotations

import atexit
import gc
import json
import shlex
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyfed.base.errors import ConfigError, PolyfedError, StorageError
from polyfed.base.imports import search_working_directory
from polyfed.deploy.cli import app as deploy_app

if TYPE_CHECKING:
    from rich.console import Console

    from polyfed.data.dataset import Dataset
    from polyfed.data.partition.partition import Partition

INTERRUPTED = 130

_EPILOG = """\b
Exit codes:
  0  done
  1  another error, or a bug (with its traceback)
  2  configuration or command line: every fault is listed
  3  data: missing, damaged, or too few
  4  model: cannot be built, cut or matched with the others
  5  message: bytes that do not decode
  6  checkpoint: damaged, foreign or missing
  7  run directory: in use, or not a run
  8  diverged: a loss or weight is not finite
  9  storage: a write failed
  130  Ctrl-C; polyfed prints the command that resumes the run
"""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes a tenth of a second to load
    pretty_exceptions_enable=False,  # a bug shows its plain traceback
    no_args_is_help=True,
    help="Federated learning where every client's model may differ.",
    epilog=_EPILOG,
)
app.add_typer(deploy_app, name="deploy")

_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as run.rounds=5. You may repeat this option."),
]
_Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")]


class ListKind(StrEnum):
    """What can be listed."""

    algorithms = "algorithms"
    datasets = "datasets"
    devices = "devices"
    items = "items"
    metrics = "metrics"
    models = "models"
    partitions = "partitions"


@contextmanager
def _reported(go_on: str = "") -> Generator[None]:
    """Print the message of an error that polyfed raises on purpose and exit with its code; a bug keeps its traceback.

    Args:
        go_on: the command that continues after Ctrl-C, if the exception does not know the run directory.
    """
    try:
        yield
    except PolyfedError as error:
        faults = str(error).splitlines() or [type(error).__name__]
        lines = faults if len(faults) == 1 else [f"{len(faults)} faults", *(f"  {fault}" for fault in faults)]
        typer.echo("error: " + "\n".join(lines), err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interrupt:
        run_dir = getattr(interrupt, "run_dir", None)
        command = go_on or (f"polyfed resume {shlex.quote(str(run_dir))}" if run_dir is not None else "")
        typer.echo(f"\ninterrupted{f'; continue with: {command}' if command else ''}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _version(asked: bool) -> None:
    if asked:
        from polyfed import __version__

        typer.echo(f"polyfed {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def run(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A TOML file. Default: FedMRL on handwritten digits."),
    ] = None,
    overrides: _Set = None,
    out: Annotated[Path | None, typer.Option(help="Run directory, new or empty. Default: a new one in runs/.")] = None,
) -> None:
    """Run a configuration, and its controls if run.controls is true."""
    from polyfed.config import Config
    from polyfed.report.consoles import console
    from polyfed.report.progress import callback_for
    from polyfed.report.tables import show

    with _reported():
        settings = Config.load(config, overrides or ())
        from polyfed.comparison import meanings, run_with_controls

        terminal = console()
        show(terminal, run_with_controls(settings, out=out, reporter=callback_for(terminal)), meanings(settings))


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of an interrupted run.")],
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Go on after the end of the run, to this number of rounds.")
    ] = None,
) -> None:
    """Resume an interrupted run, and its controls, or go on after its end."""
    from polyfed.config import Config
    from polyfed.report.consoles import console
    from polyfed.report.progress import callback_for
    from polyfed.report.tables import show

    with _reported():
        from polyfed.comparison import meanings, resume_with_controls

        terminal = console()
        found = resume_with_controls(run_dir, rounds=rounds, reporter=callback_for(terminal))
        show(terminal, found, meanings(Config.load(run_dir / "config.toml")))


_RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")]
_Client = Annotated[
    str | None,
    typer.Option(help="The client whose model it is, by number or name. Default: the server's own model."),
]
_Predictor = Annotated[
    str | None, typer.Option(help="A client's predictor (default: the first), or a model of the server (its largest).")
]
_Capacity = Annotated[
    float | None,
    typer.Option(
        help="The capacity whose submodel it is, in (0, 1], of fiarse, fiarse-neuron, heterofl, fedrolex, fjord, "
        "depthfl and scalefl. Default: the client's own, or the server's largest."
    ),
]


@app.command()
def predict(
    run_dir: _RunDir,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="A table (.csv, .parquet), an array (.npz, .npy), or images and folders."),
    ],
    client: _Client = None,
    predictor: _Predictor = None,
    capacity: _Capacity = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Copy a column of the table, such as an id. You may repeat this option."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The CSV file to write. Default: print it.")] = None,
) -> None:
    """Predict new rows with a trained model: the class and a score for each class, or the number.

    polyfed finds columns by name and reads and scales the rows as those of the training. A label is not needed.
    """
    with _reported():
        from polyfed.base.files import write
        from polyfed.trained.load import trained_model
        from polyfed.trained.predict import predictions_csv, read_rows_to_predict

        model = trained_model(run_dir, client, predictor=predictor, capacity=capacity)
        rows = read_rows_to_predict(run_dir, files, keep or (), reads=model.reads)
        for column, (count, text) in rows.unknown.items():
            typer.echo(
                f"{column}: {count} cell{'s' * (count > 1)} with a category that training did not know, such as "
                f"{text!r}; taken for missing",
                err=True,
            )
        text = predictions_csv(model, rows)
        if out is None:
            typer.echo(text, nl=False)
        else:
            write(out, text.encode())
            typer.echo(f"{len(rows)} predictions of {model.predictor} in {out.absolute()}")


class ExportFormat(StrEnum):
    """What a trained model can be written as."""

    pt2 = "pt2"
    onnx = "onnx"
    safetensors = "safetensors"


@app.command()
def export(
    run_dir: _RunDir,
    out: Annotated[Path, typer.Option(help="The file to write. polyfed does not overwrite an existing file.")],
    form: Annotated[
        ExportFormat | None, typer.Option("--format", help="What the file is to be. Default: as the ending of --out.")
    ] = None,
    client: _Client = None,
    predictor: _Predictor = None,
    capacity: _Capacity = None,
) -> None:
    """Write a trained model with its preprocessing to one file, which needs neither polyfed nor the data.

    pt2 is for torch.export.load, onnx for onnxruntime, safetensors for the weights and their description.
    """
    with _reported():
        from polyfed.trained.export import export as write_file
        from polyfed.trained.load import trained_model

        if out.exists():
            raise StorageError(f"{out} exists already; remove it, or choose another --out")
        ending, known = out.suffix.removeprefix(".").lower(), [each.value for each in ExportFormat]
        if form is None and ending not in known:
            raise ConfigError(f"--out: got {out.name}; expected a file that ends in {', '.join(known)}, or --format")
        model = trained_model(run_dir, client, predictor=predictor, capacity=capacity)
        write_file(model, out, ExportFormat(ending).value if form is None else form.value)
        typer.echo(f"{model.predictor} in {out.absolute()} ({out.stat().st_size:,} bytes)")


@app.command()
def plot(
    run_dir: _RunDir,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The picture to write, such as run.png or run.pdf. polyfed does not overwrite an existing file. "
            "Default: plot.png in the run directory."
        ),
    ] = None,
) -> None:
    """Draw the first metric of a complete run over its rounds and over its bytes."""
    with _reported():
        from io import BytesIO

        from polyfed.base.files import write
        from polyfed.report.results import load_run

        path = (run_dir / "plot.png" if out is None else out).absolute()
        figure = load_run(run_dir).plot()
        form, known = path.suffix.removeprefix(".").lower(), figure.canvas.get_supported_filetypes()
        if form not in known:
            raise ConfigError(f"--out: got {path.name}; expected a file that ends in {', '.join(sorted(known))}")
        if path.exists():
            raise StorageError(f"{path} exists already; remove it, or choose another --out")
        picture = BytesIO()
        figure.savefig(picture, format=form)
        write(path, picture.getvalue())
        typer.echo(f"picture in {path}")


@app.command()
def adapt(
    run_dir: _RunDir,
    data: Annotated[
        Path, typer.Option(help="The new client's rows: a .csv, .parquet or .npz file, or a folder of images by class.")
    ],
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of training. Default: as many as a client of the run took part in."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='Its network, such as "mlp(hidden=(8,))". Default: the first client\'s.')
    ] = None,
    capacity: Annotated[
        float | None, typer.Option(help="The size of its submodel, in (0, 1]. Default: the first client's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for its model, new or empty. Default: runs/RUN-DATA, by both names.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the reader of --data, such as label=diagnosis; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "cpu",
) -> None:
    """Adapt a client that was never trained: train its private part with what the run shares, on its own data.

    polyfed tests the client beside training alone, and keeps its model for predict and export. The run does not change.
    """
    from polyfed.config.toml import apply, parse_override

    with _reported():
        from polyfed.report.consoles import console
        from polyfed.report.tables import adapted_table
        from polyfed.trained.adapt import adapt as adapt_client

        options: dict[str, Any] = {}
        for text in option or ():
            key, value = parse_override(text, "--option")
            if value is None:
                options[".".join(key)] = None  # removes an option of the run
            else:
                apply(options, key, value, "--option")
        folder = out or Path("runs") / f"{run_dir.resolve().name}-{data.stem}"
        found = adapt_client(
            run_dir,
            data,
            rounds=rounds,
            model=model,
            capacity=capacity,
            out=folder,
            options=options,
            device=device,
        )
        typer.echo(
            f"{found.algorithm}, {found.model}: {found.train_rows} training rows, {found.test_rows} test rows, "
            f"{found.rounds} round{'s' * (found.rounds > 1)} after round {found.round} of the run"
        )
        adapted_table(console(), found)
        if found.note:
            typer.echo(f"note: {found.note}")
        typer.echo(f"The model lies in {folder.absolute()}; polyfed predict and export take this folder")


@app.command()
def validate(config: _Config, overrides: _Set = None) -> None:
    """Check a configuration, its algorithm's keys, and whether the algorithm can train the networks together.

    polyfed reads files of your own, deals their rows, and says in a line how it read them. It does not read the public
    data sets, whose shapes are known: only a run checks whether they exist and suffice for the partition.
    """
    from polyfed.config import Config, load_algorithm
    from polyfed.data.catalogue import SHAPES, TEXTS, row_shape

    with _reported():
        settings = Config.load(config, overrides or ())
        import torch

        from polyfed.report.units import flops, size
        from polyfed.rounds.federation import check_networks, configured_task, sizes, unread

        algorithm, task = load_algorithm(settings.algorithm.name, settings.algorithm.keys), None
        unchecked = "the data and whether the networks fit them"
        if settings.data.dataset in SHAPES and not settings.data.options.get("statistics"):
            name = settings.data.dataset
            shape = row_shape(name, settings.data.image_size, settings.data.options)
            dtype = torch.int64 if name in TEXTS else None
            task = configured_task(settings, shape, SHAPES[name][1], dtype)
            check_networks(algorithm, task)
            unchecked = "the data"
        read = [f"note: {note}" for note in unread(settings, algorithm)]
        if settings.data.path is not None and settings.data.dataset not in SHAPES and Path(settings.data.path).exists():
            from polyfed.data.doubts import doubts
            from polyfed.report.columns import summary
            from polyfed.rounds.federation import prepare

            federation = prepare(settings)
            dataset, task = federation.dataset, federation.task
            read += [f"data: {summary(dataset)}", *(f"note: {doubt}" for doubt in doubts(dataset))]
            unchecked = ""
        clients, run = settings.clients, settings.run
        models = ", ".join(map(str, clients.architectures))
        typer.echo(
            f"{config} is valid: {settings.algorithm.name} on {settings.data.dataset}, {clients.count} clients "
            f"({models}), {run.rounds} rounds{unchecked and '; not checked before a run: '}{unchecked}"
        )
        for line in read:
            typer.echo(line)
        for name, capacity, count, macs in [] if task is None else sizes(algorithm, task):
            typer.echo(
                f"{name} at capacity {capacity:g}: {count:,} parameters, {size(4 * count)} in fp32; "
                f"{flops(macs)} multiply-accumulates for an example"
            )


@app.command(name="data")
def data_(
    config: _Config,
    overrides: _Set = None,
    agreed: Annotated[
        bool, typer.Option("--agreed", help="Print section [data.agreed], which sites of a deployment share.")
    ] = False,
) -> None:
    """Show how the data were read: each column of a table, and the rows and classes of each client."""
    from polyfed.config import Config
    from polyfed.config.toml import to_toml

    with _reported():
        settings = Config.load(config, overrides or ())
        from polyfed.data.conform import schema_of
        from polyfed.data.doubts import doubts
        from polyfed.report.columns import HEADINGS, rows, summary
        from polyfed.report.consoles import console
        from polyfed.report.tables import print_table
        from polyfed.rounds.federation import configured_names, deal

        dataset, dealt = deal(settings)
        if agreed:
            parts = schema_of(dataset).model_dump(exclude_defaults=True)
            typer.echo(to_toml({"data": {"agreed": parts}}), nl=False)
            return
        typer.echo(f"{dataset.name}: {summary(dataset)}")
        if dataset.columns:
            print_table(console(), HEADINGS, rows(dataset.columns), left=("taken for", "levels", "range"))
        for doubt in doubts(dataset):
            typer.echo(f"note: {doubt}")
        _show_partition(console(), dataset, dealt, configured_names(settings, dealt))


@app.command(name="list")
def list_(
    kind: Annotated[ListKind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the names that a configuration or `polyfed reproduce` takes."""
    rows = _listed(kind)
    width = max(len(row["name"]) for row in rows)
    lines = (f"{row['name']:<{width}}  {row['summary']}" for row in rows)
    typer.echo(json.dumps(rows, indent=2) if as_json else "\n".join(lines))


def _listed(kind: ListKind) -> list[dict[str, Any]]:
    from polyfed.algorithms.catalogue import ALGORITHMS, ALIASES
    from polyfed.config.profiles import TABLES, load_profiles
    from polyfed.data.catalogue import DATASET_OPTIONS, DATASETS, PARTITION_OPTIONS, PARTITIONS
    from polyfed.metrics.catalogue import METRICS
    from polyfed.models.catalogue import MODELS, OPTIONS

    if kind is ListKind.algorithms:
        return [
            {
                "name": name,
                "summary": summary,
                "class": path,
                "aliases": [alias for alias, meant in ALIASES.items() if meant == name],
            }
            for name, (path, summary) in ALGORITHMS.items()
        ]
    if kind is ListKind.items:
        from polyfed.experiments.catalogue import items

        return [{"name": name, "summary": title} for name, title in items().items()]
    if kind is ListKind.devices:
        return [
            {"name": name, "summary": text, "devices": [profile.device for profile in load_profiles(name)]}
            for name, text in TABLES.items()
        ]
    if kind is ListKind.metrics:
        return [{"name": name, "summary": about.summary, "task": about.task} for name, about in METRICS.items()]
    known: dict[ListKind, tuple[Mapping[str, str], Mapping[str, Any]]] = {
        ListKind.datasets: (DATASETS, DATASET_OPTIONS),
        ListKind.models: (MODELS, OPTIONS),
        ListKind.partitions: (PARTITIONS, PARTITION_OPTIONS),
    }
    summaries, options = known[kind]
    return [{"name": name, "summary": text, "options": options[name]} for name, text in summaries.items()]


@app.command()
def partition(
    config: _Config,
    overrides: _Set = None,
    out: Annotated[
        Path, typer.Option(help="Directory for partition.png. polyfed does not overwrite an existing file.")
    ] = Path(),
) -> None:
    """Show how many examples of each class each client holds: a table, and a picture.

    This command does not build the networks.
    """
    from polyfed.config import Config

    with _reported():
        settings = Config.load(config, overrides or ())
        from polyfed.data.partition.plot import picture
        from polyfed.report.consoles import console
        from polyfed.rounds.federation import configured_names, deal

        path = (out / "partition.png").absolute()
        if path.exists():
            raise StorageError(f"{path} exists already; remove it, or choose another --out")
        dataset, dealt = deal(settings)
        _show_partition(console(), dataset, dealt, configured_names(settings, dealt))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{out} cannot be a directory: {error.strerror or error}") from error
        names = configured_names(settings, dealt)
        picture(dealt, dataset.strata, dataset.num_classes, path, class_names=dataset.classes, client_names=names)
        typer.echo(f"partition {dealt.hash}\npicture in {path}")


_ROWS, _COLUMNS = 50, 20  # clients and classes that a table may show


def _show_partition(console: Console, dataset: Dataset, dealt: Partition, names: Sequence[str]) -> None:
    from polyfed.report.tables import print_table

    y, classes, partial = dataset.strata, dataset.num_classes, dataset.num_unlabelled > 0
    train, test = (dealt.counts(y, classes, which, first=_ROWS) for which in ("train", "test"))
    wide = classes > _COLUMNS
    held = [[str((row > 0).sum())] if wide else [str(n or ".") for n in row] for row in train + test]
    told = [names[client] if names else str(client) for client in range(len(held))]
    trained = train.sum(axis=1)
    headings = ["classes held"] if wide else list(dataset.classes or ["rows"])
    if partial:
        gone = dealt.unlabelled(y, first=_ROWS)
        trained, headings = trained + gone, [*headings, "no label"]
        held = [[*row, str(n or ".")] for row, n in zip(held, gone, strict=True)]
    rows = [(told[client], str(trained[client]), str(test[client].sum()), *row) for client, row in enumerate(held)]
    print_table(console, ("client", "train", "test", *headings), rows)
    if dealt.num_clients > _ROWS:
        typer.echo(f"... and {dealt.num_clients - _ROWS} more clients; the picture shows the first 200")


_Algorithms = Annotated[
    str,
    typer.Option(help="Names separated by commas. fedmrl:share=false changes a key of that algorithm."),
]
_Seeds = Annotated[str, typer.Option(help="Numbers separated by commas.")]
_Out = Annotated[
    Path | None,
    typer.Option(help="Directory for tables and runs. Default: in runs/, where all commands share their runs."),
]


@app.command()
def compare(
    config: _Config, algorithms: _Algorithms, seeds: _Seeds = "0,1,2", overrides: _Set = None, out: _Out = None
) -> None:
    """Run several algorithms on the same splits, and print tables of accuracy, with a paired test, and of costs.

    polyfed does not repeat finished runs. To continue after an interruption, give the same command.
    """
    _compared(["compare", str(config)], config, algorithms, seeds, overrides, out, {})


@app.command()
def sweep(
    config: _Config,
    grid: Annotated[
        list[str],
        typer.Option("--grid", metavar="KEY=VALUE,VALUE", help="Values of a key. Repeat this option for a grid."),
    ],
    algorithms: Annotated[
        str | None, typer.Option(help="As for compare. Default: the configuration's algorithm.")
    ] = None,
    seeds: _Seeds = "0,1,2",
    overrides: _Set = None,
    out: _Out = None,
) -> None:
    """Compare algorithms at every point of a grid, such as --grid train.lr=0.01,0.1 --grid algorithm.rep_dim=100,200.

    A key of [algorithm] applies to the algorithms that have it. polyfed does not repeat finished runs.
    """
    from polyfed.comparison.compare import parse_grid
    from polyfed.config import Config

    with _reported():
        values = parse_grid(grid)
        named = algorithms or Config.load(config, overrides or ()).algorithm.name
    words = ["sweep", str(config), *(word for text in grid for word in ("--grid", text))]
    _compared(words, config, named, seeds, overrides, out, values)


@app.command()
def reproduce(
    item: Annotated[str, typer.Argument(help="A name of `polyfed list items`, or the .toml file of a study.")],
    scale: Annotated[
        str | None, typer.Option(help="smoke (a minute, needs no data), cpu (hours) or paper (needs a GPU).")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help='Run a part: "fedmrl,standalone", "seed 0", "N = 100*". Repeat to narrow it.'
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--list", help="Show the cells and about how long they take, and run none.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Directory for pages and runs. Default: runs.")] = None,
) -> None:
    """Run a table or figure of a paper at a scale, and write its page with tables, pictures and the paper's numbers.

    polyfed does not repeat finished runs. To continue after an interruption, give the same command.
    """
    from polyfed.experiments.catalogue import find
    from polyfed.report.consoles import console
    from polyfed.report.progress import callback_for

    words = [
        *("polyfed", "reproduce", item),
        *(("--scale", scale) if scale else ()),
        *(word for pattern in only or () for word in ("--only", pattern)),
        *(("--out", str(out)) if out is not None else ()),
    ]
    with _reported(shlex.join(words)):
        path = find(item)
        from polyfed.experiments.reproduce import Job
        from polyfed.experiments.reproduce import reproduce as run_all

        terminal = console()
        if plan:
            _show_plan(terminal, Job.load(path, scale, out).plan(only or ()))
            return
        table, page = run_all(path, scale, out, only=only or (), reporter=callback_for(terminal))
        table.show(terminal)
        typer.echo(f"The page is {(page / 'page.md').absolute()}")


def _show_plan(console: Console, rows: Sequence[tuple[Any, str, float | None]]) -> None:
    from polyfed.report.tables import print_table
    from polyfed.report.units import duration

    told = [(cell.title, state, duration(left)) for cell, state, left in rows]
    print_table(console, ("cell", "state", "about"), told, left=("cell", "state"))
    left = [seconds for _, _, seconds in rows if seconds is not None]
    console.print(
        f"\n{len(rows)} cells, about {duration(sum(left))} left. The estimate uses the finished cells of the same "
        "algorithm, or else the speed of FedMRL's CNNs on CIFAR-10 and two cores.",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _compared(
    words: list[str],
    config: Path,
    algorithms: str,
    seeds: str,
    overrides: list[str] | None,
    out: Path | None,
    values: Mapping[str, Sequence[Any]],
) -> None:
    """What compare and sweep have in common."""
    from polyfed.config import Config
    from polyfed.report.consoles import console

    words = [
        *("polyfed", *words, "--algorithms", algorithms, "--seeds", seeds),
        *(word for override in overrides or () for word in ("--set", override)),
        *(("--out", str(out)) if out is not None else ()),
    ]
    with _reported(shlex.join(words)):
        numbers = _numbers(seeds)
        settings = Config.load(config, overrides or ())
        from polyfed.comparison import compare as run_all
        from polyfed.config.toml import items

        run_all(settings, items(algorithms), numbers, out, values=values).show(console())


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seeds: got {text!r}; expected whole numbers separated by commas, such as 0,1,2")
    return [int(word) for word in words]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the command `polyfed`."""
    search_working_directory()  # for your own algorithms and models, as `python -m polyfed` finds them
    atexit.register(gc.freeze)  # at its end Python would look through all of torch for garbage, for half a second
    app(args=None if arguments is None else list(arguments), prog_name="polyfed")
