"""A long run's state on disk, so that a killed run loses little.

Alignment writes it beside the work every half minute (`save`, `load`), training after every epoch (`keep`, `recall`).
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

State = dict[str, Any]  # by name: tensors, or what JSON can hold

SECONDS_BETWEEN = 30.0  # a killed run loses at most this and the time of one writing


class Checkpoint:
    """Tensors, a generator's state and a history in one safetensors file, whole or not at all.

    Args:
        path: the file; None keeps nothing.
        enabled: False only reads: under torchrun one process writes.
        run: what a file's run must have in common with this one for `recall` to go on from it: values for JSON.
    """

    def __init__(self, path: Optional[Path], enabled: bool = True, run: Optional[dict[str, Any]] = None) -> None:
        self.path, self.enabled, self.run = path, enabled and path is not None, run
        self.saved_at = time.monotonic()
        self.writer: Optional[threading.Thread] = None
        self.failure: Optional[BaseException] = None

    def load(self, tensors: dict[str, Tensor], generator: torch.Generator) -> Optional[tuple[list, int, float]]:
        """Fill the tensors in place from the file, if there is one that fits.

        Returns:
            (history, steps done, seconds spent), or None where there is nothing to go on from.

        Raises:
            ValueError: the file is of another run, or damaged; the message names it.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                if set(file.keys()) != {*tensors, "generator"}:
                    raise ValueError("it holds other tensors")
                facts = json.loads(file.metadata()["progress"])
                for name, tensor in tensors.items():
                    tensor.data.copy_(file.get_tensor(name))
                generator.set_state(file.get_tensor("generator"))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise self._unusable(error) from error
        tqdm.write(f"going on after step {facts['steps']}, from {self.path}")
        return [tuple(row) for row in facts["history"]], facts["steps"], facts["seconds"]

    def due(self) -> bool:
        """Whether the last writing is over and half a minute old.

        Raises:
            OSError: it failed: the disk is full, say.
        """
        self._raise_failure()
        writing = self.writer is not None and self.writer.is_alive()
        return self.enabled and not writing and time.monotonic() - self.saved_at >= SECONDS_BETWEEN

    def save(
        self, tensors: dict[str, Tensor], generator: torch.Generator, history: list, steps: int, seconds: float
    ) -> None:
        """Copy the state now and write it in the background."""
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        copies["generator"] = generator.get_state()
        progress = json.dumps({"history": history, "steps": steps, "seconds": seconds})
        self.writer = threading.Thread(target=self._write, args=(copies, {"progress": progress}))
        self.writer.start()
        self.saved_at = time.monotonic()

    def recall(self) -> Optional[State]:
        """What `keep` wrote last, tensors on the CPU; None where there is nothing, or a state of another run.

        Raises:
            ValueError: the file is damaged; the message names it.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                notes = file.metadata()
                if json.loads(notes["run"]) != self.run:
                    return None
                return json.loads(notes["facts"]) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._unusable(error) from error

    def keep(self, state: State) -> None:
        """Write a state now, and return when it is written.

        Raises:
            OSError: it cannot be: the disk is full, say.
        """
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        facts = {name: value for name, value in state.items() if name not in tensors}
        self._write(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {"run": json.dumps(self.run), "facts": json.dumps(facts)},
        )
        self._raise_failure()

    def _unusable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: cannot go on from this checkpoint ({error}); remove it to start anew")

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise OSError(f"{self.path}: the checkpoint cannot be written ({self.failure})") from self.failure

    def _write(self, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        partial = self.path.with_name(f".{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=notes)
            partial.replace(self.path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            self.failure = error

    def close(self) -> None:
        """Wait for the last writing. The file stays until `remove`: the run's result is not saved yet."""
        if self.writer is not None:
            self.writer.join()

    def remove(self) -> None:
        """The result is safe: the checkpoint is not needed any more."""
        if self.enabled:
            self.path.unlink(missing_ok=True)
