"""A stack as a run: each member a workdir of its own, equal to its single run, killed or not."""

import dataclasses
import json

import numpy as np
import pytest

import saex
from saex import cli, loop, metrics
from saex.checkpoint import info
from saex.config import expand
from saex.registry import ConfigError
from tests import runs

MEMBERS = ({"seed": 3}, {"optim.lr": 3e-3}, {"sae.k": 2, "sae.aux_coefficient": 0.5}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    runs.write_text(folder / "text")
    runs.write_model(folder / "model.safetensors")
    loop.train(runs.config(folder, members=MEMBERS), folder / "run")
    return folder


def losses(workdir):
    return [m["loss"] for m in metrics.read(workdir) if "loss" in m]


def test_every_member_is_a_workdir_and_equals_its_single_run(folder):
    config = runs.config(folder, members=MEMBERS, store=str(folder / "run/store"))
    result = json.loads((folder / "run/eval.json").read_text())["members"]
    assert list(result) == ["00", "01", "02", "03"]
    for name, alone in zip(result, expand(config)):
        loop.train(alone, folder / "alone" / name)
        member = folder / "run/members" / name
        np.testing.assert_allclose(losses(member), losses(folder / "alone" / name), rtol=1e-5)
        sae, params = saex.load_sae(member)
        assert sae == alone.sae
        expected = saex.load_sae(folder / "alone" / name)[1]
        for key in params:
            np.testing.assert_allclose(params[key], expected[key], atol=1e-5, err_msg=key)
        own = json.loads((folder / "alone" / name / "eval.json").read_text())
        np.testing.assert_allclose(result[name]["fvu"], own["fvu"], rtol=1e-4)
    assert result["02"]["l0"] <= 2 < result["03"]["l0"]


def stop_after(monkeypatch, steps):
    seen = []

    def agreed(self, step):
        seen.append(step)
        return len(seen) == steps

    monkeypatch.setattr(loop._Sigterm, "agreed", agreed)


def test_a_stopped_stack_goes_on_as_the_unbroken_one(folder, monkeypatch):
    config = runs.config(folder, members=MEMBERS, store=str(folder / "run/store"))
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(loop.Preempted):
            loop.train(config, folder / "stopped")
    loop.train(config, folder / "stopped")
    for name in ("00", "01", "02", "03"):
        one, other = (folder / run / "members" / name for run in ("run", "stopped"))
        assert info(one)["state_digest"] == info(other)["state_digest"]
        assert losses(one) == losses(other)


def test_members_killed_at_different_steps_meet_at_the_last_common_one(folder, monkeypatch):
    """A kill between two members' saves leaves one of them a step ahead."""
    config = runs.config(folder, members=MEMBERS, store=str(folder / "run/store"))
    save, saved = loop.Member.save, []

    def killed(self, state, digest):
        saved.append(self.name)
        if len(saved) == 6:  # the second round of saves, after its first member
            raise KeyboardInterrupt
        save(self, state, digest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Member, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, folder / "uneven")
    loop.train(config, folder / "uneven")
    for name in ("00", "03"):
        one, other = (folder / run / "members" / name for run in ("run", "uneven"))
        assert info(one)["state_digest"] == info(other)["state_digest"]


def test_a_member_that_is_not_finite_is_reported_and_the_others_go_on(folder, caplog):
    members = ({}, {"optim.lr": 1e38})
    config = runs.config(folder, members=members, store=str(folder / "run/store"))
    result = loop.train(config, folder / "bad")
    assert list(result["members"]) == ["00"]
    record = json.loads((folder / "bad/members/01/FAILED.json").read_text())
    assert "not finite at step" in record["why"] and "member 01" in caplog.text
    assert json.loads((folder / "bad/DONE.json").read_text())["steps"] == 12


def test_a_stack_whose_member_has_failed_goes_on_where_it_was_stopped(folder, monkeypatch, caplog):
    """As unbroken for the living one; the other stays failed, and nothing of it is saved."""
    members = ({}, {"optim.lr": 1e38})
    config = runs.config(folder, members=members, store=str(folder / "run/store"))
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(loop.Preempted):
            loop.train(config, folder / "halted")
    living, failed = (folder / "halted/members" / name for name in ("00", "01"))
    record, saved = (failed / "FAILED.json").read_text(), info(living)["step"]
    assert saved == 7
    caplog.clear()
    with caplog.at_level("INFO", logger="saex"):
        result = loop.train(config, folder / "halted")
    assert "resumed at step 7" in caplog.text and list(result["members"]) == ["00"]
    assert (failed / "FAILED.json").read_text() == record
    assert not list(failed.glob("checkpoints/*")) and "member 01" not in caplog.text
    alone = folder / "run/members/03"  # the same configuration, among others and never stopped
    assert info(living)["state_digest"] == info(alone)["state_digest"]
    assert losses(living) == losses(alone)


@pytest.mark.slow  # tests/train/test_stack.py has it for the step alone
def test_places_of_a_mesh_give_the_same(folder):
    config = runs.config(
        folder, members=MEMBERS, store=str(folder / "run/store"), mesh__sweep=2, mesh__data=2
    )
    loop.train(config, folder / "mesh")
    for name in ("00", "01", "02", "03"):
        one, other = (folder / run / "members" / name for run in ("run", "mesh"))
        np.testing.assert_allclose(losses(one), losses(other), rtol=1e-5)
        assert saex.load_sae(other)[1]["W_enc"].shape == (64, 16)


def test_a_stack_of_one_is_a_stack(folder, capsys):
    config = runs.config(folder, members=({"seed": 1},), store=str(folder / "run/store"))
    first = loop.train(config, folder / "one")
    assert cli.main(["info", str(folder / "one"), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out).values()
    assert facts["step"] == 12
    assert list(first["members"]) == ["00"] and (folder / "one/config.json").exists()
    again, strict = loop.train(config, folder / "one"), {"parse_constant": pytest.fail}
    assert again == json.loads((folder / "one/eval.json").read_text(), **strict)
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        loop.train(runs.config(folder, store=str(folder / "run/store")), folder / "one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ({"sae.n": 8},)}, "members may differ|may differ in seed"),
        ({"members": ({"sae.k": 5},)}, "above the stack's sae.k=4"),
        ({"members": ({}, {}, {}), "mesh__sweep": 2}, "mesh.sweep=2 places for 3 members"),
        ({"mesh__sweep": 2}, "mesh.sweep=2 places for 0 members"),
    ],
)
def test_what_members_cannot_differ_in_is_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        runs.config(folder, **changes)


def test_a_member_is_resolved_like_any_configuration(folder):
    for wrong in ({"seed": "one"}, {"sae.k": "few"}):
        (key,) = wrong
        with pytest.raises(ConfigError, match=rf"config.members\[0\].{key}"):
            runs.config(folder, members=(wrong,))
    alone = expand(runs.config(folder, seed=5, members=MEMBERS))
    assert [c.seed for c in alone] == [3, 5, 5, 5] and {c.data_seed for c in alone} == {5}
    assert dataclasses.replace(alone[3], data_seed=None) == runs.config(folder, seed=5)
