"""State of an interrupted training: one safetensors file, replaced whole, that resumes to the very same weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpl.anchors.base_models import checksum
from gpl.anchors.sampling import IntArray

_ADAM = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Parameters, AdamW's moments, the best epoch's parameters, counters, losses and torch's random generators."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], optimiser: torch.optim.AdamW) -> None:
        self._parameters = parameters
        self._optimiser = optimiser
        self._best = {name: p.detach().clone() for name, p in parameters.items()}
        self.epoch = 0
        """Epochs that are done."""
        self.batch = 0
        """Batches that are done in the epoch under way."""
        self.step = 0
        self.losses: list[float] = []

    def end_epoch(self, loss: float | None) -> None:
        """Count an epoch; its parameters are the best when its ``loss`` is, or when there is none to tell."""
        self.epoch, self.batch = self.epoch + 1, 0
        if loss is not None:
            self.losses.append(loss)
        if loss is None or loss == min(self.losses):
            self._best = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best epoch's parameters in place."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._best[name])

    def save(self, path: Path, identity: str) -> None:
        """Write aside, sync, rename: the file is the state before or the state after, never half of one."""
        tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
        device = next(iter(self._parameters.values())).device
        if device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(device)
        for name, parameter in self._parameters.items():
            tensors[f"now.{name}"], tensors[f"best.{name}"] = parameter.detach(), self._best[name]
            for moment in _ADAM:
                if parameter in self._optimiser.state:
                    tensors[f"{moment}.{name}"] = self._optimiser.state[parameter][moment]
        counters = {"epoch": self.epoch, "batch": self.batch, "step": self.step, "losses": self.losses}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        # Shared storage is refused by safetensors, and the best may be the present ones: every tensor is its own copy.
        own = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, aside, metadata={"identity": identity, "counters": json.dumps(counters)})
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)

    @torch.no_grad()
    def load(self, path: Path, identity: str) -> bool:
        """Take up what ``save`` wrote; False, and nothing changed, when there is none of this ``identity``.

        Raises ValueError for a file that is no such state.
        """
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != identity:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            counters = json.loads(metadata["counters"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a training state: {error}; remove it to start anew") from error
        device = next(iter(self._parameters.values())).device
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            self._best[name] = tensors[f"best.{name}"].to(device)
            if f"exp_avg.{name}" in tensors:
                moments: dict[str, Any] = {moment: tensors[f"{moment}.{name}"].to(device) for moment in _ADAM}
                self._optimiser.state[parameter] = {"step": torch.tensor(float(counters["step"])), **moments}
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
        self.epoch, self.batch, self.step = counters["epoch"], counters["batch"], counters["step"]
        self.losses = list(counters["losses"])
        return True


def fingerprint(
    network: torch.nn.Module,
    settings: dict[str, Any],
    sequences: Sequence[IntArray],
    validation: Sequence[IntArray],
) -> str:
    """Hash of all that a training depends on: the weights it begins with (frozen ones too), its settings, its data."""
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    described = [checksum(network), trained, settings, len(sequences)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for sequence in (*sequences, *validation):
        digest.update(len(sequence).to_bytes(8, "little") + sequence.astype("<i4").tobytes())
    return digest.hexdigest()
