"""Alignment: the subnets learn to give the original's latents, on public images.

All members are trained together against one pass of the original; some may take turns. Source of the idea:
pre-training-assisted latent space alignment (PieBridge, SenSys 2024, appendix A.1); losses, schedule and engineering
are this project's.

On a GPU a step of many small networks is thousands of short kernels, and launching them one by one would take longer
than running them. So a step is recorded as a CUDA graph, after some plain ones, and replayed, each member in a stream
of its own; where recording fails, kernels go on being launched one by one. There is a graph for each set of members
that take part together, and one for the update of the weights. First convolutions and frozen batch norms are folded
(see `folding`).
Several GPUs (torchrun) share each batch; what they exchange in a step is one mean of one flat tensor of gradients.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .checkpoints import Checkpoint
from .config import CloudConfig
from .crops import random_crops
from .folding import fold_norms, fold_stem, unfold_norms, unfold_stem
from .goal import Goal, attention, stage_ends
from .updates import Update

HISTORY = ["step", "seconds", "images_per_second", "member", "loss"]
MOMENT_IMAGES = 2048  # crops from which mean and covariance of the latents are known
PRECISION = torch.bfloat16  # on a GPU; range matters more than digits, so no loss scaling is needed
WARM_UP = 0.1  # share of the steps in which the learning rate rises


def align(
    members: Sequence[nn.Module], prefix: nn.Module, tail: nn.Module, images: Tensor, resolution: int,
    config: CloudConfig, seed: int, checkpoint: Optional[Path] = None, every: Sequence[int] = (),
) -> pd.DataFrame:
    """Train the members in place until their latents are near the original's.

    What is trained of a member is what requires a gradient when it comes in. Batch norm learns from batches at first
    and is frozen for the last `loss.frozen_statistics` of the steps, so that what is aligned is what will be used.
    Under torchrun each process takes its part of every batch; images and crops are drawn for the whole batch with the
    same seed everywhere, so the losses are those of one process but for batch norm, whose statistics are of a part.

    Args:
        members: subnets, uint8 or float images in [0, 255] to latents; on the device of `config`.
        prefix: the original, frozen; stays untouched.
        tail: the original's layers behind the cut, latents to logits, frozen.
        images: uint8, shape (N, 3, S, S), anywhere; batches are cropped on the members' device.
        resolution: side of the crops, pixels.
        config: steps, batch_size, learning_rate, optimizer, loss, crop_area, settled_crop_area, mixed, device.
        seed: of batches and crops.
        checkpoint: file in which the state is kept while it runs; a run that finds it goes on from there.
        every: in one of how many steps each member takes part; default: in every step.

    Returns:
        A row a logged step and member: step, seconds, images_per_second, member (index from 1), loss (of the last step
        in which the member took part; NaN before its first).

    Raises:
        ValueError: the batch cannot be shared evenly among the processes, or `every` is not one number a member.
    """
    every = every or [1] * len(members)
    if len(every) != len(members):
        raise ValueError(f"every: {len(every)} numbers for {len(members)} members; give one for each")
    processes = PartialState(cpu=config.device == "cpu")
    if not config.steps or not members:
        return pd.DataFrame(columns=HISTORY)
    device = processes.device if config.device == "cuda" else torch.device(config.device)
    if config.batch_size % processes.num_processes:
        raise ValueError(
            f"cloud.batch_size: {config.batch_size} images cannot be shared by {processes.num_processes} processes"
        )
    images = images.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    prefix, tail = (
        copy.deepcopy(network).to(device).to(memory_format=torch.channels_last) for network in (prefix, tail)
    )
    members = [member.to(device).to(memory_format=torch.channels_last) for member in members]
    _make_leaves(members)
    if device.type == "cuda":
        for network in (prefix, *members):
            fold_stem(network)
    fold_norms(prefix)
    sample = images[torch.randint(len(images), (MOMENT_IMAGES,), generator=generator, device=device)]
    goal = Goal.of(prefix, random_crops(sample, resolution, config.crop_area, generator), config.loss)
    step = _Step(members, prefix, tail, goal, config, resolution, device, processes)
    state = Checkpoint(checkpoint, enabled=processes.is_main_process)
    history, first, earlier = state.load(step.tensors(), generator) or ([], 0, 0.0)

    frozen_from = round((1 - config.loss.frozen_statistics) * config.steps)
    part = (processes.process_index, processes.num_processes)
    begin, logged = time.perf_counter(), max(1, config.steps // 50)
    last_step, last_seconds = first, earlier
    progress = tqdm(
        total=config.steps * config.batch_size, initial=first * config.batch_size, desc="aligning subnets",
        unit=" images", unit_scale=True, mininterval=1.0, disable=not processes.is_main_process,
    )
    for number in range(first, config.steps):
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator, device=device)
        learning_statistics = number < frozen_from
        area, mixed = config.crop_area, config.mixed
        if not learning_statistics and config.settled_crop_area is not None:
            area, mixed = config.settled_crop_area, 0.0
        batch = random_crops(images[chosen], resolution, area, generator, mixed, part)
        rate = one_cycle(number / config.steps) * config.learning_rate
        losses = step(batch, rate, learning_statistics, taking_part(number, every))
        if number % logged == 0 or number == config.steps - 1:
            mean_losses = reduce(losses.clone(), "mean").tolist()  # reading them waits for the device
            seconds = earlier + time.perf_counter() - begin
            speed = (number + 1 - last_step) * config.batch_size / max(seconds - last_seconds, 1e-9)
            history += [(number, seconds, speed, index, loss) for index, loss in enumerate(mean_losses, start=1)]
            last_step, last_seconds = number + 1, seconds
        progress.update(config.batch_size)
        if state.due():
            state.save(step.tensors(), generator, history, number + 1, earlier + time.perf_counter() - begin)
    progress.close()
    state.close()
    if state.enabled and first < config.steps:  # what comes after takes a minute or two
        state.save(step.tensors(), generator, history, config.steps, last_seconds)
        state.close()
    for member in members:
        unfold_norms(member)
        unfold_stem(member)
        member.requires_grad_(False).eval()
    return pd.DataFrame(history, columns=HISTORY)


def one_cycle(progress: float) -> float:
    """Learning rate relative to its peak: a linear rise, then half a cosine to zero; `progress` in [0, 1)."""
    if progress < WARM_UP:
        return max(0.04, progress / WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def taking_part(step: int, every: Sequence[int]) -> tuple[int, ...]:
    """Indices of the members that step number `step`, from 0, trains; those in turns begin one step after another."""
    turn, indices = 0, []
    for index, period in enumerate(every):
        if (step - turn) % period == 0:
            indices.append(index)
        turn += period > 1
    return tuple(indices)


def _run(network: nn.Sequential, images: Tensor, watched: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Output of the network, and that of the watched blocks."""
    seen = []
    for name, block in network.named_children():
        images = block(images)
        if name in watched:
            seen.append(images)
    return images, seen


