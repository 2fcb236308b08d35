"""A killed run goes on where it stopped; a damaged or foreign checkpoint is named."""

import pytest
import torch

from piebridge import checkpoints
from piebridge.checkpoints import Checkpoint


def state(value):
    return {"weight": torch.full((2, 3), float(value)), "steps": torch.tensor(value)}


def saved(path, value=4):
    checkpoint = Checkpoint(path)
    generator = torch.Generator().manual_seed(9)
    checkpoint.save(state(value), generator, [(0, 0.5, 8.0, 1, 0.25)], 7, 1.5)
    checkpoint.close()
    return generator


def test_state_comes_back(tmp_path):
    path = tmp_path / "sub" / "run.safetensors"
    generator, tensors, fresh = saved(path), state(0), torch.Generator()
    assert Checkpoint(path).load(tensors, fresh) == ([(0, 0.5, 8.0, 1, 0.25)], 7, 1.5)
    assert all(torch.equal(tensors[name], value) for name, value in state(4).items())
    assert torch.equal(torch.rand(3, generator=fresh), torch.rand(3, generator=generator))
    assert [entry.name for entry in path.parent.iterdir()] == ["run.safetensors"]


def test_nothing_to_go_on_from(tmp_path):
    assert Checkpoint(tmp_path / "run.safetensors").load(state(0), torch.Generator()) is None
    assert Checkpoint(None).load(state(0), torch.Generator()) is None


@pytest.mark.parametrize("damage", ["cut", "foreign", "shape"])
def test_unusable_checkpoint_is_named(tmp_path, damage):
    path, tensors = tmp_path / "run.safetensors", state(0)
    saved(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif damage == "foreign":
        tensors["other"] = torch.zeros(1)
    else:
        tensors["weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"run\.safetensors: cannot go on .* remove it"):
        Checkpoint(path).load(tensors, torch.Generator())


def test_due_half_a_minute_after_the_last_writing(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "run.safetensors")
    assert not checkpoint.due()
    now[0] += checkpoints.SECONDS_BETWEEN
    assert checkpoint.due()
    assert not Checkpoint(None).due()
    assert not Checkpoint(tmp_path / "other.safetensors", enabled=False).due()


def test_failed_writing_stops_the_run_and_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    saved(path)
    before = path.read_bytes()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    checkpoint = Checkpoint(path)
    checkpoint.save(state(5), torch.Generator(), [], 8, 2.0)
    checkpoint.close()
    with pytest.raises(OSError, match=r"run\.safetensors: .*No space left"):
        checkpoint.due()
    assert path.read_bytes() == before


STATE = {
    "weight": torch.arange(6.0).view(2, 3).T, "nothing": torch.empty(0), "there": torch.tensor([True, False]),
    "seconds": {"train": 0.1 + 0.2}, "loss": float("nan"), "rebuilds": [{"stem": [1, 2]}], "weighed": None,
}


def test_kept_state_comes_back_for_the_same_run(tmp_path):
    path = tmp_path / "sub" / "run.safetensors"
    Checkpoint(path, run={"rate": 0.1}).keep(STATE)
    recalled = Checkpoint(path, run={"rate": 0.1}).recall()
    assert recalled.keys() == STATE.keys()
    for name, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(recalled[name], value)
        elif name != "loss":
            assert recalled[name] == value
    assert recalled["loss"] != recalled["loss"]
    assert [entry.name for entry in path.parent.iterdir()] == ["run.safetensors"]
    assert Checkpoint(path, run={"rate": 0.2}).recall() is None
    assert Checkpoint(tmp_path / "absent.safetensors").recall() is None
    assert Checkpoint(None).recall() is None


def test_damaged_state_is_named(tmp_path):
    path = tmp_path / "run.safetensors"
    Checkpoint(path).keep(STATE)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"run\.safetensors: cannot go on .* remove it"):
        Checkpoint(path).recall()


def test_state_that_cannot_be_written_stops_the_run_and_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    Checkpoint(path).keep(STATE)
    before = path.read_bytes()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"run\.safetensors: .*No space left"):
        Checkpoint(path).keep(STATE)
    assert path.read_bytes() == before


def test_removed_when_the_result_is_safe(tmp_path):
    path = tmp_path / "run.safetensors"
    saved(path)
    Checkpoint(path).remove()
    assert not path.exists()
