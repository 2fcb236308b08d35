"""Alignment brings a subnet nearer to the original and leaves the original alone."""

import copy
import os
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ROOT, SIDE, copied_state, random_backbone, random_images, same_tensors, tiny_study

from piebridge import alignment, checkpoints
from piebridge.alignment import align, taking_part
from piebridge.config import SubnetSpec
from piebridge.crops import random_crops
from piebridge.cutting import cut_set, cut_subnet, shared_tensors
from piebridge.data import load_cloud
from piebridge.folding import fold_stem
from piebridge.subnets import fidelity, latents_of


@pytest.mark.parametrize(("kl", "optimizer"), [(0.0, "adamw"), (1.0, "adamw"), (0.0, "muon")])
def test_alignment_lowers_the_loss_and_raises_fidelity(tiny, kl, optimizer):
    study = tiny_study(f"cloud.steps=40 cloud.batch_size=32 cloud.loss.kl={kl} cloud.optimizer={optimizer}")
    images = load_cloud(study)
    prefix, tail = tiny.backbone.cut("head")
    frozen = copied_state(prefix) | copied_state(tail)
    specs = (SubnetSpec(width=0.5), SubnetSpec(resolution=16))
    members = [cut_subnet(prefix, spec, images.held_out[:4])[0] for spec in specs]
    original = latents_of(prefix, images.held_out)
    before = [fidelity(latents_of(member, images.held_out), original)[0].mean() for member in members]
    history = align(members, prefix, tail, images.train, 32, study.cloud, seed=0)
    for index, member in enumerate(members, start=1):
        losses = history[history["member"] == index]["loss"].to_numpy()
        assert losses[-8:].mean() < losses[:8].mean()
        assert fidelity(latents_of(member, images.held_out), original)[0].mean() > before[index - 1] + 0.02
        assert not any(parameter.requires_grad for parameter in member.parameters())
        assert not any(module.training for module in member.modules())
    assert same_tensors(copied_state(prefix) | copied_state(tail), frozen)
    assert list(history.columns) == ["step", "seconds", "images_per_second", "member", "loss"]
    assert history["step"].max() == 39


def test_alignment_follows_its_seed(tiny):
    study = tiny_study("cloud.steps=3 cloud.batch_size=8")
    images, (prefix, tail) = random_images(20), tiny.backbone.cut("head")

    def aligned(seed):
        member, _ = cut_subnet(prefix, SubnetSpec(width=0.5), images[:2])
        align([member], prefix, tail, images, 32, study.cloud, seed)
        return latents_of(member, images)

    torch.testing.assert_close(aligned(0), aligned(0))
    assert not torch.allclose(aligned(0), aligned(1))


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_any_number_of_steps_aligns(tiny, steps):
    study = tiny_study(f"cloud.steps={steps} cloud.batch_size=4")
    prefix, tail = tiny.backbone.cut("head")
    member, _ = cut_subnet(prefix, SubnetSpec(width=0.5), random_images(2))
    history = align([member], prefix, tail, random_images(8), 32, study.cloud, seed=0)
    assert history["step"].tolist() == list(range(steps))
    assert latents_of(member, random_images(2)).isfinite().all()


HALF = (SubnetSpec(width=0.5),)


def aligned(tiny, overrides="", specs=HALF, **keywords):
    study = tiny_study(f"cloud.steps=8 cloud.batch_size=8 cloud.mixed=0.3 {overrides}")
    images, (prefix, tail) = random_images(20), tiny.backbone.cut("head")
    cuts = [cut for spec in specs for cut in cut_set(prefix, spec, images[:2], study.cloud)]
    networks, every = [cut.network for cut in cuts], [cut.every for cut in cuts]
    history = align(networks, prefix, tail, images, 32, study.cloud, 0, every=every, **keywords)
    return networks, history


@pytest.mark.parametrize("every", [(), (1, 1), (3, 3, 3), (1, 3, 1, 2, 4), (2, 5, 5, 5, 1)])
def test_each_member_takes_part_once_in_so_many_steps(every):
    parts = [taking_part(step, every) for step in range(40)]
    assert all(set(part) <= set(range(len(every))) and len(set(part)) == len(part) for part in parts)
    for index, period in enumerate(every):
        took = [index in part for part in parts]
        assert all(sum(took[start : start + period]) == 1 for start in range(40 - period))


def test_members_of_one_period_take_turns():
    assert [taking_part(step, (1, 3, 3, 1, 3)) for step in (6, 7, 8)] == [(0, 1, 3), (0, 2, 3), (0, 3, 4)]