class _Step:
    """One step: forward and backward of those who take part, mean of the gradients over the processes, update."""

    def __init__(self, members, prefix, tail, goal, config: CloudConfig, resolution: int, device, processes) -> None:
        self.members, self.prefix, self.tail, self.goal = members, prefix, tail, goal
        self.config, self.device, self.processes = config, device, processes
        self.on_gpu = device.type == "cuda"
        size = config.batch_size // processes.num_processes
        self.batch = torch.zeros(size, 3, resolution, resolution, device=device).contiguous(
            memory_format=torch.channels_last
        )
        self.losses = torch.full((len(members),), torch.nan, device=device)
        self.trained = [[weight for weight in member.parameters() if weight.requires_grad] for member in members]
        # members can have weights in common, which are trained once, by the sum of their gradients
        unique = list(dict.fromkeys(weight for weights in self.trained for weight in weights))
        self.flat = _flat_gradients(unique)
        self.watched = [[] for _ in range(len(members) + 1)]
        if config.loss.features:
            self.watched = [stage_ends(network, self.batch[:1]) for network in (prefix, *members)]
        self.streams = [torch.cuda.Stream() for _ in members] if self.on_gpu else [None] * len(members)
        self._share_start()
        self.optimizer = Update(unique, config.optimizer)
        self.update = _Replayed(self.optimizer, self.on_gpu)
        # under the names that the layers have before they are folded
        self.named = {f"member.{i}.{key}": value for i, member in enumerate(members)
                      for key, value in member.state_dict().items()}
        self.learning_statistics: Optional[bool] = None

    def __call__(
        self, batch: Tensor, learning_rate: float, learning_statistics: bool, indices: tuple[int, ...]
    ) -> Tensor:
        """Take a step with these members; returns all losses, shape (members,), which the next step overwrites."""
        self.batch.copy_(batch)
        if learning_statistics != self.learning_statistics:
            self.learning_statistics = learning_statistics
            if not learning_statistics:
                self._share_statistics()
            for member in self.members:
                member.train(learning_statistics)
                if not learning_statistics:
                    fold_norms(member)
            self.computes: dict[tuple[int, ...], _Replayed] = {}
        if indices not in self.computes:
            self.computes[indices] = _Replayed(functools.partial(self._compute, indices), self.on_gpu)
        self.computes[indices]()
        if self.processes.num_processes > 1:
            self.flat.copy_(reduce(self.flat, "mean"))
        self.optimizer.learning_rate.fill_(learning_rate)
        self.update()
        return self.losses

    def _compute(self, indices: Sequence[int]) -> None:
        autocast = torch.autocast(self.device.type, PRECISION, enabled=self.on_gpu, cache_enabled=False)
        with torch.no_grad():
            with autocast:
                latents, maps = _run(self.prefix, self.batch, self.watched[0])
                logits = self.tail(latents)
            wanted, log_probabilities = self.goal.place(latents), logits.float().log_softmax(1)
            looks = [attention(seen, min(seen.shape[-1], 4)) for seen in maps]
        current, gradients = torch.cuda.current_stream() if self.on_gpu else None, {}
        for index in indices:
            member, stream = self.members[index], self.streams[index]
            if stream is not None:
                stream.wait_stream(current)
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                with autocast:
                    latents, maps = _run(member, self.batch, self.watched[index + 1])
                    logits = self.tail(latents) if self.config.loss.kl else None
                loss = self.goal.latent_loss(latents, wanted)
                if logits is not None:
                    loss = loss + self.config.loss.kl * functional.kl_div(
                        logits.float().log_softmax(1), log_probabilities, reduction="batchmean", log_target=True
                    )
                for seen, look in zip(maps, looks):
                    near = functional.mse_loss(attention(seen, round(look.shape[1] ** 0.5)), look, reduction="sum")
                    loss = loss + self.config.loss.features * near / len(look)
                gradients[index] = torch.autograd.grad(loss, self.trained[index])
                self.losses[index].copy_(loss.detach())
        if self.on_gpu:
            for index in indices:
                current.wait_stream(self.streams[index])
        self.flat.zero_()
        for index, own in gradients.items():
            torch._foreach_add_([weight.grad for weight in self.trained[index]], list(own))

    def tensors(self) -> dict[str, Tensor]:
        """All that changes while training, by name; shared, not copied."""
        return self.named | self.optimizer.tensors() | {"losses": self.losses}

    def _share_start(self) -> None:
        """All processes start from the first one's weights."""
        if self.processes.num_processes > 1:
            for member in self.members:
                for tensor in member.state_dict().values():
                    tensor.copy_(broadcast(tensor))

    def _share_statistics(self) -> None:
        """Batch norm's running statistics, each process's own while it learned them, become their mean."""
        if self.processes.num_processes > 1:
            for member in self.members:
                for buffer in member.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(reduce(buffer.clone(), "mean"))


