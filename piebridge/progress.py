"""How far a run of the training loop has come, as one state for a checkpoint, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Optional, Protocol

import torch
from torch import nn

from .checkpoints import State


class Memory(Protocol):
    """Something that changes from epoch to epoch and must be known for a killed run to go on."""

    def state(self) -> State: ...

    def restore(self, state: State) -> None: ...


@dataclass
class Progress:
    """How far a run has come: as in `training.Outcome`, and the seconds that preparing its plan took at the start."""

    history: list[dict[str, float]] = field(default_factory=list)
    suffix_macs: float = 0.0
    peak_memory_mib: float = 0.0
    energy_j: Optional[float] = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)


def state_of(
    run: Progress, suffix: nn.Module, trained: list[str], optimizer: torch.optim.SGD, generator: torch.Generator,
    memories: dict[str, Optional[Memory]],
) -> State:
    """All that changes from epoch to epoch; buffers do not, since the suffix is in evaluation mode."""
    state: dict[str, Any] = {"progress": asdict(run), "generator": generator.get_state()}
    for name in trained:
        parameter = suffix.get_parameter(name)
        state[f"suffix.{name}"] = parameter
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            state[f"momentum.{name}"] = momentum
    for part, memory in memories.items():
        if memory is not None:
            state |= {f"{part}.{name}": value for name, value in memory.state().items()}
    return state


def restore(
    state: State, suffix: nn.Module, trained: list[str], optimizer: torch.optim.SGD, generator: torch.Generator,
    memories: dict[str, Optional[Memory]],
) -> Progress:
    """Put everything back to what `state_of` saw."""
    generator.set_state(state["generator"])
    with torch.no_grad():
        for name in trained:
            parameter = suffix.get_parameter(name)
            parameter.copy_(state[f"suffix.{name}"])
            if f"momentum.{name}" in state:
                momentum = torch.zeros_like(parameter).copy_(state[f"momentum.{name}"])  # laid out as the parameter is
                optimizer.state[parameter]["momentum_buffer"] = momentum
    for part, memory in memories.items():
        if memory is not None:
            memory.restore(part_of(state, part))
    return Progress(**state["progress"])


def part_of(state: State, part: str) -> State:
    """What belongs to one part, under the names it gave."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
