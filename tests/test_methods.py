"""Every method of the registry, with every kind of PET: what is frozen stays, what is trained changes."""

import dataclasses
import math

import pytest
import torch
from tiny import bare_setting, copied_state, random_backbone, random_images, same_tensors, tiny_study

from piebridge import costs, subnets
from piebridge.checkpoints import Checkpoint
from piebridge.cloud import free_family
from piebridge.config import METHODS
from piebridge.crops import RandomViews
from piebridge.methods import NEEDS_FAMILY, REGISTRY, choose_side
from piebridge.methods.oracle import true_similarity
from piebridge.methods.setting import cheap_route, most_faithful
from piebridge.subnets import Family, latents_of
from piebridge.training import fit

LABELS = torch.arange(13) % 3


def setting_of(kind, backbone_name="embedded"):
    """A setting with a family of untrained members, for any cut."""
    overrides = (
        f"pet.kind={kind} pet.blocks=1 pet.bottleneck=4 pet.rank=2 "
        "routing.subnet=4 routing.pairs=4 routing.difficulty=0 routing.cost=0.9 routing.cached_cost=1"
    )
    bare = bare_setting(random_backbone(backbone_name), overrides)
    family = free_family(bare.study, bare.backbone)
    return dataclasses.replace(bare, family=family)


@pytest.fixture(scope="module")
def settings():
    return {kind: setting_of(kind) for kind in ("head", "last_k", "adapter", "lora")}


def states_of(setting):
    networks = [setting.backbone.blocks, *setting.family.networks]
    return [copied_state(network) for network in networks]


@pytest.mark.parametrize("kind", ["head", "last_k", "adapter", "lora"])
@pytest.mark.parametrize("method", REGISTRY)
def test_frozen_tensors_stay_and_trained_ones_change(settings, method, kind):
    setting = settings[kind]
    plan = REGISTRY[method](setting)
    frozen = states_of(setting)
    trained = {name for name, parameter in plan.split.suffix.named_parameters() if parameter.requires_grad}
    before = copied_state(plan.split.suffix)
    outcome = fit(plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {})
    after = copied_state(plan.split.suffix)
    assert all(same_tensors(*pair) for pair in zip(states_of(setting), frozen))
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == trained if method != "elastic" else changed and changed <= trained
    assert all(math.isfinite(loss) for loss in outcome.history["loss"])
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())


