"""FedKD: who receives an update and who the student, and what it weighs."""

from dataclasses import replace

import pytest
import torch
import toy
from auxiliary import BODY, MLP, federation

from polyfed.algorithms.fedkd import FedKD
from polyfed.base import tree
from polyfed.base.errors import MessageError
from polyfed.core.requests import drive
from polyfed.execute.local_training import bind


def test_who_took_part_in_the_last_round_receives_an_update_all_others_the_student() -> None:
    """Catches students that drift apart, updates for clients that cannot use them, downloads that never shrink."""
    fed = federation(FedKD(auxiliary=MLP, energy=(0.6, 0.7)), sizes=(9, 8, 7, 6), clients={"participation": 0.5})
    game = toy.play(fed)
    last: set[int] = set()
    dense = 4 * (BODY + 12 * 7 + 7 + 7 * 4 + 4)
    seen = set()
    for _ in range(8):
        before = game.server.G
        game.round()
        for k, report in game.played[-1].reports.items():
            assert tree.same(game.private(k).G, before), "a client trained another student than the server's"
            current = k in last
            assert (report.down.values < dense / 2) if current else (report.down.values == dense)
            assert report.up.values < dense
            seen.add(current)
        last = {client.id for client in game.played[-1].cohort}
    assert seen == {False, True}


def test_a_client_that_lost_its_state_says_so() -> None:
    """Catches an update added to a student of another round."""
    game = toy.play(federation(FedKD(auxiliary=MLP)), 1)
    local = game.local(0, 2)
    message = FedKD.Broadcast(game.server.update, {}, 1, 0.95)
    fresh = game.federation.algorithm.init_client(game.local(0, 0))
    with pytest.raises(MessageError, match=r"round 1; this client did in 0"):
        drive(game.federation.algorithm.client_round(fresh, message, local), game.driver.perform)


def test_an_update_of_another_student_is_refused() -> None:
    game = toy.play(federation(FedKD(auxiliary=MLP)), 1)
    task, upload = game.federation.task, game.got[0][0]
    game.federation.algorithm.check_upload(task, game.federation.info(0), None, upload)
    wrong = replace(upload, update=replace(upload.update, whole=tree.drop(upload.update.whole, ["fc1.bias"])))
    with pytest.raises(MessageError, match="expected"):
        game.federation.algorithm.check_upload(task, game.federation.info(0), None, wrong)


def test_only_the_teacher_predicts_at_a_client_and_nothing_is_sent_for_it() -> None:
    game = toy.play(federation(FedKD(auxiliary=MLP)), 1)
    algorithm, local = game.federation.algorithm, game.local(1)
    assert algorithm.message_for(game.server, local.info) is None
    nets = bind(local.models, algorithm.predictor_parts(game.private(1), None, local))
    x, _ = local.train.batch(torch.arange(3))
    assert list(algorithm.predict(nets, x)) == ["teacher"]
    ((name, student),) = algorithm.global_nets(game.server, game.federation.task).items()
    assert name == "student"
    assert torch.equal(algorithm.predict(student, x)["student"], student["G"](x))
