"""The window: whatever batches, caches and routes, an image's latent is its own."""

import pytest
import torch

from piebridge.costs import Stopwatch
from piebridge.crops import RandomViews
from piebridge.latents import LatentSource
from piebridge.routing import Correction, Residuals

NOBODY = torch.empty(0, dtype=torch.int64)
IMAGES = torch.randint(0, 256, (23, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A runner that multiplies mean colours by its factor and remembers the sizes of its batches."""

    def __init__(self, factor, maps=False):
        self.factor, self.maps, self.sizes = factor, maps, []

    def __call__(self, images):
        self.sizes.append(len(images))
        return images.float() * self.factor if self.maps else images.float().mean((2, 3)) * self.factor


def source_of(maps=False, **options):
    runners = {0: Recorder(1.0, maps), 2: Recorder(3.0, maps)}
    stopwatch = Stopwatch()
    return LatentSource(IMAGES, runners, 4, "cpu", stopwatch, **options), runners, stopwatch


def expected_latents(indices, routes, maps=False):
    latents = IMAGES.float() if maps else IMAGES.float().mean((2, 3))
    factors = torch.where(routes == 0, 1.0, 3.0)
    return latents[indices] * factors.view(-1, *[1] * (latents.dim() - 1))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_each_image_gets_the_latent_of_its_route(cached, maps):
    source, _, _ = source_of(maps, cached=cached)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        indices = torch.randperm(len(IMAGES), generator=generator)[:11]
        routes = torch.randint(0, 2, (11,), generator=generator) * 2
        latents = source.window(indices, routes, NOBODY, 2)
        torch.testing.assert_close(latents, expected_latents(indices, routes, maps))


def test_a_route_runs_in_its_own_batches():
    source, runners, stopwatch = source_of()
    source.window(torch.arange(12), torch.tensor([0, 2] * 5 + [0, 0]), NOBODY, 2)
    assert runners[0].sizes == [4, 4]  # the last three are filled up: few sizes, for each costs a new kernel
    assert runners[2].sizes == [4, 4]
    assert source.computed == {0: 7, 2: 5}
    assert set(stopwatch.seconds) == {"data", "prefix"}


def test_a_cached_latent_is_computed_once():
    source, runners, _ = source_of(cached=True)
    for _ in range(3):
        source.window(torch.arange(10), torch.zeros(10, dtype=torch.int64), NOBODY, 0)
    assert source.computed[0] == 10
    source.window(torch.arange(5, 15), torch.zeros(10, dtype=torch.int64), NOBODY, 0)
    assert source.computed[0] == 15
    source.window(torch.arange(5), torch.full((5,), 2), NOBODY, 2)
    assert source.computed == {0: 15, 2: 5}
    assert runners[0].sizes == [4, 4, 4, 4, 4]


def test_what_is_kept_ahead_is_in_whole_passes_and_computed_once():
    source, runners, _ = source_of(cached=True)
    source.keep(0, NOBODY)
    assert not runners[0].sizes
    source.keep(0, torch.arange(8))
    for window in torch.arange(10).split(5):
        source.window(window, torch.zeros(len(window), dtype=torch.int64), NOBODY, 2)
    assert runners[0].sizes == [4, 4, 4]  # the last is the last window's two images, filled up
    assert source.computed == {0: 10, 2: 0}


@pytest.mark.parametrize("maps", [False, True])
def test_what_is_kept_of_a_subnet_is_corrected_once(maps):
    source, _, _ = source_of(maps, cached=True, correction=Correction(0))
    everybody, routes = torch.arange(23), torch.full((23,), 2)
    routes[:4] = 0  # drawn at first: no pairs
    before = source.window(everybody, routes, NOBODY, 2)
    assert torch.equal(before, expected_latents(everybody, routes, maps))  # and not corrected
    routes[4:20] = 0
    source.keep(0, everybody[:20])
    source.correct(2)
    wanted = IMAGES.float() if maps else IMAGES.float().mean((2, 3))
    for _ in range(2):
        after = source.window(everybody, routes, NOBODY, 2)
        assert torch.equal(after[:20], wanted[:20])
        assert (after[20:] - wanted[20:]).norm() < 0.1 * (before[20:] - wanted[20:]).norm()  # three times too large
    assert source.computed == {0: 20, 2: 19}
    assert sum(len(pairs) for pairs, _ in source.correction.pairs[2]) == 16 * (16 if maps else 1)  # 16 positions


def test_without_pairs_nothing_that_is_kept_is_corrected():
    source, _, _ = source_of(cached=True, correction=Correction(0))
    everybody, routes = torch.arange(23), torch.full((23,), 2)
    routes[:4] = 0
    before = source.window(everybody, routes, NOBODY, 2)
    source.correct(2)
    assert torch.equal(source.window(everybody, routes, NOBODY, 2), before)


def test_a_cache_beyond_memory_is_mapped(tmp_path):
    images = torch.randint(0, 256, (6, 3, 128, 128), dtype=torch.uint8)
    options = {"cached": True, "memory_mib": 1, "scratch": tmp_path / "scratch"}
    source = LatentSource(images, {0: lambda batch: batch.float()}, 2, "cpu", Stopwatch(), **options)
    for _ in range(2):
        latents = source.window(torch.tensor([5, 0, 3]), torch.zeros(3, dtype=torch.int64), NOBODY, 0)
        assert torch.equal(latents, images[[5, 0, 3]].float())
    assert (tmp_path / "scratch").is_dir()
    assert source.computed[0] == 3


def test_pairs_are_the_same_images_latents():
    correction = Correction(0)
    source, _, stopwatch = source_of(correction=correction)
    indices, pairs = torch.tensor([7, 1, 4, 9]), torch.tensor([4, 7, 20])
    source.window(indices, torch.zeros(4, dtype=torch.int64), pairs, 2)
    cheap, original = correction.pairs[2][0]
    assert torch.equal(original, IMAGES[[7, 4]].float().mean((2, 3)))
    torch.testing.assert_close(cheap, 3 * original)
    assert source.computed == {0: 4, 2: 2}
    assert "correction" in stopwatch.seconds


def test_pairs_are_the_same_views_latents():
    views, correction, stopwatch = RandomViews(IMAGES, torch.arange(23), 3, 0.3, 0), Correction(0), Stopwatch()
    source = LatentSource(views, {0: Recorder(1.0), 2: Recorder(3.0)}, 4, "cpu", stopwatch, correction=correction)
    for epoch in range(3):
        views.start(epoch)
        source.window(torch.arange(23), torch.zeros(23, dtype=torch.int64), torch.arange(5, 9), 2)
    pairs = [(cheap.clone(), original.clone()) for cheap, original in correction.pairs[2]]
    for cheap, original in pairs:
        torch.testing.assert_close(cheap, 3 * original)
    assert not torch.equal(pairs[0][1], pairs[1][1])
    assert stopwatch.seconds["data"] > 0


def test_only_subnets_are_corrected():
    correction = Correction(0)
    correction.maps[2] = (torch.zeros(3, 3), torch.full((3,), 5.0))
    source, _, _ = source_of(correction=correction)
    latents = source.window(torch.arange(4), torch.tensor([0, 2, 0, 2]), NOBODY, 2)
    assert torch.equal(latents[::2], IMAGES[[0, 2]].float().mean((2, 3)))
    assert (latents[1::2] == 5).all()


def test_what_a_pair_missed_is_given_back_to_its_image():
    correction, residuals = Correction(0), Residuals(23)
    correction.maps[2] = (torch.eye(3), torch.zeros(3))
    source, _, _ = source_of(correction=correction, residuals=residuals)
    everyone, chosen = torch.arange(6), torch.tensor([1, 4])
    for _ in range(2):  # the same view twice: all of it is given back
        source.window(everyone, torch.zeros(6, dtype=torch.int64), chosen, 2)
    latents = source.window(everyone, torch.full((6,), 2), NOBODY, 2)
    original = IMAGES[:6].float().mean((2, 3))
    torch.testing.assert_close(latents[chosen], original[chosen])
    others = torch.tensor([0, 2, 3, 5])
    torch.testing.assert_close(latents[others], 3 * original[others])


def test_what_latents_cost_is_accounted_by_price_or_by_the_clock():
    source, _, stopwatch = source_of(prices={0: 1.0, 2: 0.25})
    source.window(torch.arange(8), torch.tensor([0, 2, 0, 2, 2, 2, 0, 2]), torch.tensor([2]), 2)
    assert source.computed == {0: 3, 2: 5}  # without a correction nothing is paired
    assert source.account() == (3 + 5 * 0.25, {0: 1.0, 2: 0.25})
    assert sum(source.seconds.values()) == pytest.approx(stopwatch.seconds["prefix"])
    source.by_clock, source.seconds = True, {0: 6.6, 2: 2.2}
    spent, prices = source.account()
    assert prices == pytest.approx({0: 1.0, 2: 0.2})
    assert spent == pytest.approx(8.8 / 2.2)
    source.whole_passes = [2.0, 9.0, 1.0]  # in units of whole passes, passes of fewer images turn out dearer
    spent, prices = source.account()
    assert prices == pytest.approx({0: 1.1, 2: 0.22})
    assert spent == pytest.approx(8.8 / 2.0)
    cheap, _, _ = source_of(prices={0: 1.0, 2: 0.25}, by_clock=True)
    assert cheap.account() == (0.0, {0: 1.0, 2: 0.25})  # nothing is known yet: as expected
    cheap.window(torch.arange(8), torch.full((8,), 2), torch.tensor([2]), 2)
    cheap.seconds = {0: 0.0, 2: 4.0}  # no original has been run: it is inferred from the subnet's price
    assert cheap.account() == (2.0, {0: 1.0, 2: 0.25})
    other, _, _ = source_of(prices={0: 1.0, 2: 0.25}, by_clock=True)
    other.restore(source.state())
    assert other.account() == source.account()


def test_whole_passes_of_the_original_are_the_unit():
    source, _, _ = source_of(prices={0: 1.0, 2: 0.25}, by_clock=True)
    source.batch_size = 4
    source.window(torch.arange(20), torch.tensor([0] * 11 + [2] * 9), NOBODY, 2)
    assert len(source.whole_passes) == 2 and min(source.whole_passes) > 0  # of eleven images two passes of four
    assert 4 * sum(source.whole_passes) < source.seconds[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 32])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 22, 23])
def test_passes_come_in_few_sizes(size, count):
    source, runners, _ = source_of()
    source.batch_size = size
    latents = source.window(torch.arange(count), torch.zeros(count, dtype=torch.int64), NOBODY, 0)
    torch.testing.assert_close(latents, expected_latents(torch.arange(count), torch.zeros(count, dtype=torch.int64)))
    sizes = runners[0].sizes
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= size
    assert len(set(sizes)) <= 4  # 32, 16, 8, 4
    assert count <= sum(sizes) < count + min(4, size)
    assert source.computed == {0: count, 2: 0}  # fillers are not counted
