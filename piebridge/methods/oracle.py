"""PieBridge with routes by the true latent similarity: the original for the images that the subnet misses most.

What a router that reads difficulty off an image could reach at best, at the budget of `random` and `piebridge`. To
know the similarity it runs every image through both networks before training: an oracle's privilege, whose cost is
counted neither in the training time nor in the operations, and which no device would have.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..routing import ranks
from ..subnets import fidelity, latents_of
from ..training import Plan
from .setting import Setting, cheap_route, shared_plan


def plan(setting: Setting) -> Plan:
    return shared_plan(setting, difficulty=ranks(1 - true_similarity(setting)))


def true_similarity(setting: Setting) -> Tensor:
    """Cosine similarity of the cheap subnet's latents, not corrected, with the original's, shape (N,), on the CPU.

    Both are centred by the original's mean latent over the training images. Latents are computed in batches and not
    kept, so the original runs twice.
    """
    training = setting.study.training
    original, cheap = (setting.family.networks[index].to(training.device) for index in (0, cheap_route(setting)))

    def latents(network: nn.Module) -> Iterator[Tensor]:
        return (latents_of(network, batch.to(training.device)) for batch in setting.images.split(training.prefix_batch))

    mean = sum(batch.sum(0, keepdim=True) for batch in latents(original)) / len(setting.images)
    near = [fidelity(ours, theirs, mean)[0] for ours, theirs in zip(latents(cheap), latents(original))]
    return torch.cat(near).cpu()