def test_members_learn_in_their_turns(tiny):
    """Batch norm counts the batches that it learns from; a loss stays as it is until the next turn."""
    specs = [SubnetSpec(width=0.5, resolutions=(32, 24, 16), every=(1, 3, 3)), SubnetSpec(resolution=24, every=(2,))]
    networks, history = aligned(tiny, "cloud.steps=7 cloud.loss.frozen_statistics=0", specs)
    turns = [{0, 1, 2, 3, 4, 5, 6}, {0, 3, 6}, {1, 4}, {0, 2, 4, 6}]
    before, _ = tiny.backbone.cut("head")
    for network, turn in zip(networks, turns):
        for name, count in network.named_buffers():
            assert not name.endswith("num_batches_tracked") or count - before.get_buffer(name) == len(turn), name
    for (_, rows), turn in zip(history.groupby("member"), turns):
        losses = rows["loss"].tolist()
        assert losses[0] > 0 if 0 in turn else np.isnan(losses[0])
        assert {step for step in range(1, 7) if losses[step] != losses[step - 1]} == turn - {0}


def test_who_has_not_taken_part_yet_has_no_influence_and_learns_nothing(tiny):
    """One step of two members that take turns is one of the first alone; the other's own weights only decay."""
    overrides = "cloud.steps=1 cloud.learning_rate=0.5 cloud.loss.frozen_statistics=0"  # times 0.04 in the first step
    (single,), _ = aligned(tiny, overrides)
    spec = SubnetSpec(width=0.5, resolutions=(32, 16), every=(2, 2))
    (first, other), _ = aligned(tiny, overrides, [spec])
    assert same_tensors(copied_state(first), copied_state(single))
    _, cut = cut_set(tiny.backbone.cut("head")[0], spec, random_images(20)[:2])
    for name, start in copied_state(cut.network).items():
        if name in dict(other.named_buffers()):
            assert torch.equal(other.get_buffer(name), start), name
        elif other.get_parameter(name) is not first.get_parameter(name):
            wanted = start * (1 - 0.04 * 0.5 * 0.01)
            torch.testing.assert_close(other.get_parameter(name), wanted, rtol=1e-6, atol=1e-8)


def test_members_with_nothing_in_common_do_not_notice_who_takes_turns(tiny):
    (single,), alone = aligned(tiny)
    (same, _, _), both = aligned(tiny, specs=[*HALF, SubnetSpec(width=0.75, resolutions=(24, 16), every=(3, 2))])
    assert same_tensors(copied_state(same), copied_state(single))
    assert both[both["member"] == 1]["loss"].tolist() == alone["loss"].tolist()


@pytest.mark.parametrize(("settled", "last"), [(None, (0.5, 0.3)), (0.9, (0.9, 0.0))])
def test_crops_are_milder_and_whole_once_batch_norm_is_frozen(tiny, monkeypatch, settled, last):
    """Eight steps, the last two with frozen statistics; each draws by (smallest area, share mixed)."""
    drawn = []

    def watched(images, resolution, smallest_area, generator, mixed=0.0, part=(0, 1)):
        drawn.append((smallest_area, mixed))
        return random_crops(images, resolution, smallest_area, generator, mixed, part)

    monkeypatch.setattr(alignment, "random_crops", watched)
    area = "" if settled is None else f"cloud.settled_crop_area={settled}"
    aligned(tiny, f"cloud.crop_area=0.5 cloud.loss.frozen_statistics=0.25 {area}")
    assert drawn[1:] == 6 * [(0.5, 0.3)] + 2 * [last]  # the first is the sample that the goal is set by