def _make_leaves(members: Sequence[nn.Module]) -> None:
    """Put a new parameter on the same memory in the place of each one; what members have in common stays so.

    Something may still refer to a graph in which the old ones took part (Torch-Pruning's graphs live until Python looks
    for cycles). Then autograd waits in every backward pass for that graph's stream, which no CUDA graph can record.
    """
    leaves: dict[nn.Parameter, nn.Parameter] = {}
    for module in (module for member in members for module in member.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in leaves:
                leaves[weight] = nn.Parameter(weight.data, weight.requires_grad)
            setattr(module, name, leaves[weight])


def _flat_gradients(weights: Sequence[Tensor]) -> Tensor:
    """Give the weights gradients that are views of one flat tensor, which is returned."""
    flat = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device if weights else None)
    offset = 0
    for weight in weights:
        weight.grad = flat.as_strided(weight.shape, weight.stride(), offset)
        offset += weight.numel()
    return flat


class _Replayed:
    """A function that launches GPU kernels on the same tensors each time, replayed as one CUDA graph.

    It is called as it is at first, because libraries choose and load kernels in their first calls, and for ever where
    there is no GPU or recording fails.
    """

    RECORD_AT = (20, 100, 500)  # calls in which recording is tried

    def __init__(self, function: Callable[[], object], on_gpu: bool) -> None:
        self.function, self.on_gpu, self.calls = function, on_gpu, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.on_gpu and self.calls in self.RECORD_AT:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self.function()
                self.function, self.on_gpu = graph.replay, False
            except RuntimeError as error:
                reason = str(error.__context__ or error).splitlines()[0]
                tqdm.write(f"no CUDA graph at call {self.calls} ({reason}): kernels are launched one by one")
        self.function()
