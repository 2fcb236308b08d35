"""What a family is worth on target tasks: the accuracy lost by a head that only ever saw a subnet's latents.

For each subnet a linear head is trained on its latents alone, uncorrected, in the training loop of every method, and
tested on the original's latents. The target data are measured on here, never seen by generation.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from .backbones import Backbone
from .config import Study
from .data import Task, load_task
from .engines import prepare
from .pet import split
from .routing import FixedRoute
from .subnets import Family, fidelity, latents_of
from .training import Plan, accuracy, fit

SEEDS = (0, 1, 2)


def transfer(
    family: Family, backbone: Backbone, public: Tensor, targets: Sequence[Study], seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """Measure a family on target tasks.

    Args:
        family: cut before the head, on the CPU.
        backbone: the original.
        public: uint8, shape (M, 3, R, R): held-out public images, whose mean latent centres the fidelity.
        targets: studies of the same backbone and resolution; of each, data set, epochs, batch size, learning rate of
            `pet` (or what tuning on the validation split chooses from `learning_rates`) are used.
        seeds: of the heads and the order of images.

    Returns:
        A row a subnet and data set: backbone, subnet, width, depth, resolution, relative_macs, relative_latency,
        fidelity_cloud, dataset, fidelity, transfer_accuracy and transfer_std (percent, over the seeds),
        reference_accuracy (percent, the original's).

    Raises:
        ValueError: a target is of another backbone or resolution, or not of a head.
    """
    runners = [prepare(network, "eager", public[:1]) for network in family.networks]
    centre = latents_of(runners[0], public).mean(0, keepdim=True)
    rows = []
    for study in targets:
        asked = (study.backbone.name, study.backbone.resolution, study.pet.kind)
        if asked != (backbone.name, backbone.resolution, "head"):
            raise ValueError(f"{study.name}: {asked} is not the family's {backbone.name}, {backbone.resolution}, head")
        torch.manual_seed(study.seed)
        heads = _Heads(study, backbone, load_task(study), runners[0])
        for index, (facts, runner) in enumerate(zip(family.manifest.subnets, runners)):
            latents = latents_of(runner, heads.images)
            near, _ = fidelity(latents, heads.original, centre)
            reached = pd.Series([heads.test_accuracy(latents, seed) for seed in seeds])
            rows.append({
                "backbone": backbone.name, "subnet": index, "width": facts.width, "depth": facts.depth,
                "resolution": facts.resolution, "relative_macs": round(facts.relative_macs, 4),
                "relative_latency": facts.relative_latency, "fidelity_cloud": facts.fidelity,
                "dataset": study.data.name, "fidelity": round(near.mean().item(), 4),
                "transfer_accuracy": round(reached.mean(), 3), "transfer_std": round(reached.std(), 3),
            })
    table = pd.DataFrame(rows)
    reference = table[table["subnet"] == 0].set_index("dataset")["transfer_accuracy"]
    return table.assign(reference_accuracy=table["dataset"].map(reference))


class _Heads:
    """Linear heads of one task, trained on given latents and tested on the original's."""

    def __init__(self, study: Study, backbone: Backbone, task: Task, original) -> None:
        self.study, self.backbone, self.task = study, backbone, task
        self.indices = torch.cat([task.splits["train"], task.splits["validation"]])
        self.images = task.images[self.indices]
        self.original = latents_of(original, self.images)
        self.tested = latents_of(original, task.images[task.splits["test"]])
        self.learning_rate = study.training.learning_rate.get("pet") or self._tuned()

    def test_accuracy(self, latents: Tensor, seed: int) -> float:
        """Percent, of a head trained on these latents of all training images."""
        head = self._train(latents, self.task.labels[self.indices], self.learning_rate, seed)
        return self._accuracy(head, self.tested, self.task.splits["test"])

    def _tuned(self) -> float:
        splits, reached = self.task.splits, {}
        count = len(splits["train"])
        for rate in self.study.training.learning_rates:
            head = self._train(self.original[:count], self.task.labels[splits["train"]], rate, self.study.seed)
            reached[rate] = self._accuracy(head, self.original[count:], splits["validation"])
        return max(reached, key=reached.get)

    def _train(self, latents: Tensor, labels: Tensor, learning_rate: float, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        parts = split(self.backbone, self.study.pet, len(self.task.classes), seed)
        plan = Plan(parts, {0: nn.Identity()}, {0: nn.Identity()}, FixedRoute(0))
        quiet = self.study.training.model_copy(update={"evaluate_every": self.study.training.epochs})
        fit(plan, latents, labels, quiet, learning_rate, seed, lambda suffix: {}, description=self.study.data.name)
        return parts.suffix.eval()

    def _accuracy(self, head: nn.Module, latents: Tensor, indices: Tensor) -> float:
        return accuracy(head, lambda chosen: latents[chosen], self.task.labels[indices], torch.arange(len(indices)))
