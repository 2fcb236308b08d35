"""What needs no download."""

import numpy as np
import torch

from piebridge import embedded


def test_characters_are_the_same_for_the_same_seed():
    one, same, other = (embedded.render_characters(6, 32, seed) for seed in (0, 0, 1))
    assert one.images.shape == (6, 32, 32, 3)
    assert one.images.dtype == np.uint8
    assert np.array_equal(one.images, same.images)
    assert np.array_equal(one.labels, same.labels)
    assert not np.array_equal(one.images, other.images)


def test_characters_are_legible_and_difficulties_are_shares():
    characters = embedded.render_characters(40, 32, 0)
    assert characters.images.reshape(40, -1).std(1).min() > 5
    assert characters.labels.min() >= 0
    assert characters.labels.max() < len(embedded.CHARACTERS)
    assert 0 <= characters.difficulty.min() < 0.2 < 0.8 < characters.difficulty.max() <= 1


def test_difficult_characters_are_noisier():
    characters = embedded.render_characters(200, 32, 0)
    roughness = np.abs(np.diff(characters.images[..., 0].astype(float), axis=2)).mean((1, 2))
    assert np.corrcoef(roughness, characters.difficulty)[0, 1] > 0.3


def test_typefaces_hold_letters():
    assert len(embedded.typefaces()) > 10


def test_handwritten_digits():
    images, labels = embedded.handwritten_digits()
    assert images.shape == (1797, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert sorted(set(labels.tolist())) == list(range(10))


def test_small_network():
    network = embedded.SmallResNet(num_classes=5).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert network(torch.zeros(2, 3, 24, 24)).shape == (2, 5)
