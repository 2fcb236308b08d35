"""A long run's state on disk: written beside the work every half minute, so that a killed run loses little."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

SECONDS_BETWEEN = 30.0  # a killed run loses at most this and the time of one writing


class Checkpoint:
    """Tensors, a generator's state and a history in one safetensors file, whole or not at all.

    Args:
        path: the file; None keeps nothing.
        enabled: False only reads: under torchrun one process writes.
    """

    def __init__(self, path: Optional[Path], enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled and path is not None
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
            raise ValueError(
                f"{self.path}: cannot go on from this checkpoint ({error}); remove it to start anew"
            ) from error
        tqdm.write(f"going on after step {facts['steps']}, from {self.path}")
        return [tuple(row) for row in facts["history"]], facts["steps"], facts["seconds"]

    def due(self) -> bool:
        """Whether the last writing is over and half a minute old.

        Raises:
            OSError: it failed: the disk is full, say.
        """
        if self.failure is not None:
            raise OSError(f"{self.path}: the checkpoint cannot be written ({self.failure})") from self.failure
        writing = self.writer is not None and self.writer.is_alive()
        return self.enabled and not writing and time.monotonic() - self.saved_at >= SECONDS_BETWEEN

    def save(
        self, tensors: dict[str, Tensor], generator: torch.Generator, history: list, steps: int, seconds: float
    ) -> None:
        """Copy the state now and write it in the background."""
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        copies["generator"] = generator.get_state()
        progress = json.dumps({"history": history, "steps": steps, "seconds": seconds})
        self.writer = threading.Thread(target=self._write, args=(copies, progress))
        self.writer.start()
        self.saved_at = time.monotonic()

    def _write(self, tensors: dict[str, Tensor], progress: str) -> None:
        partial = self.path.with_name(f".{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"progress": progress})
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