@pytest.mark.parametrize("method", REGISTRY)
def test_plans_keep_to_the_loops_terms(settings, method):
    setting = settings["head"]
    plan = REGISTRY[method](setting)
    assert set(plan.networks) <= set(plan.runners)
    assert plan.policy.route in plan.runners
    assert plan.policy.describe()
    assert all(seconds >= 0 for seconds in plan.seconds.values())
    for route, network in plan.networks.items():
        with torch.inference_mode():
            expected = network(setting.images)
            torch.testing.assert_close(plan.runners[route](setting.images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", REGISTRY)
def test_images_run_through_members(settings, method):
    """How many images each member computes in three epochs of thirteen."""
    setting = settings["head"]
    plan = REGISTRY[method](setting)
    computed = fit(plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {}).computed
    if method in ("full", "pet", "last_k", "elastic", "prune"):
        assert computed == {0: 39}
    elif method == "cached":
        assert computed == {0: 13}
    elif method in ("fixed", "resolution"):
        assert computed == {0: 4, plan.policy.route: 39}
    elif method == "piebridge_cached":
        first = plan.policy.first
        assert computed[4] == 13 - first  # what gets the original at first never sees the subnet
        assert first < computed[0] <= 13
    else:
        on_original = computed[0] - 4
        assert computed == {0: 4 + on_original, 4: 13 + 26 - on_original}
        assert on_original == 2 * round(plan.policy.share * 13)


def test_registry_and_configuration_agree():
    assert tuple(REGISTRY) == METHODS
    assert set(REGISTRY) >= NEEDS_FAMILY


def test_full_trains_everything(settings):
    plan = REGISTRY["full"](settings["head"])
    assert all(parameter.requires_grad for parameter in plan.split.suffix.parameters())
    classes = 3 * (128 + 1) - 62 * (128 + 1)
    total = costs.parameter_counts(settings["head"].backbone.blocks)[1] + classes
    assert costs.parameter_counts(plan.split.suffix) == (total, total)


def test_last_k_trains_as_many_blocks_as_asked():
    setting = bare_setting(random_backbone("embedded"), "training.last_k=2")
    plan = REGISTRY["last_k"](setting)
    trained = {name.split(".")[0] for name, value in plan.split.suffix.named_parameters() if value.requires_grad}
    assert trained == {"layer3_0", "layer3_1", "head"}
    assert plan.split.cut == "layer3_0"


@pytest.mark.parametrize("backbone_name", ["mobilenet_v2", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_routed_training_on_other_architectures(backbone_name, kind):
    setting = setting_of(kind, backbone_name)
    plan = REGISTRY["piebridge"](setting)
    outcome = fit(plan, setting.images, LABELS, setting.study.training, 0.001, 0, lambda suffix: {})
    assert set(outcome.computed) == {0, 4}
    assert all(math.isfinite(loss) for loss in outcome.history["loss"])


def test_difficulty_is_measured_in_the_first_epoch_and_paid(tiny):
    study = tiny_study(
        "routing.measured_difficulty=1 routing.cost=0.7 routing.correction=false training.epochs=4 training.window=92"
    )
    setting = dataclasses.replace(tiny.setting, study=study)
    plan, count = REGISTRY["piebridge"](setting), len(setting.images)
    labels = tiny.task.labels[torch.cat([tiny.task.splits["train"], tiny.task.splits["validation"]])]
    outcome = fit(plan, setting.images, labels, study.training, 0.01, 0, lambda suffix: {})
    assert outcome.history["original_share"].iloc[0] == 1
    torch.testing.assert_close(plan.measured.values, 1 - true_similarity(setting), rtol=1e-3, atol=1e-4)
    spent = outcome.computed[0] + outcome.computed[plan.policy.route] * plan.prices[plan.policy.route]
    assert spent == pytest.approx(0.7 * 4 * count, rel=0.02)
    assert outcome.seconds["router"] > 0
    assert REGISTRY["random"](setting).measured is None
    assert REGISTRY["oracle"](setting).measured is None
    assert REGISTRY["piebridge_cached"](setting).measured is None


@pytest.mark.parametrize("method", ["fixed", "random", "resolution", "piebridge"])
def test_a_map_fitted_to_all_images_makes_up_for_a_subnet(method):
    """13 images are fewer than the latents' channels, so that corrected latents are the original's."""
    def trained(method, overrides="", views=False):
        always = "routing.subnet=4 routing.difficulty=0 routing.cost=0.6 routing.pairs=all"
        bare = bare_setting(random_backbone("embedded"), f"{always} {overrides}")
        setting = dataclasses.replace(bare, family=free_family(bare.study, bare.backbone))
        plan, training = REGISTRY[method](setting), setting.study.training
        images = RandomViews(setting.images, torch.arange(13), 32, 0.9, 0) if views else setting.images
        fit(plan, images, LABELS, training, 0.05, 0, lambda suffix: {})
        return plan.split.suffix.head.weight.detach()

    def apart(one, other):
        return (one - other).norm() / trained("pet").norm()

    assert apart(trained(method), trained("pet")) < 1e-3
    assert apart(trained(method, "routing.pairs=12"), trained("pet")) > 1e-2
    other_views = "training.regime=augmented"
    assert apart(trained(method, other_views, views=True), trained("pet", other_views, views=True)) > 1e-2


def test_pairs_are_paid_from_the_budget_of_fixed(settings):
    manifest = settings["head"].family.manifest
    facts = tuple(member.model_copy(update={"relative_latency": None}) for member in manifest.subnets)
    family = Family(manifest.model_copy(update={"subnets": facts}), settings["head"].family.networks)

    def chosen(overrides):
        study = tiny_study(f"training.epochs=4 {overrides}")
        return REGISTRY["fixed"](dataclasses.replace(settings["head"], study=study, family=family)).policy.route

    assert family.relative_macs[1] == 0.5625 and family.relative_macs[2] == 0.25
    assert chosen("routing.cost=0.6 routing.correction=false") == 1
    assert chosen("routing.cost=0.6 routing.pairs=2") == 2  # of 13 images in 4 epochs: 0.038
    assert chosen("routing.cost=0.6 routing.pairs=all") == 2
    assert chosen("routing.cost=0.85 routing.pairs=all") == 1


def test_kept_latents_need_not_be_corrected_where_others_are(tiny):
    study = tiny_study("routing.cached_correction=false")
    setting = dataclasses.replace(tiny.setting, study=study)
    assert REGISTRY["piebridge"](setting).corrected
    assert not REGISTRY["piebridge_cached"](setting).corrected
    assert REGISTRY["piebridge_cached"](tiny.setting).corrected


@pytest.mark.parametrize("method", ["piebridge", "random", "fixed"])
@pytest.mark.parametrize("correction", ["true", "false"])
def test_windows_do_not_change_routed_training(tiny, method, correction):
    labels = tiny.task.labels[torch.cat([tiny.task.splits["train"], tiny.task.splits["validation"]])]

    def trained(window, prefix_batch):
        study = tiny_study(
            f"training.window={window} training.prefix_batch={prefix_batch} routing.correction={correction}"
        )
        plan = REGISTRY[method](dataclasses.replace(tiny.setting, study=study))
        outcome = fit(plan, tiny.setting.images, labels, study.training, 0.01, 0, lambda suffix: {})
        return plan.split.suffix.head.weight.detach(), outcome.computed

    (one, computed), (other, same) = trained(8, 4), trained(90, 32)
    assert computed == same
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_windows_do_not_change_routed_training_at_a_deep_cut(settings):
    def trained(window):
        training = settings["adapter"].study.training.model_copy(update={"window": window})
        plan = REGISTRY["piebridge"](settings["adapter"])
        fit(plan, settings["adapter"].images, LABELS, training, 0.01, 0, lambda suffix: {})
        return plan.split.suffix.head.weight.detach()

    torch.testing.assert_close(trained(4), trained(64), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "kind", "backbone_name"),
    [
        ("piebridge", "adapter", "embedded"), ("piebridge_cached", "lora", "embedded"),
        ("cached", "last_k", "embedded"),
        ("resolution", "adapter", "embedded"), ("oracle", "adapter", "vit_tiny_patch16_224"),
        ("full", "head", "mobilenet_v2"),
    ],
)
def test_training_in_pieces_at_deep_cuts(method, kind, backbone_name, tmp_path, monkeypatch):
    setting = setting_of(kind, backbone_name)
    keep = Checkpoint.keep

    def fitted(checkpoint):
        plan = REGISTRY[method](setting)
        outcome = fit(
            plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {}, checkpoint=checkpoint
        )
        return plan, outcome

    def keep_and_die(checkpoint, state):
        keep(checkpoint, state)
        raise KeyboardInterrupt

    plan, outcome = fitted(None)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep", keep_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                fitted(Checkpoint(tmp_path / "run.safetensors"))
    again, continued = fitted(Checkpoint(tmp_path / "run.safetensors"))
    assert same_tensors(copied_state(plan.split.suffix), copied_state(again.split.suffix))
    assert (outcome.computed, outcome.suffix_macs) == (continued.computed, continued.suffix_macs)
    assert outcome.history["loss"].tolist() == continued.history["loss"].tolist()


# ---------------------------------------------------------------------------------- oracle and resolution


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_true_similarity_is_the_fidelity_of_each_image(settings, kind):
    setting = settings[kind]
    original, cheap = (latents_of(setting.family.networks[index], setting.images) for index in (0, 4))
    expected, _ = subnets.fidelity(cheap, original)
    torch.testing.assert_close(true_similarity(setting), expected, rtol=1e-4, atol=1e-5)


def test_oracle_gives_the_original_to_the_least_similar_in_every_epoch(settings):
    study = settings["head"].study
    routing = study.routing.model_copy(update={"cost": 0.6})
    setting = dataclasses.replace(settings["head"], study=study.model_copy(update={"routing": routing}))
    policy = REGISTRY["oracle"](setting).policy
    assert policy.share == REGISTRY["random"](setting).policy.share
    order, wanted = torch.randperm(13), round(policy.share * 13)
    policy.plan(0, order)
    worst = set(true_similarity(setting).argsort()[:wanted].tolist())
    for epoch in (1, 2):
        policy.observe(order, torch.rand(13))
        routes = policy.plan(epoch, order).routes
        assert set(torch.nonzero(routes == 0).flatten().tolist()) == worst
    assert 0 < wanted < 13


def test_oracles_privilege_is_not_counted(tiny):
    plan = REGISTRY["oracle"](tiny.setting)
    assert set(plan.seconds) == {"engine"}


def side_of(backbone_name, overrides):
    return choose_side(bare_setting(random_backbone(backbone_name), f"routing.pairs=2 {overrides}")).side


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.7, 1.0])
def test_side_is_the_largest_that_the_budget_pays_for(budget):
    setting = bare_setting(random_backbone("embedded"), f"routing.cost={budget} routing.pairs=2")
    prefix, example = setting.split().prefix, setting.backbone.example()

    def cost(side):
        images = torch.nn.functional.interpolate(example, (side, side))
        return costs.macs(prefix[1:], images.float()) / costs.macs(prefix, example)

    side = choose_side(setting).side
    assert side == max(side for side in (8, 16, 24) if cost(side) + 2 / (3 * 13) <= budget)


def test_sides_of_a_transformer_are_whole_patches():
    assert side_of("vit_tiny_patch16_224", "routing.cost=1") == 16


def test_side_by_the_clock():
    assert side_of("embedded", "routing.costs=measured routing.cost=1") in (8, 16, 24)


def test_budget_too_small_for_any_side():
    with pytest.raises(ValueError, match=r"routing\.cost: 0\.02 does not pay for an input of 8 px"):
        side_of("embedded", "routing.cost=0.02")


def test_pairs_are_paid_from_the_budget_of_resolution():
    assert side_of("embedded", "routing.cost=0.65") == 24
    assert side_of("embedded", "routing.cost=0.65 routing.pairs=13") == 16
    assert side_of("embedded", "routing.cost=0.65 routing.pairs=13 routing.correction=false") == 24


def test_resolution_is_the_original_on_smaller_images(settings):
    setting = dataclasses.replace(settings["head"], family=None, side=16)
    plan = REGISTRY["resolution"](setting)
    prefix = setting.split().prefix
    smaller = torch.nn.functional.interpolate(setting.images, (16, 16), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in prefix.input.mean_and_std)
    expected = prefix[1:]((smaller / 255 - mean) / std)
    torch.testing.assert_close(plan.runners[1](setting.images), expected, rtol=1e-3, atol=1e-3)
    assert plan.policy.describe() == "16 px"
    assert prefix.input.resolution == 32
    assert plan.corrected


# -------------------------------------------------------------------------------------------- settings


def test_the_routers_pass_is_counted(tiny):
    plan = REGISTRY["piebridge"](tiny.setting)
    assert plan.seconds["router"] > 0
    assert plan.policy.difficulty.max() == pytest.approx(tiny.study.routing.difficulty)
    assert "router" not in REGISTRY["random"](tiny.setting).seconds


def test_a_subnet_is_expected_to_cost_what_the_family_tells(tiny):
    manifest = tiny.setting.family.manifest
    facts = tuple(facts.model_copy(update={"relative_latency": 0.125 * (4 - index)})
                  for index, facts in enumerate(manifest.subnets))
    family = Family(manifest.model_copy(update={"subnets": facts}), tiny.setting.family.networks)
    setting = dataclasses.replace(tiny.setting, family=family)
    assert REGISTRY["piebridge"](setting).prices == {0: 1.0, 2: family.relative_macs[2]}
    measured = dataclasses.replace(setting, study=tiny_study("routing.costs=measured routing.difficulty=0"))
    recomputed, kept = REGISTRY["piebridge"](measured), REGISTRY["piebridge_cached"](measured)
    assert recomputed.prices == kept.prices == {0: 1.0, 2: 0.25}
    assert recomputed.by_clock
    assert not kept.by_clock


def test_kept_latents_can_have_a_subnet_of_their_own(tiny):
    study = tiny_study("routing.cached_subnet=1 routing.cached_cost=1")
    setting = dataclasses.replace(tiny.setting, study=study)
    assert REGISTRY["piebridge_cached"](setting).policy.route == 1
    assert REGISTRY["piebridge"](setting).policy.route == cheap_route(setting) == 2
    missing = dataclasses.replace(tiny.setting, study=tiny_study("routing.cached_subnet=3"))
    with pytest.raises(ValueError, match=r"routing\.cached_subnet: 3, but the family's subnets go from 1 to 2"):
        REGISTRY["piebridge_cached"](missing)


def test_subnet_that_is_not_in_the_family(tiny):
    setting = dataclasses.replace(tiny.setting, study=tiny_study("routing.subnet=3"))
    with pytest.raises(ValueError, match=r"routing\.subnet: 3, but the family's subnets go from 1 to 2"):
        cheap_route(setting)


def test_budget_too_small_for_the_subnet(tiny):
    setting = dataclasses.replace(tiny.setting, study=tiny_study("routing.cost=0.01"))
    with pytest.raises(ValueError, match=r"routing\.cost: 0\.01"):
        REGISTRY["piebridge"](setting)


def invented_family(tiny, rows):
    facts = [tiny.setting.family.manifest.subnets[0]]
    for latency, macs, fidelity in rows:
        facts.append(facts[0].model_copy(
            update={"relative_latency": latency, "relative_macs": macs, "fidelity": fidelity}
        ))
    manifest = tiny.setting.family.manifest.model_copy(update={"subnets": tuple(facts)})
    return Family(manifest, [None] * len(facts))


def test_most_faithful_within_the_limit(tiny):
    family = invented_family(tiny, [(0.8, 0.7, 0.99), (0.5, 0.5, 0.8), (0.4, 0.3, 0.9), (None, 0.2, 0.7)])
    assert most_faithful(family, 0.9) == 1
    assert most_faithful(family, 0.5) == 3
    assert most_faithful(family, 0.3) == 4
    assert most_faithful(family, 0.1) == 4  # none is affordable: the cheapest


def test_random_images_are_no_constant():
    assert random_images(2).float().std() > 10
