"""What is to be compared: entries, grids, and the cells that they expand to."""

import pytest
from summaries import CONFIG

from polyfed.base.errors import ConfigError
from polyfed.comparison import AlgorithmEntry
from polyfed.comparison.compare import parse_grid, planned


@pytest.mark.parametrize(
    ("text", "name", "keys", "sections"),
    [
        ("fedmrl", "fedmrl", {}, {}),
        ("fedmrl:share=false:rep_dim=50", "fedmrl", {"share": False, "rep_dim": 50}, {}),
        ("standalone:train.epochs=2", "standalone", {}, {"train": {"epochs": 2}}),
        ("my.file:Mine", "my.file:Mine", {}, {}),
        ("my.file:Mine:a=x", "my.file:Mine", {"a": "x"}, {}),
    ],
)
def test_entries(text, name, keys, sections):
    entry = AlgorithmEntry.parse(text)
    assert (entry.name, dict(entry.keys), dict(entry.sections), entry.label) == (name, keys, sections, text)


def test_an_entry_of_a_section_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"got trian\.\*; expected keys of the algorithm, or of the sections run"):
        AlgorithmEntry.parse("standalone:trian.epochs=2")


def test_a_grid_is_run_at_every_point_and_its_keys_go_to_the_algorithms_that_have_them():
    values = parse_grid(["algorithm.rep_dim=10,20", "train.lr=0.1,0.2"])
    cells = planned(CONFIG, ["fedmrl", "fedmrl:rep_dim=7", "standalone"], [0], values)
    assert len(cells) == 12
    assert [cell.setting.title for cell in cells[::3]] == [
        f"rep_dim = {d}, lr = {lr}" for d in (10, 20) for lr in (0.1, 0.2)
    ]
    dims = {(c.setting.title, c.label): c.config.algorithm.keys.get("rep_dim") for c in cells}
    assert dims["rep_dim = 20, lr = 0.1", "fedmrl"] == 20
    assert {dims[c.setting.title, "fedmrl:rep_dim=7"] for c in cells} == {7}
    alone = {cell.folder for cell in cells if cell.label == "standalone"}
    assert len(alone) == 2  # one for each lr: of d1 it knows nothing, and is not run again
    with pytest.raises(ConfigError, match=r"algorithm\.rep_dim: none of standalone has this key"):
        planned(CONFIG, ["standalone"], [0], {"algorithm.rep_dim": [1]})
    with pytest.raises(ConfigError) as caught:
        planned(CONFIG, ["fedmrl"], [0], {"algorithm.rep_dim": [-1], "algorithm.width": [2]})
    assert [fault for fault in caught.value.faults if "none of" in fault] == [
        "algorithm.width: none of fedmrl has this key"
    ], "a bad value is no missing key"
    for bad in (["train.lr"], ["train.lr="], ["lr=1"], ["train.lr=1", "train.lr=2"]):
        with pytest.raises(ConfigError, match="--grid"):
            parse_grid(bad)


def test_another_kind_of_partition_takes_its_own_keys(tmp_path):
    config = CONFIG.replace("partition", kind="classes", classes_per_client=3)
    (cell,) = planned(config, ["standalone"], [0], {"partition.kind": ["dirichlet"]})
    assert (cell.config.partition.alpha, cell.config.partition.classes_per_client) == (0.5, None)
