"""Studies: the format, what is refused, and the cells that they expand to."""

from pathlib import Path

import pytest
import torch
from studies import TUNE, study
from torch.utils.flop_counter import FlopCounterMode

from polyfed.base.errors import ConfigError
from polyfed.base.rng import Rng
from polyfed.comparison.specs import chosen
from polyfed.config.toml import to_toml
from polyfed.core.algorithm import Task
from polyfed.core.net import Net
from polyfed.data.catalogue import INSIDE, SHAPES
from polyfed.experiments.catalogue import SCALES, find, items
from polyfed.experiments.reproduce import Job
from polyfed.experiments.study import Study
from polyfed.models.catalogue import ModelSpec


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("item", items())
def test_every_committed_study_is_valid_at_every_scale(item: str, scale: str) -> None:
    """Catches a key or an algorithm that is no longer there, and an item without the controls or the paper's words."""
    job = Job.load(find(item), scale)
    cells = job.study.cells()
    for setting in {cell.setting.title for cell in cells}:
        here = {cell.label for cell in cells if cell.setting.title == setting}
        controls = {"local-only", "standalone", "standalone, equal FLOPs"} if item.startswith("fedmrl/") else set[str]()
        family = item.partition("/")[0]
        names = {cell.config.algorithm.name for cell in cells if cell.setting.title == setting}
        assert job.study.algorithms[0] in here if family == "beyond" else family in names
        assert controls <= here
    asked = ("fiarse/steps", "fiarse/sampling", *(f"beyond/{name}" for name in ("har", "tabular", "ssl", "scale")))
    assert bool(job.study.source) == (item not in asked)  # questions that the papers leave open
    assert bool(job.known.claims or job.known.values) == bool(job.study.source)
    if scale == "paper":  # a value of a row that is not there would not be shown
        rows = {(cell.setting.title, cell.label) for cell in cells}
        assert {(value.setting, value.algorithm) for value in job.known.values} <= rows
    if scale == "smoke":
        assert {cell.config.data.dataset for cell in cells} <= {*INSIDE}


@pytest.mark.parametrize("item", ["fedmrl/table1", "fedmrl/table3", "fedmrl/fig6"])
def test_equal_flops_are_equal(item: str) -> None:
    """Catches epochs of the control that do not fit the networks any more."""

    known: dict[object, int] = {}

    def forward(task: Task, spec: ModelSpec) -> int:
        if (task, spec) not in known:
            model = task.build(spec)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                Net(model, model.init(Rng((0,))))(torch.zeros((2, *task.input_shape)))
            known[task, spec] = counter.get_total_flops() // 2
        return known[task, spec]

    for scale, least, most in (("smoke", 0.7, 1.35), ("cpu", 0.92, 1.1), ("paper", 0.92, 1.1)):
        cells = [cell for cell in Job.load(find(item), scale).study.cells() if cell.seed == 0]
        equal = {cell.setting.title: cell.config for cell in cells if cell.label == "standalone, equal FLOPs"}
        for cell in (cell for cell in cells if cell.label == "fedmrl"):
            config = cell.config
            channels, classes = SHAPES[config.data.dataset]
            side = config.data.image_size or 32
            task = Task(input_shape=(channels, side, side), num_classes=classes)
            d1, auxiliary = config.algorithm.keys["rep_dim"], config.algorithm.keys.get("auxiliary", "cnn5")
            more = forward(task, ModelSpec.parse(auxiliary).having(rep_dim=d1)) + 2 * (d1 + 500) * 500  # G and P
            large = [forward(task, spec) for spec in config.clients.models]
            spent = sum(large) * equal[cell.setting.title].train.epochs
            ratio = spent / (sum(large) + more * len(large)) / config.train.epochs
            assert least <= ratio <= most, (scale, cell.setting.title, ratio)


def test_settings_grids_and_seeds_expand_to_cells(tmp_path: Path) -> None:
    path = study(
        tmp_path / "s.toml",
        settings={
            "few": {"partition": {"classes_per_client": 2}, "seeds": [3], "algorithms": ["standalone", "longer"]},
            "even": {"partition": {"kind": "iid"}},
        },
        entries={"longer": {"name": "standalone", "train": {"epochs": 4}}},
        grid={"train.lr": [0.1, 0.2]},
    )
    found = Study.load(path).cells()
    assert [(c.setting.title, c.label, c.seed) for c in found[:4]] == [
        ("few, lr = 0.1", "standalone", 3),
        ("few, lr = 0.1", "longer", 3),
        ("few, lr = 0.2", "standalone", 3),
        ("few, lr = 0.2", "longer", 3),
    ]
    assert len(found) == 4 + 2 * 2 * 2
    longer = found[3].config
    assert (longer.train.epochs, longer.train.lr, longer.partition.classes_per_client) == (4, 0.2, 2)
    assert found[-1].config.partition.kind == "iid"
    assert len({cell.folder for cell in found}) == len(found)


