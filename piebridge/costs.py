"""What training costs: multiply-accumulates, seconds, activation bytes, peak memory, energy."""

from __future__ import annotations

import ctypes
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def macs(module: nn.Module, example: Tensor) -> float:
    """Multiply-accumulates of one forward pass, an image.

    Args:
        module: any module.
        example: its input, shape (B, ...).

    Returns:
        MACs divided by B; convolutions and matrix products count, element-wise operations do not.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example)
    return counter.get_total_flops() / 2 / len(example)


def training_macs(module: nn.Module, example: Tensor) -> float:
    """Multiply-accumulates of one forward and backward pass, an image, for the parameters that require gradients."""
    with FlopCounterMode(display=False) as counter:
        module(example).sum().backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2 / len(example)


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done all its work: needed before a clock is read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def latency(function: Callable[[Tensor], object], images: Tensor, repeats: int = 7) -> float:
    """Median seconds an image of `function(images)`, after two warm-up calls."""
    seconds = []
    with torch.inference_mode():
        for _ in range(2 + repeats):
            start = time.perf_counter()
            function(images)
            synchronize(images.device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) / len(images)


def peak_flops(device: str | torch.device, side: int = 8192) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on a GPU: what it can do at best."""
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    matrix @ matrix
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)


class Stopwatch:
    """Adds up wall-clock seconds under names: `with stopwatch("prefix"): ...`."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - start


def reset_peak_memory(device: str | torch.device) -> None:
    """Start a new measurement of `peak_memory_mib`, where the system can."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes used and the C library keeps is not of this measurement
    except (AttributeError, OSError, TypeError):  # not glibc
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: resets the high-water mark
    except OSError:
        pass


def peak_memory_mib(device: str | torch.device) -> float:
    """Peak memory (MiB) since `reset_peak_memory`: of the GPU's allocator, else of the whole process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def energy_counter_j(powercap: Path = Path("/sys/class/powercap")) -> float | None:
    """Joules on the processor packages' counters (Linux powercap), or None where the device does not tell.

    The counters wrap around after some hours; a difference that comes out negative is to be discarded.
    """
    try:
        counters = [path for path in powercap.glob("intel-rapl:*/energy_uj") if path.parent.name.count(":") == 1]
        return sum(int(path.read_text()) for path in counters) / 1e6 if counters else None
    except (OSError, ValueError):
        return None


def add_energy_j(spent: float | None, before: float | None) -> tuple[float | None, float | None]:
    """(joules spent so far, counter now); None where the device does not tell or its counter wrapped around."""
    now = energy_counter_j()
    known = spent is not None and before is not None and now is not None and now >= before
    return (spent + now - before if known else None), now


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def profile_blocks(blocks: nn.Sequential, images: Tensor, repeats: int = 5) -> list[dict[str, float | str | bool]]:
    """Forward and backward time of each block as training runs it, and the bytes it keeps for the backward pass.

    Gradients reach a block's input only if something below it is trained, as autograd itself decides.

    Args:
        blocks: the network, block by block; `requires_grad` says what is trained.
        images: uint8, shape (B, 3, H, W).
        repeats: the median of so many measurements is taken, after one warm-up.

    Returns:
        A row a block: block, trained, parameters, gmacs, forward_ms, backward_ms, activation_mib (all but the first
        two a batch).
    """
    forward: dict[str, list[float]] = defaultdict(list)
    backward: dict[str, list[float]] = defaultdict(list)
    kept: dict[str, int] = {}
    gmacs: dict[str, float] = {}
    device = images.device
    for _ in range(1 + repeats):
        activations, below = images, False
        outputs: list[tuple[str, Tensor, Tensor]] = []
        for name, block in blocks.named_children():
            trained = any(parameter.requires_grad for parameter in block.parameters())
            entry = activations.detach().requires_grad_(below)
            parameters = {parameter.data_ptr() for parameter in block.parameters()}
            storages: dict[int, int] = {}

            def remember(tensor: Tensor) -> Tensor:
                if tensor.data_ptr() not in parameters:  # noqa: B023 - used before the next block
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023
                return tensor

            with torch.set_grad_enabled(trained or below):
                with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                    start = time.perf_counter()
                    activations = block(entry)
                    synchronize(device)
                    forward[name].append(time.perf_counter() - start)
            kept[name] = sum(storages.values())
            outputs.append((name, entry, activations))
            below = below or trained
        gradient = torch.ones_like(activations)
        for name, entry, output in reversed(outputs):
            if output.requires_grad:
                start = time.perf_counter()
                output.backward(gradient)
                synchronize(device)
                backward[name].append(time.perf_counter() - start)
                gradient = entry.grad
            if gradient is None:
                break
        blocks.zero_grad(set_to_none=True)
    activations = images
    rows = []
    for name, block in blocks.named_children():
        gmacs[name] = macs(block, activations) * len(images) / 1e9
        with torch.no_grad():
            activations = block(activations)
        trainable, total = parameter_counts(block)
        rows.append(
            {
                "block": name,
                "trained": trainable > 0,
                "parameters": total,
                "gmacs": gmacs[name],
                "forward_ms": 1e3 * statistics.median(forward[name][1:]),
                "backward_ms": 1e3 * statistics.median(backward[name][1:] or [0.0]),
                "activation_mib": kept[name] / 2**20,
            }
        )
    return rows