@pytest.mark.parametrize("specs", [HALF, (SubnetSpec(width=0.5, resolutions=(32, 16), every=(1, 3)),)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_alignment_goes_on_and_ends_the_same(tiny, tmp_path, monkeypatch, optimizer, specs):
    """Cut off at step 5 by an error, continued from the checkpoint of step 4; every third step is 0, 3 and 6."""
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN", 0.0)
    whole, history = aligned(tiny, f"cloud.optimizer={optimizer}", specs)
    real, calls = alignment.one_cycle, []

    def killed(progress):
        calls.append(progress)
        if len(calls) == 6:
            raise KeyboardInterrupt
        for thread in threading.enumerate():  # every writing ends, so that the last checkpoint is that of step 4
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        return real(progress)

    path = tmp_path / "state.safetensors"
    monkeypatch.setattr(alignment, "one_cycle", killed)
    with pytest.raises(KeyboardInterrupt):
        aligned(tiny, f"cloud.optimizer={optimizer}", specs, checkpoint=path)
    monkeypatch.setattr(alignment, "one_cycle", real)
    continued, later = aligned(tiny, f"cloud.optimizer={optimizer}", specs, checkpoint=path)
    finished, _ = aligned(tiny, f"cloud.optimizer={optimizer}", specs, checkpoint=path)  # killed after the last step
    for ended in (finished, continued):
        assert all(same_tensors(copied_state(one), copied_state(other)) for one, other in zip(ended, whole))
    assert later[["step", "member", "loss"]].equals(history[["step", "member", "loss"]])
    assert later["seconds"].is_monotonic_increasing


def test_members_come_out_with_the_librarys_own_layers(tmp_path):
    """Folded while they train, also where the checkpoint says that nothing is left to do."""
    prefix, tail = random_backbone("resnet18").cut("head")
    study = tiny_study("cloud.steps=2 cloud.batch_size=4 cloud.loss.frozen_statistics=0.5")
    for _ in range(2):
        member = copy.deepcopy(prefix).requires_grad_(True)
        fold_stem(member)  # as alignment does on a GPU
        align([member], prefix, tail, random_images(8), SIDE, study.cloud, 0, tmp_path / "state.safetensors")
        assert str(member) == str(prefix)
        assert not any(module.training for module in member.modules())


def test_shared_convolutions_stay_the_originals(tiny):
    blocks = tuple(tiny.backbone.body[-2:])
    (member,), _ = aligned(tiny, specs=[SubnetSpec(resolution=16, shared=blocks)])
    prefix, _ = tiny.backbone.cut("head")
    original, own = copied_state(prefix), copied_state(member)
    dense = [name for name in shared_tensors(member, blocks)]
    assert dense
    assert all(torch.equal(own[name], original[name]) for name in dense)
    trained = [name for name, _ in member.named_parameters() if name not in dense]
    assert all(not torch.equal(own[name], original[name]) for name in trained)


def test_subnets_of_one_set_have_convolutions_in_common(tiny):
    (leader, follower), _ = aligned(tiny, specs=[SubnetSpec(width=0.5, resolutions=(32, 16))])
    for name, weight in leader.named_parameters():
        same = weight is follower.get_parameter(name)
        assert same == (weight.dim() == 4), name
        assert same or not torch.equal(weight, follower.get_parameter(name))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_latent_maps_are_aligned_and_common(tiny, optimizer):
    spec = SubnetSpec(width=0.5, resolutions=(32, 16), latent_map=4)
    (leader, follower), _ = aligned(tiny, f"cloud.optimizer={optimizer}", specs=[spec])
    for part in ("map.up.weight", "map.down.weight"):
        assert leader.get_parameter(part) is follower.get_parameter(part)
    assert leader.map.up.weight.abs().max() > 0
    assert not torch.equal(leader.map.up.bias, follower.map.up.bias)


def test_common_weights_get_the_sum_of_the_gradients(tiny):
    """A set of two equal members trains as its single member does: Adam sees the double gradient, scaled away."""
    (single,), _ = aligned(tiny, "cloud.steps=1 cloud.loss.frozen_statistics=1", specs=[SubnetSpec(width=0.5)])
    (leader, _), _ = aligned(
        tiny, "cloud.steps=1 cloud.loss.frozen_statistics=1", specs=[SubnetSpec(width=0.5, resolutions=(32, 32))]
    )
    for name, weight in single.named_parameters():
        torch.testing.assert_close(leader.get_parameter(name), weight, rtol=1e-3, atol=1e-5)


def test_leaves_are_new_and_keep_what_members_have_in_common(tiny):
    """What stays of an older graph, as Torch-Pruning's do, must not hold a leaf that is trained."""
    prefix, _ = tiny.backbone.cut("head")
    leader, follower = (cut.network for cut in cut_set(prefix, SubnetSpec(resolutions=(32, 16)), random_images(2)))
    before = [dict(network.named_parameters()) for network in (leader, follower)]
    graph = leader(random_images(2)).sum()
    alignment._make_leaves([leader, follower])
    for network, old in zip((leader, follower), before):
        for name, weight in network.named_parameters():
            assert weight is not old[name] and weight.is_leaf
            assert weight.data_ptr() == old[name].data_ptr()
            assert weight.requires_grad == old[name].requires_grad
    shared = [name for name, weight in leader.named_parameters() if weight is follower.get_parameter(name)]
    assert shared == [name for name, weight in before[0].items() if weight is before[1][name]] != []
    graph.backward()
    assert all(weight.grad is None for weight in leader.parameters())


@pytest.mark.parametrize("loss", ["{space: whitened}", "{space: plain, kl: 0}", "{features: 1.0, cosine: 0}"])
def test_every_loss_falls(tiny, loss):
    _, history = aligned(tiny, f"cloud.steps=30 'cloud.loss={loss}' cloud.learning_rate=5e-3")
    assert history["loss"].tail(5).mean() < history["loss"].head(5).mean()


def test_every_member_has_its_turn(tiny):
    prefix, tail = tiny.backbone.cut("head")
    members = [prefix, prefix]
    with pytest.raises(ValueError, match=r"every: 1 numbers for 2 members; give one for each"):
        align(members, prefix, tail, random_images(20), 32, tiny_study("cloud.steps=1").cloud, 0, every=(1,))


def test_two_processes_find_the_losses_of_one(tmp_path):
    """Batch norm frozen: then nothing depends on which images share a process."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    for command, name in (([sys.executable, str(script)], "one.csv"), (torchrun, "two.csv")):
        subprocess.run([*command, str(tmp_path / name)], env=environment, check=True, timeout=300, cwd=tmp_path)
    one, two = (pd.read_csv(tmp_path / name) for name in ("one.csv", "two.csv"))
    assert one["step"].tolist() == two["step"].tolist()
    assert len(one) == 16
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)


TWO_PROCESSES = """
import sys
from tiny import random_backbone, random_images, tiny_study
from accelerate import PartialState
from piebridge.alignment import align
from piebridge.config import SubnetSpec
from piebridge.cutting import cut_subnet

study = tiny_study("cloud.steps=8 cloud.batch_size=8 cloud.loss.frozen_statistics=1")
prefix, tail = random_backbone("embedded").cut("head")
members = [cut_subnet(prefix, SubnetSpec(width=width), random_images(2))[0] for width in (0.5, 0.75)]
history = align(members, prefix, tail, random_images(20), 32, study.cloud, 0, every=(1, 3))
if PartialState().is_main_process:
    history.to_csv(sys.argv[1], index=False)
"""


def test_batch_must_be_shared_evenly(tiny, monkeypatch):
    class Three:
        num_processes, process_index, is_main_process, device = 3, 0, True, torch.device("cpu")

    monkeypatch.setattr(alignment, "PartialState", lambda cpu: Three())
    with pytest.raises(ValueError, match=r"cloud\.batch_size: 8 .* 3 processes"):
        aligned(tiny)


def crops(images, smallest_area=0.35, seed=0, resolution=24):
    return random_crops(images, resolution, smallest_area, torch.Generator().manual_seed(seed))


def test_crops_have_shape_range_and_layout():
    result = crops(random_images(64, side=40))
    assert result.shape == (64, 3, 24, 24)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 255
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_crops_follow_the_seed():
    images = random_images(8)
    assert torch.equal(crops(images), crops(images))
    assert not torch.equal(crops(images), crops(images, seed=1))


def test_each_image_gets_its_own_crop():
    same = random_images(1).expand(32, -1, -1, -1)
    assert len(crops(same).flatten(1).unique(dim=0)) == 32


def slopes(smallest_area):
    """How fast a ramp of one grey a pixel rises in its crops, across; negative where flipped."""
    ramp = torch.arange(100, 164).view(1, 1, 1, 64).expand(400, 3, 64, 64).to(torch.uint8)
    result = crops(ramp, smallest_area, resolution=32)
    return (result[:, 0, 16, 24] - result[:, 0, 16, 8]) / 16


def test_crops_are_flipped_half_of_the_time():
    assert 0.4 < (slopes(0.35) < 0).float().mean() < 0.6


def test_crops_show_at_least_the_smallest_area():
    """The slope is the crop's width over its resolution (2 for the whole ramp) times the contrast of 0.7 to 1.3."""
    steepest, width_least = 2 * 1.3, (0.35 * 0.75) ** 0.5
    rises = slopes(0.35).abs()
    assert rises.max() <= steepest + 0.02
    assert rises.min() >= 2 * width_least * 0.7 - 0.02
    assert rises.min() < 2 * 0.75
    assert slopes(1.0).abs().min() >= 2 * 0.75**0.5 * 0.7 - 0.02


def test_mixed_crops_hold_a_rectangle_of_the_neighbour():
    whole = torch.zeros(64, 3, 20, 20, dtype=torch.uint8)
    whole[::2] = 255
    result = random_crops(whole, 20, 1.0, torch.Generator().manual_seed(0), mixed=0.5)
    both = [(image > 200).any() and (image < 60).any() for image in result[:, 0]]
    assert 0.3 < sum(both) / 64 < 0.7
    assert not any((image > 200).any() and (image < 60).any() for image in random_crops(
        whole, 20, 1.0, torch.Generator().manual_seed(0))[:, 0])


def test_a_part_of_the_crops_is_that_part_of_the_whole():
    images = random_images(8)
    parts = [random_crops(images, 24, 0.4, torch.Generator().manual_seed(5), part=(i, 2)) for i in range(2)]
    whole = random_crops(images, 24, 0.4, torch.Generator().manual_seed(5))
    torch.testing.assert_close(torch.cat(parts), whole)
