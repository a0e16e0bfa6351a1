"""Tables of devices: what is counted and what is refused."""

import tomllib
from pathlib import Path

from faults import only, refused

from polyfed.config import Config
from polyfed.config.profiles import load_profiles, to_csv


def test_faults_of_a_table_of_devices_are_told_with_their_lines(tmp_path):
    path = tmp_path / "own.csv"
    text = '[devices]\nprofiles = "own.csv"'
    only(refused(text, tmp_path), f"devices.profiles: {path}", "no such file", "cross-silo")
    path.write_text("device,compute_gflop,memory_mb,down_mbps,up_mbps,h00\n")
    told = "\n".join(refused(text, tmp_path))
    for part in ("line 1", "did you mean 'compute_gflops'?", "missing column compute_gflops", "all of h00 to h23"):
        assert part in told
    path.write_text(
        "# two good ones\n\ndevice,compute_gflops,memory_mb,down_mbps,up_mbps,share\n"
        "a,1,1,1,1,1\nb,0,x,1,inf,1\na,1,1,1,1,0\nc,1,1\n,1,1,1,1,-1\n"
    )
    told = "\n".join(refused(text, tmp_path))
    for part in (
        "line 5: compute_gflops: got '0'; expected a number above 0",
        "line 5: memory_mb: got 'x'",
        "line 5: up_mbps: got 'inf'",
        "line 6: device 'a' is named twice",
        "line 7: got 3 cells; expected 6",
        "line 8: device: got ''",
        "line 8: share: got '-1'",
    ):
        assert part in told, part
    path.write_text("device,compute_gflops,memory_mb,down_mbps,up_mbps,share\na,1,1,1,1,0\n")
    only(refused(text, tmp_path), "every share is 0")


def test_a_table_of_devices_counts_by_what_it_says(tmp_path, monkeypatch):
    """Catches a hash that knows the path of a table and not its content."""
    (tmp_path / "sub").mkdir()
    rows = ["device,compute_gflops,memory_mb,down_mbps,up_mbps", "a,1,2,3,4"]
    for path in (tmp_path / "sub/own.csv", tmp_path / "same.csv"):
        path.write_text("\n".join(rows))
    (tmp_path / "sub/a.toml").write_text('[devices]\nprofiles = "own.csv"\n')
    monkeypatch.chdir(tmp_path)
    first = Config.load("sub/a.toml", [])
    assert Path(first.devices.profiles) == tmp_path / "sub/own.csv"
    assert Config.load("sub/a.toml", ["devices.profiles=same.csv"]).hash() == first.hash()
    assert Config.parse(tomllib.loads(first.to_toml())) == first
    read = load_profiles("same.csv")
    (tmp_path / "copy.csv").write_text(to_csv(read))
    assert load_profiles("copy.csv") == read
    before = first.hash()
    (tmp_path / "sub/own.csv").write_text("\n".join([rows[0], "a,1,2,3,5"]))
    assert first.hash() != before
    assert len({Config().hash(), Config.parse({"devices": {}}).hash(), before}) == 3
