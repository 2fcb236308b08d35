"""Routes go both ways and keep to their budget; corrections are ridge regressions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piebridge.routing import (
    POSITIONS,
    SHRINKAGES,
    Budget,
    Correction,
    FixedRoute,
    MeasuredDifficulty,
    Residuals,
    SharedRoute,
    cached_shares,
    original_share,
    ranks,
)

# ------------------------------------------------------------------------------------------ correction


def pairs_of(count=40, channels=4, seed=0):
    generator = np.random.default_rng(seed)
    cheap = generator.normal(1, 1, (count, channels))
    original = cheap @ (np.eye(channels) + generator.normal(0, 0.5, (channels, channels))) + 0.3
    original += generator.normal(0, 0.2, original.shape)
    return torch.from_numpy(cheap).float(), torch.from_numpy(original).float()


def ridge(cheap, difference, strength):
    """The closed form: (X'X + aI)^-1 X'D on centred data; the offset is not shrunk."""
    centre, middle = cheap.mean(0), difference.mean(0)
    inputs, outputs = cheap - centre, difference - middle
    weight = np.linalg.solve(inputs.T @ inputs + strength * np.eye(inputs.shape[1]), inputs.T @ outputs)
    return weight, middle - centre @ weight


def left_out_error(cheap, difference, strength):
    errors = []
    for index in range(len(cheap)):
        others = np.arange(len(cheap)) != index
        weight, offset = ridge(cheap[others], difference[others], strength)
        errors.append(((cheap[index] @ weight + offset - difference[index]) ** 2).mean())
    return np.mean(errors)


@pytest.mark.parametrize("seed", [0, 1])
def test_correction_is_the_ridge_that_leaves_out_best(seed):
    cheap, original = pairs_of(seed=seed)
    correction = Correction(0)
    correction.add(1, cheap[:15], original[:15])
    correction.add(1, cheap[15:], original[15:])
    correction.fit(1)
    inputs, difference = cheap.double().numpy(), (original - cheap).double().numpy()
    strengths = [share * len(inputs) * inputs.var(0, ddof=1).mean() for share in SHRINKAGES]
    weight, offset = ridge(inputs, difference, min(strengths, key=lambda a: left_out_error(inputs, difference, a)))
    fresh = pairs_of(9, seed=7)[0]
    expected = fresh.numpy() @ (weight + np.eye(4)) + offset
    np.testing.assert_allclose(correction.apply(1, fresh).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_more_pairs_keep_the_first_strength():
    cheap, original = pairs_of(80)
    correction = Correction(0)
    correction.add(1, cheap[:20], original[:20])
    correction.fit(1)
    strength = correction.strengths[1]
    correction.add(1, cheap[20:], original[20:])
    correction.fit(1)
    weight, offset = ridge(cheap.double().numpy(), (original - cheap).double().numpy(), strength)
    expected = cheap.numpy() @ (weight + np.eye(4)) + offset
    np.testing.assert_allclose(correction.apply(1, cheap).numpy(), expected, rtol=1e-3, atol=1e-4)
    again = Correction(1)
    again.restore(correction.state())
    assert again.strengths == correction.strengths
    assert again.fitted == correction.fitted == {1: 80}


def test_a_map_is_fitted_anew_when_pairs_have_grown_by_half():
    cheap, original = pairs_of(30)
    correction = Correction(0)
    correction.add(1, cheap[:20], original[:20])
    correction.fit(1)
    first = correction.apply(1, cheap)
    correction.add(1, cheap[20:29], original[20:29])
    correction.fit(1)
    assert torch.equal(correction.apply(1, cheap), first)
    correction.add(1, cheap[29:], original[29:])
    correction.fit(1)
    assert not torch.equal(correction.apply(1, cheap), first)


def test_a_fit_leaves_no_other_thread_of_the_blas_busy(monkeypatch):
    from threadpoolctl import threadpool_info

    from piebridge import routing

    seen = []

    class Watched(routing.Ridge):
        def fit(self, *args):
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            return super().fit(*args)

    monkeypatch.setattr(routing, "Ridge", Watched)
    correction = Correction(0)
    correction.add(1, *pairs_of())
    correction.fit(1)
    assert seen and set(seen) == {1}


def test_in_sample_the_correction_is_least_squares():
    cheap, original = pairs_of(40, channels=6)
    correction = Correction(0, in_sample=True)
    correction.add(1, cheap[:15], original[:15])
    correction.add(1, cheap[15:], original[15:])
    correction.fit(1)
    known = np.c_[cheap.double().numpy(), np.ones(40)]
    solution = np.linalg.lstsq(known, original.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(correction.apply(1, cheap).numpy(), known @ solution, rtol=1e-3, atol=1e-3)
    generalising = Correction(0)
    generalising.add(1, cheap, original)
    generalising.fit(1)
    left = [(map.apply(1, cheap) - original).square().mean().item() for map in (correction, generalising)]
    assert left[0] < left[1]


def test_in_sample_no_more_images_than_channels_are_met_exactly_and_then_forgotten():
    cheap, original = pairs_of(6, channels=8)
    correction = Correction(0, in_sample=True)
    correction.add(1, cheap, original)
    correction.fit(1)
    torch.testing.assert_close(correction.apply(1, cheap), original, rtol=1e-3, atol=1e-3)
    assert not correction.pairs
    again = Correction(1, in_sample=True)
    again.restore(correction.state())
    assert torch.equal(again.apply(1, cheap), correction.apply(1, cheap))
    for _ in range(3):  # pairs of the originals' share, in later epochs: they are known already
        again.add(1, cheap[:4] + 1, original[:4])
        again.fit(1)
    assert not again.pairs and torch.equal(again.apply(1, cheap), correction.apply(1, cheap))


def test_positions_that_were_not_drawn_must_be_generalised_to():
    generator = torch.Generator().manual_seed(0)
    cheap, original = (torch.rand(3, 5, 6, 6, generator=generator) for _ in range(2))
    maps = []
    for in_sample in (False, True):
        correction = Correction(0, in_sample)
        correction.add(1, cheap, original)
        correction.fit(1)
        maps.append(correction.apply(1, cheap))
    assert torch.equal(*maps)


def test_correction_of_exact_latents_is_the_identity():
    cheap, _ = pairs_of()
    correction = Correction(0)
    correction.add(1, cheap, cheap)
    correction.fit(1)
    torch.testing.assert_close(correction.apply(1, cheap), cheap)


def test_correction_brings_latents_nearer():
    cheap, original = pairs_of(200)
    correction = Correction(0)
    correction.add(2, cheap[:150], original[:150])
    correction.fit(2)
    left = (correction.apply(2, cheap[150:]) - original[150:]).square().mean()
    assert left < 0.2 * (cheap[150:] - original[150:]).square().mean()


@pytest.mark.parametrize("count", [0, 1])
def test_without_pairs_latents_stay(count):
    cheap, original = pairs_of()
    correction = Correction(0)
    if count:
        correction.add(1, cheap[:count], original[:count])
    correction.fit(1)
    assert torch.equal(correction.apply(1, cheap), cheap)


def test_corrections_of_two_subnets_do_not_mix():
    cheap, original = pairs_of()
    correction = Correction(0)
    correction.add(1, cheap, original)
    correction.fit(1)
    assert torch.equal(correction.apply(2, cheap), cheap)
    assert not torch.equal(correction.apply(1, cheap), cheap)


def fitted_on_channels(shape):
    """A correction whose truth is one linear map of the channels at every position."""
    generator = torch.Generator().manual_seed(0)
    cheap = torch.randn(shape, generator=generator)
    truth = torch.eye(3) + 0.5 * torch.randn(3, 3, generator=generator)
    axis = 1 if len(shape) == 4 else 2
    original = (cheap.movedim(axis, -1) @ truth + 0.7).movedim(-1, axis)
    correction = Correction(0)
    correction.add(1, cheap, original)
    correction.fit(1)
    return correction, cheap, original, axis


@pytest.mark.parametrize("shape", [(30, 3, 5, 6), (30, 25, 3)])
def test_maps_and_tokens_are_corrected_at_each_position(shape):
    correction, cheap, original, axis = fitted_on_channels(shape)
    corrected = correction.apply(1, cheap)
    assert corrected.shape == shape
    torch.testing.assert_close(corrected, original, rtol=0.05, atol=0.05)
    vectors = correction.apply(1, cheap.movedim(axis, -1).reshape(-1, 3))
    torch.testing.assert_close(corrected.movedim(axis, -1).reshape(-1, 3), vectors, rtol=1e-4, atol=1e-5)


def test_few_positions_of_each_pair_are_kept():
    correction, *_ = fitted_on_channels((30, 3, 5, 6))
    assert len(correction.pairs[1][0][0]) == 30 * POSITIONS


@pytest.mark.parametrize("shape", [(30, 3, 5, 6), (30, 25, 3)])
def test_correction_does_not_depend_on_how_pairs_arrive(shape):
    generator = torch.Generator().manual_seed(0)
    cheap, original = torch.randn(2, *shape, generator=generator)
    corrected = []
    for size in (30, 7, 1):
        correction = Correction(0)
        for one, other in zip(cheap.split(size), original.split(size)):
            correction.add(1, one, other)
        correction.fit(1)
        corrected.append(correction.apply(1, cheap))
    torch.testing.assert_close(corrected[1], corrected[0])
    torch.testing.assert_close(corrected[2], corrected[0])


# ------------------------------------------------------------------------------------------- residuals


def test_residuals_give_back_the_slope_of_the_regression():
    generator = torch.Generator().manual_seed(0)
    before, noise = torch.randn(2, 6, 3, generator=generator)
    after = 0.5 * before + 0.1 * noise
    residuals, latents = Residuals(8), torch.ones(6, 3)
    order = torch.tensor([5, 1, 7, 2, 0, 3])
    residuals.learn(order, before)
    assert torch.equal(residuals.apply(order, latents), latents)  # nothing was seen twice
    residuals.learn(order[:4], after[:4])
    slope = np.linalg.lstsq(before[:4].reshape(-1, 1).numpy(), after[:4].flatten().numpy(), rcond=None)[0].item()
    assert residuals.share == pytest.approx(slope, rel=1e-5)
    latest = torch.cat([after[:4], before[4:]])
    torch.testing.assert_close(residuals.apply(order, latents), 1 + slope * latest)
    unknown = torch.tensor([4, 6])
    assert torch.equal(residuals.apply(unknown, latents[:2]), latents[:2])


def test_residuals_that_disagree_are_not_given_back():
    residuals, order = Residuals(4), torch.arange(4)
    residuals.learn(order, torch.ones(4, 2))
    residuals.learn(order, -torch.ones(4, 2))
    assert residuals.share == 0.0
    for _ in range(9):
        residuals.learn(order, 5.0 * (residuals.kept.sign()))
    assert residuals.share == 1.0


def test_residuals_go_on_from_their_state():
    one, other, order = Residuals(4), Residuals(4), torch.arange(3)
    other.restore(one.state())
    assert other.kept is None
    for scale in (1.0, 0.5):
        one.learn(order, scale * torch.ones(3, 2, 4, 4))
    other.restore(one.state())
    latents = torch.randn(3, 2, 4, 4)
    assert torch.equal(one.apply(order, latents), other.apply(order, latents))
    assert other.share == 0.5


# ----------------------------------------------------------------------------------------------- ranks


def test_ranks():
    assert ranks(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert ranks(torch.tensor([5.0, torch.nan, -1.0])).tolist() == [0.5, 1.0, 0.0]
    assert ranks(torch.tensor([4.0])).tolist() == [0.0]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=30, unique=True))
def test_ranks_keep_the_order(values):
    result = ranks(torch.tensor(values, dtype=torch.float32))
    assert sorted(result.tolist()) == pytest.approx(np.linspace(0, 1, len(values)).tolist(), abs=1e-6)
    assert result.argsort().tolist() == np.argsort(np.float32(values), kind="stable").tolist()


# ---------------------------------------------------------------------------------------------- routes


def originals(plan):
    return set(torch.nonzero(plan.routes == 0).flatten().tolist())


def test_fixed_route():
    policy, order = FixedRoute(2, pairs=3), torch.randperm(8)
    first = policy.plan(0, order)
    assert originals(first) == set(order[:3].tolist()) == set(first.pairs.tolist())
    assert policy.plan(1, order).routes.tolist() == [2] * 8
    assert len(policy.plan(1, order).pairs) == 0
    assert FixedRoute(0).plan(0, order).routes.tolist() == [0] * 8


def test_images_become_dearer_and_cheaper_again():
    policy, order = SharedRoute(10, route=1, share=0.3, pairs=10), torch.arange(10)
    assert originals(policy.plan(0, order)) == set(range(10))
    for hard in ({4, 5, 6}, {0, 1, 9}, {4, 5, 6}):
        policy.observe(order, torch.tensor([1.0 + 0.01 * i if i in hard else 0.1 for i in range(10)]))
        assert originals(policy.plan(1, order)) == hard


def test_images_never_seen_come_first():
    policy, order = SharedRoute(6, route=1, share=1 / 3, pairs=0), torch.arange(6)
    policy.plan(0, order)
    policy.observe(torch.tensor([0, 1, 2, 3]), torch.ones(4))
    assert originals(policy.plan(1, order)) == {4, 5}


def test_what_the_original_has_not_seen_is_a_little_ahead():
    policy, order = SharedRoute(11, route=1, share=2 / 11, pairs=0), torch.arange(11)
    policy.bought[8:] = True  # those of the highest losses, whose ranks are 0.8, 0.9 and 1
    policy.observe(order, torch.arange(11.0))
    assert originals(policy.plan(1, order)) == {7, 10}  # 0.7 + 0.3 and 1


def test_difficulty_adds_to_the_loss():
    difficulty = torch.tensor([0.0, 0.0, 0.0, 5.0])
    order = torch.arange(4)
    policy = SharedRoute(4, route=1, share=0.25, pairs=0, choice="highest", difficulty=difficulty)
    policy.observe(order, torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert originals(policy.plan(1, order)) == {3}


def test_measured_difficulty_is_how_little_centred_latents_resemble_each_other():
    generator = torch.Generator().manual_seed(0)
    original, cheap = torch.randn(2, 12, 5, 2, 2, generator=generator) + 3
    measured = MeasuredDifficulty(12, weight=2.0)
    assert measured.values.isnan().all()
    measured.learn(torch.arange(12), cheap, original)
    centred = [latents.flatten(1) - original.flatten(1).mean(0) for latents in (cheap, original)]
    expected = [1 - (one @ other / one.norm() / other.norm()).item() for one, other in zip(*centred)]
    torch.testing.assert_close(measured.values, torch.tensor(expected))
    values = measured.values.tolist()
    assert measured.priority().tolist() == pytest.approx([2 * sorted(values).index(value) / 11 for value in values])
    again = MeasuredDifficulty(12, weight=2.0)
    again.restore(measured.state())
    for one in (measured, again):  # later images are centred by the mean of all
        one.learn(torch.tensor([3]), cheap[:1], original[:1] + 1)
    assert again.values.tolist() == measured.values.tolist() != values


def test_measured_difficulty_adds_to_the_loss_once_it_is_known():
    measured, order = MeasuredDifficulty(4, weight=1.0), torch.arange(4)
    policy = SharedRoute(4, route=1, share=0.25, pairs=4, measured=measured)
    assert len(policy.plan(0, order).pairs) == 4
    policy.observe(order, torch.tensor([0.0, 3.0, 2.0, 1.0]))  # ranks 0, 1, 2/3, 1/3
    measured.values = torch.tensor([0.1, 0.0, 0.3, 0.2])  # ranks 1/3, 0, 1, 2/3
    assert originals(policy.plan(1, order)) == {2}


def drawn_counts(losses, draws=4000, **arguments):
    policy, order = SharedRoute(len(losses), route=1, pairs=0, choice="drawn", **arguments), torch.arange(len(losses))
    counts = torch.zeros(len(losses))
    for _ in range(draws):
        policy.observe(order, torch.tensor(losses))
        counts += policy.plan(1, order).routes == 0
    return counts / draws


def test_one_is_drawn_in_proportion_to_its_loss():
    torch.testing.assert_close(
        drawn_counts([1.0, 2.0, 5.0, 0.0], share=0.25), torch.tensor([1.0, 2.0, 5.0, 0.0]) / 8, atol=0.03, rtol=0
    )


def test_two_are_drawn_without_replacement():
    odds, expected = [0.1, 0.2, 0.7], torch.zeros(3)
    for first in range(3):  # all orders of drawing two of three
        for second in set(range(3)) - {first}:
            chance = odds[first] * odds[second] / (1 - odds[first])
            expected[first] += chance
            expected[second] += chance
    torch.testing.assert_close(drawn_counts(odds, share=2 / 3), expected, atol=0.03, rtol=0)


def test_difficulty_multiplies_the_odds():
    difficulty = torch.tensor([3.0, 1.0]).log()
    counts = drawn_counts([1.0, 1.0], share=0.5, difficulty=difficulty)
    torch.testing.assert_close(counts, torch.tensor([0.75, 0.25]), atol=0.03, rtol=0)


def test_permanent_difficulty_decides_alone():
    difficulty = torch.tensor([0.0, 0.2, 0.1, 0.3])
    policy, order = SharedRoute(4, 1, share=0.5, pairs=0, difficulty=difficulty, permanent=True), torch.arange(4)
    for epoch in (1, 2):
        policy.observe(order, torch.tensor([9.0, 1.0, 8.0, 0.0]))
        assert originals(policy.plan(epoch, order)) == {1, 3}


def test_random_share_is_random_and_follows_the_seed():
    def drawn(seed):
        policy, order = SharedRoute(50, route=1, share=0.2, pairs=5, choice="random", seed=seed), torch.arange(50)
        policy.plan(0, order)
        policy.observe(order, torch.arange(50).float())
        return [originals(policy.plan(epoch, order)) for epoch in range(1, 6)]

    one = drawn(0)
    assert [len(part) for part in one] == [10] * 5
    assert len({frozenset(part) for part in one}) == 5
    assert one == drawn(0) != drawn(1)


def test_what_was_bought_is_kept():
    policy = SharedRoute(40, route=1, share=0.5, pairs=0, buy_epochs=2, first=0.11)
    order = torch.randperm(40)
    bought, counts = originals(policy.plan(0, order)), []
    assert bought == set(order[:4].tolist())
    for epoch in range(1, 6):
        policy.observe(order, torch.rand(40))
        now = originals(policy.plan(epoch, order))
        assert bought <= now
        bought = now
        counts.append(len(now))
    assert counts == [4 + 10, 4 + 20, 4 + 20, 4 + 20, 4 + 20]


def test_what_is_bought_fills_whole_passes_until_the_last_time():
    policy = SharedRoute(100, route=1, share=0.47, pairs=0, buy_epochs=4, pass_size=8, first=0.31)
    counts = [policy.plan(epoch, torch.randperm(100)).routes.eq(0).sum().item() for epoch in range(6)]
    assert counts == [32, 32 + 8, 32 + 16, 32 + 32, 32 + 47, 32 + 47]  # of 31, and of 11.75, 23.5 and 35.25


def test_what_is_kept_is_settled_when_the_last_original_is_bought():
    policy, order = SharedRoute(40, route=1, share=0.5, pairs=0, buy_epochs=3, first=0.1), torch.randperm(40)
    plans = [policy.plan(epoch, order) for epoch in range(6)]
    assert [plan.settled for plan in plans] == [False, False, False, True, False, False]
    assert not any(len(plan.pairs) for plan in plans)
    assert originals(plans[2]) < originals(plans[3]) == originals(plans[5])


def test_pairs_are_refitted_among_the_originals():
    policy, order = SharedRoute(40, route=1, share=0.5, pairs=4, refit_pairs=3), torch.arange(40)
    policy.plan(0, order)
    plan = policy.plan(1, order)
    assert len(plan.pairs) == 3
    assert set(plan.pairs.tolist()) <= originals(plan)


# ---------------------------------------------------------------------------------------------- budget


def spent(policy, cheap, router, count, epochs):
    """Cost of all passes, counted from the plans: every route, and the subnet once more for each pair."""
    total = router * count
    for epoch in range(epochs):
        order = torch.randperm(count)
        plan = policy.plan(epoch, order)
        on_original = (plan.routes == 0).sum().item()
        total += on_original + (count - on_original) * cheap + len(plan.pairs) * cheap
        policy.observe(order, torch.rand(count))
    return total / (epochs * count)


@pytest.mark.parametrize(
    ("budget", "cheap", "router", "count", "epochs", "pairs", "refit"),
    [
        (0.4, 0.2, 0.0, 500, 12, 100, 0), (0.4, 0.2, 0.01, 500, 12, 100, 20), (0.6, 0.5, 0.0, 333, 5, 40, 7),
        (0.9, 0.05, 0.1, 100, 3, 200, 0), (0.3, 0.1, 0.0, 1000, 2, 0, 0), (0.4, 0.2, 0.0, 500, 12, 100, 500),
    ],
)
def test_budget_is_met(budget, cheap, router, count, epochs, pairs, refit):
    share = original_share(budget, cheap, router, count, epochs, pairs, refit)
    assert 0 <= share < 1
    policy = SharedRoute(count, 1, share, pairs, refit)
    assert spent(policy, cheap, router, count, epochs) == pytest.approx(budget, abs=1 / count)


@pytest.mark.parametrize("refit", [0, 30, 500])
@pytest.mark.parametrize(("original", "cheap"), [(1.0, 0.2), (1.1, 0.27), (0.9, 0.15)])
def test_budget_is_met_whatever_passes_turn_out_to_cost(original, cheap, refit):
    count, epochs, pairs, router, asked = 500, 12, 50, 0.01, 0.4
    budget = Budget(asked * epochs * count, count, epochs, refit)
    share = original_share(asked, 0.2, router, count, epochs, pairs, refit)
    policy, spent = SharedRoute(count, 1, share, pairs, refit, budget=budget), router * count
    for epoch in range(epochs):
        order = torch.randperm(count)
        if epoch:
            policy.account(spent, {0: original, 1: cheap})
        plan = policy.plan(epoch, order)
        policy.observe(order, torch.rand(count))
        on_original = (plan.routes == 0).sum().item()
        spent += on_original * original + (count - on_original + len(plan.pairs)) * cheap
    assert spent / (epochs * count) == pytest.approx(asked, abs=0.002)
    assert policy.describe() == f"subnet 1, {100 * share:.0f} % original"  # the same from start to end


def test_a_budget_overspent_buys_no_more_originals():
    budget = Budget(total=100.0, count=10, epochs=20, refit=3)
    assert budget.share(10, spent=99.0, original=1.0, cheap=0.2) == 0.0
    assert budget.share(19, spent=50.0, original=1.0, cheap=0.2) == 1.0


def test_a_large_budget_buys_originals_for_all():
    assert original_share(1.0, 0.1, 0.0, 100, 3, 10, 0) == 1.0
    assert sum(cached_shares(1.0, 0.0, 0.0)) == pytest.approx(1.0)
    assert cached_shares(1.0, 1.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize(("budget", "cheap", "router"), [(0.6, 0.2, 0.0), (0.5, 0.1, 0.02), (0.9, 0.3, 0.0)])
def test_cached_budget_is_met(budget, cheap, router):
    count, epochs = 400, 9
    first, share = cached_shares(budget, cheap, router)
    assert first * (1 - cheap) == pytest.approx(2 * share)  # two thirds of what is left are spent at first
    policy = SharedRoute(count, 1, share, 0, buy_epochs=3, first=first)
    paid = {0: set(), 1: set()}
    for epoch in range(epochs):
        plan = policy.plan(epoch, torch.randperm(count))
        paid[0] |= originals(plan)
        if epoch == 0:
            paid[1] = set(range(count)) - originals(plan)
        policy.observe(torch.arange(count), torch.rand(count))
    total = len(paid[0]) + cheap * len(paid[1]) + router * count
    assert total / count == pytest.approx(budget, abs=1 / count)


def test_budget_too_small_names_what_would_do():
    with pytest.raises(ValueError, match=r"routing\.cost: 0\.2 does not pay .* take 0\.3[0-9] alone") as error:
        original_share(0.2, 0.3, 0.0, 1000, 10, 100, 0)
    assert "routing.pairs" in str(error.value)
    needed = float(str(error.value).split("take ")[1].split()[0])
    assert original_share(needed + 0.01, 0.3, 0.0, 1000, 10, 100, 0) >= 0


def test_cached_budget_too_small_names_what_would_do():
    with pytest.raises(ValueError, match=r"routing\.cached_cost: 0\.3 does not pay .* take 0\.45 alone.*cached_subnet"):
        cached_shares(0.3, 0.4, 0.05)


@pytest.mark.parametrize("cost", [1.0, 0.99])
def test_subnet_that_is_no_cheaper_is_never_a_division_by_zero(cost):
    try:
        assert 0 <= original_share(cost, 1.0, 0.0, 100, 3, 0, 0) <= 1
    except ValueError as error:
        assert math.isclose(cost, 0.99) and "routing.cost" in str(error)