def test_scales_and_bases_are_laid_over_each_other(tmp_path: Path) -> None:
    study(tmp_path / "base.toml", scales={"big": {"config": {"run": {"rounds": 9}}, "seeds": [5]}, "small": {}})
    (tmp_path / "s.toml").write_text('base = "base.toml"\ntitle = "Mine"\n[scales.small]\nseeds = [7]\n')
    big, small = (Study.load(tmp_path / "s.toml", scale) for scale in ("big", "small"))
    assert (big.title, big.configuration.run.rounds, big.seeds) == ("Mine", 9, (5,))
    assert (small.configuration.run.rounds, small.seeds) == (2, (7,))
    with pytest.raises(ConfigError, match="--scale: got None; expected one of big, small"):
        Study.load(tmp_path / "s.toml")


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"algorithms": ["fedavgg"]}, "did you mean 'fedavg'?"),
        ({"algorithms": []}, "algorithms: got none"),
        ({"settings": {"a": {"trian": {"lr": 1.0}}}}, "settings.a.trian: unknown; did you mean 'train'?"),
        ({"grid": {"train.lr": [0.0]}}, "train.lr: got 0.0"),
        ({"grid": {"algorithm.rep_dim": [3]}}, "algorithm.rep_dim: none of fedavg, standalone has this key"),
        ({"show": ["clients"]}, "pair: expected two algorithms"),
        ({"show": ["clients"], "pair": ["fedavg", "x"]}, "pair: 'x' is not among the algorithms"),
        ({"show": ["curve"]}, "show"),
        ({"tune": {"grid": {"train.lr": [0.1]}}}, "without it, test data would choose"),
        ({"entries": {"fedavg": {"nme": {"a": 1}}}}, "got nme.*; expected keys of the algorithm"),
        (
            {"entries": {"fedavg": {"partition": {"seed": 1}}}},
            "got partition.seed, which changes the splits; algorithms are compared on the same",
        ),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is named twice"),
        ({"algorithms": ["fedavg", "fedavg"]}, "algorithms: 'fedavg' is named twice"),
        ({"grid": {"train.lr": [0.1, 0.10]}}, "grid.train.lr: 0.1 is named twice"),
        ({"settings": {"a": {"seeds": [1, 1]}}}, "settings.a.seeds: 1 is named twice"),
        ({"settings": {"a": {"seeds": ["x"]}}}, "settings.a.seeds[0]: got 'x'"),
        ({"settings": {"a": {"seeds": [-1]}}}, "settings.a.seeds[0]: got -1"),
        ({"settings": {"a": {"algorithms": "fd"}}}, "settings.a.algorithms: got 'fd'"),
        ({"settings": {"a": {"grid": {"train.lr": 0.1}}}}, "settings.a.grid"),
        ({"settings": {"a": {"grid": {"train.lr": []}}}}, "settings.a.grid"),
        (
            {"tune": {**TUNE, "grid": {"train.lr": [0.1]}}, "entries": {"fedavg": {"train": {"lr": 0.5}}}},
            "tune.grid.train.lr: fedavg sets lr itself",
        ),
        (
            {"tune": TUNE, "entries": {"fedavg": {"run": {"eval_every": 1}, "train": {"epochs": 2}}}},
            "tune.grid.train.epochs: fedavg sets epochs itself",
        ),
    ],
)
def test_faults_of_a_study_are_told_before_anything_runs(tables: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Study.load(study(tmp_path / "s.toml", **tables))
    assert told in str(caught.value)


def test_a_scale_is_for_files_that_have_scales(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scale: got 'paper'; the file has no scales"):
        Study.load(study(tmp_path / "s.toml"), "paper")


def test_paths_are_relative_to_the_file_that_has_them(tmp_path: Path) -> None:
    """Catches a base in another folder, or a setting, whose data are looked for elsewhere."""
    (tmp_path / "sub").mkdir()
    base = {"config": {"data": {"dataset": "npz", "path": "one.npz"}}}
    (tmp_path / "sub" / "base.toml").write_text('title = "t"\nalgorithms = ["fedavg"]\n' + to_toml(base))
    own = {"settings": {"a": {}, "b": {"data": {"path": "two.npz"}}}, "entries": {"data": {"name": "fedavg"}}}
    (tmp_path / "s.toml").write_text('base = "sub/base.toml"\n[settings.a]\n' + to_toml(own))
    found = [cell.config.data.path for cell in Study.load(tmp_path / "s.toml").cells()]
    assert found == [str(tmp_path / "sub" / "one.npz"), str(tmp_path / "two.npz")]


def test_tuning_looks_at_no_test_rows_whatever_a_setting_says(tmp_path: Path) -> None:
    """Catches a setting or an algorithm that lays a validation part of 0 over the tuning's."""
    setting = {"a": {"data": {"validation_fraction": 0.0}, "run": {"rounds": 7}}}
    tune = {**TUNE, "config": {"data": {"validation_fraction": 0.5}, "run": {"rounds": 1}}}
    found = Study.load(study(tmp_path / "s.toml", settings=setting, tune=tune)).tuning()
    assert {(cell.config.data.validation_fraction, cell.config.run.rounds) for cell in found} == {(0.5, 1)}


def test_only_takes_names_with_commas_whole() -> None:
    cells = Job.load(find("fedmrl/table1"), "cpu").study.cells()
    assert {cell.label for cell in chosen(cells, ["standalone, equal FLOPs"])} == {"standalone, equal FLOPs"}
    assert {cell.label for cell in chosen(cells, ["fedmrl, fd"])} == {"fedmrl", "fd"}
    assert {cell.setting.title for cell in chosen(cells, ["N = 10, *", "fedmrl"])} == {"N = 10, C = 100 %"}
