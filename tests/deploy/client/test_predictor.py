"""When the run is over, a client has all that it predicts from, and a record of what it worked for."""

from __future__ import annotations

import json
import stat
import tomllib
from pathlib import Path

import pytest
import torch
from deploy_toy import Run, config, same, with_tables
from safetensors.torch import load

from polyfed.base.errors import CheckpointError, RunDirError
from polyfed.core.message import encode
from polyfed.core.requests import drive
from polyfed.deploy.client.local_setup import LocalSetup
from polyfed.deploy.client.predictor import load_predictor
from polyfed.execute.drivers import Sequential, Work
from polyfed.execute.local_training import bind
from polyfed.execute.placement import Placement
from polyfed.models.catalogue import ModelSpec
from polyfed.rounds.scoring import Scorer
from polyfed.storage import state_files


@pytest.mark.parametrize("algorithm", ["fedavg", "fedmrl", "fedproto", "fiarse", "standalone", "fedapen"])
@pytest.mark.parametrize("tell", [None, ()])
def test_what_is_kept_gives_the_scores_of_the_last_evaluation(
    algorithm: str, tell: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """Catches a state or a message of another round, and a client that keeps nothing as it reports no scores."""
    run = Run(tmp_path, config(algorithm, "run.eval_clients=1"), ["rounds.start_timeout=60"], tell=tell)
    summary = run.serve()
    assert summary["deployed"]["kept"] == [0, 1, 2]
    rows = [json.loads(line) for line in (run.folder / "clients.jsonl").read_text().splitlines()]
    driver, work = Sequential(Placement.of("cpu", "fp32")), Work()
    tested = {row["client"]: row["accuracy"] for row in rows if row["round"] == 2 and "accuracy" in row}
    assert bool(tested) is (tell is None)
    private = run.private()
    for settings in run.memory.settings.values():
        found = load_predictor(Path(settings.state_dir))
        assert (found.info.id, found.round, found.algorithm.name) == (settings.client, 2, algorithm)
        assert found.config == run.config.resolved()
        kept = load(state_files.dump(found.state))
        assert same(kept, private[settings.client]) or not kept
        setup = LocalSetup.fitting(settings, found.config, _facts(settings), run.experiment)
        assert found.task.input_shape == setup.dataset.input_shape
        local = setup.local(found.task, 2)
        asked = found.algorithm.predictor_parts(found.state, found.message, local)
        parts = drive(asked, lambda request: driver.perform(request, work))
        scorer = Scorer(found.algorithm, Placement.of("cpu", "fp32"), driver.costs, found.config)
        score = scorer.score(bind(local.models, parts), setup.data.test(0 if settings.data else settings.client))
        if settings.client in tested:
            assert score.value("accuracy") == tested[settings.client]


def _facts(settings):
    from polyfed.deploy.wire.headers import TaskFacts

    (place,) = Path(settings.state_dir).glob("*/*/predictor.json")
    return TaskFacts.model_validate(json.loads(place.read_text())["task"])


def test_the_last_message_is_that_of_the_last_state_of_the_server(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl"), ["rounds.start_timeout=60"])
    run.serve()
    (place,) = Path(run.memory.settings[100].state_dir).glob("*/*")
    message = next(place.glob("predictor-message-2-*.bin")).read_bytes()
    found = load_predictor(Path(run.memory.settings[100].state_dir))
    assert found.message is not None
    assert encode(found.message) == message
    held = list(run.server().values())
    sent = list(found.message.G.values())  # type: ignore[attr-defined]
    assert sent
    assert all(any(torch.equal(value, other) for other in held) for value in sent)


def test_what_was_fitted_to_a_table_is_kept(tmp_path: Path) -> None:
    text = "age,sex,dx\n" + "".join(f"{30 + k % 17},{'fm'[k % 2]},{'ill' if k % 3 else 'well'}\n" for k in range(40))
    _, run = with_tables(tmp_path, [text] * 3)
    run.serve()
    settings = run.memory.settings[101]
    found = load_predictor(Path(settings.state_dir))
    setup = LocalSetup.fitting(settings, found.config, _facts(settings), run.experiment)
    stats = setup.data.train(0).stats
    assert stats is not None
    assert found.stats is not None
    assert torch.equal(found.stats.mean, stats.mean)
    assert torch.equal(found.stats.inverse, stats.inverse)
    assert found.schema.classes == ("ill", "well")
    assert [(column.name, column.categories) for column in found.schema.columns] == [("age", ()), ("sex", ("f", "m"))]
    assert found.kind == "features"


def test_people_can_read_what_a_client_worked_for_from_its_first_round_on(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl"), ["rounds.start_timeout=60"])
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": "mlp(hidden=(9,))"})
    run.memory.instead = lambda message, go: "gone" if message.kind in ("evaluate", "keep") else go()
    run.serve()
    (place,) = Path(run.memory.settings[101].state_dir).glob("*/*")
    told = json.loads((place / "client.json").read_text())
    assert (told["client"], told["algorithm"], told["experiment"]) == (1, "fedmrl", run.experiment)
    assert (told["model"], told["model_is_private"]) == ("mlp(hidden=(9,))", True)
    assert tomllib.loads((place / "config.toml").read_text())["algorithm"]["rep_dim"] == 8
    assert stat.S_IMODE((place / "client.json").stat().st_mode) == 0o600
    with pytest.raises(RunDirError, match="holds no predictor"):
        load_predictor(Path(run.memory.settings[101].state_dir))
    assert json.loads((run.folder / "summary.json").read_text())["deployed"]["kept"] == []
    run.memory.instead = lambda message, go: go()
    run.serve()  # a resume of a run that is over hands out what is missing
    assert load_predictor(Path(run.memory.settings[101].state_dir)).model == ModelSpec.parse("mlp(hidden=(9,))")


def test_damage_and_two_runs_are_errors_that_say_what_to_do(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl"), ["rounds.start_timeout=60"])
    run.serve()
    root = Path(run.memory.settings[100].state_dir)
    (place,) = root.glob("*/*")
    message = next(place.glob("predictor-message-*"))
    message.write_bytes(message.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_predictor(root)
    message.unlink()
    with pytest.raises(CheckpointError, match="polyfed deploy resume"):
        load_predictor(root)
    (root / "other" / "client-0").mkdir(parents=True)
    (root / "other" / "client-0" / "predictor.json").write_text("{}")
    with pytest.raises(RunDirError, match="predictors of 2 runs"):
        load_predictor(root)
