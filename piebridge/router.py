"""The router: a very small network that reads each image once and says how difficult it is.

Learned on the cloud side, on public images, end to end through a straight-through Gumbel-softmax; in use it draws
nothing: the same image always gets the same answer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .backbones import IMAGENET_MEAN, IMAGENET_STD, Input
from .config import RouterConfig
from .subnets import FamilyError


class Router(nn.Module):
    """Two strided convolutions and a linear layer on a small image.

    Args:
        resolution: side of the image it reads, pixels.
        channels: of the first convolution; the second has twice as many.
        relative_costs: shape (S,): cost of each member of the family relative to the original's.
    """

    def __init__(self, resolution: int, channels: int, relative_costs: list[float]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Input(resolution, IMAGENET_MEAN, IMAGENET_STD),
            nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.BatchNorm2d(2 * channels),
            nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(8 * channels, len(relative_costs)),
        )
        self.register_buffer("relative_costs", torch.tensor(relative_costs, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the family's members, shape (B, S), of uint8 images, shape (B, 3, H, W)."""
        return self.body(images)

    def difficulty(self, images: Tensor) -> Tensor:
        """The cost that an image deserves, relative to the original's, shape (B,), in (0, 1]; nothing is drawn."""
        with torch.inference_mode():
            return self(images).softmax(1) @ self.relative_costs


def train_router(
    images: Tensor, losses: Tensor, relative_costs: list[float], config: RouterConfig, seed: int
) -> Router:
    """Learn to send each image to a member that serves it, at a wanted mean cost.

    Minimises the chosen member's loss plus `cost_weight` times the squared gap between mean cost and `target_cost`.
    The choice is a hard Gumbel-softmax sample with straight-through gradients; its temperature falls from 2 to 0.5.

    Args:
        images: uint8, shape (N, 3, H, W): public images.
        losses: shape (N, S): what each member loses on each image against the original (the first column, zeros).
        relative_costs: shape (S,).
        config: sizes and schedule.
        seed: of the initial values, batches and Gumbel noise.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        router = Router(config.resolution, config.channels, relative_costs)
        small = functional.interpolate(images, (config.resolution,) * 2, mode="bilinear", antialias=True)
        scale = losses[:, 1:].std().clamp(min=1e-6)
        optimizer = torch.optim.AdamW(router.parameters(), lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps)
        for step in tqdm(range(config.steps), desc="training the router", disable=config.steps < 100):
            chosen = torch.randint(len(small), (config.batch_size,))
            temperature = 2.0 - 1.5 * step / config.steps
            choice = functional.gumbel_softmax(router(small[chosen]), tau=temperature, hard=True)
            cost = (choice @ router.relative_costs).mean()
            served = (choice * losses[chosen]).sum(1).mean() / scale
            (served + config.cost_weight * (cost - config.target_cost) ** 2).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return router.requires_grad_(False).eval()


def member_losses(latents: list[Tensor], tail: nn.Module) -> Tensor:
    """What each member of a family loses on each image: 1 - centred cosine, plus KL of the class probabilities.

    Args:
        latents: a tensor (N, ...) a member, the original's first.
        tail: the original's layers behind the cut, latents to logits.

    Returns:
        Shape (N, S); the first column is zero.
    """
    from .subnets import fidelity

    columns = [torch.zeros(len(latents[0]))]
    with torch.inference_mode():
        wanted = torch.cat([tail(batch).log_softmax(1) for batch in latents[0].split(256)])
        for member in latents[1:]:
            given = torch.cat([tail(batch).log_softmax(1) for batch in member.split(256)])
            divergence = functional.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
            columns.append(1 - fidelity(member, latents[0])[0] + divergence)
    return torch.stack(columns, dim=1)


def save_router(router: Router, config: RouterConfig, folder: Path) -> None:
    """Save the router beside its family as router.safetensors, its sizes in the file's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"resolution": config.resolution, "channels": config.channels}
    partial = folder / ".router.safetensors"
    tensors = {key: value.contiguous() for key, value in router.state_dict().items()}
    save_file(tensors, partial, metadata={"router": json.dumps(sizes)})
    partial.chmod(0o644)  # the library makes files that only their owner can read
    partial.replace(folder / "router.safetensors")


def load_router(folder: Path) -> Router:
    """Load a family's router.

    Raises:
        FamilyError: absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "router.safetensors"
    try:
        with safe_open(path, "pt") as file:
            sizes = json.loads(file.metadata()["router"])
        tensors = load_file(path)
        router = Router(sizes["resolution"], sizes["channels"], tensors["relative_costs"].tolist())
        router.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise FamilyError(f"{path}: no usable router ({error}); notebook 03 trains one") from error
    return router.requires_grad_(False).eval()
