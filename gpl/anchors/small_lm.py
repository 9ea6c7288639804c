"""The generator that runs everywhere: a small causal LM over SIDs, trained on the spot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gpl.anchors.base import GENERATOR_FILE, Beams, History
from gpl.anchors.beam import beam_search
from gpl.anchors.training import Progress, Schedule, train
from gpl.anchors.transformer import Cache, Shape, SidTransformer
from gpl.codes.trie import SidTrie

WEIGHTS_FILE = "generator.safetensors"
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class SmallLMConfig:
    """Size and training of the model. ``history``: most recent items it reads; ``held_out``: share of the users whose
    likelihood decides when to stop."""

    dim: int = 128
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    history: int = 50
    held_out: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)


class SmallLM:
    """Next-SID model with constrained beam search.

    Each history is decoded by itself: an answer is the same, bit for bit on one machine, whatever else is in the
    call. Labels rest on it (the same log gives the same labels), and on a CPU batching would gain little.
    """

    kind = "small-lm"

    def __init__(self, model: SidTransformer, losses: Sequence[float] = (), device: torch.device | None = None) -> None:
        """``losses``: held-out negative log-likelihood an item (nats) after each epoch of training."""
        self._device = device or torch.device("cpu")
        self._model = model.to(self._device).eval()
        self.losses = list(losses)
        self._version = self._hash()

    @classmethod
    def train(
        cls,
        sequences: Sequence[IntArray],
        codebook_size: int,
        levels: int,
        config: SmallLMConfig | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
        device: torch.device | None = None,
    ) -> SmallLM:
        """Fit a model on users' positives in time order, each (n, levels) int32.

        Deterministic for a seed on one machine. Raises ValueError for fewer than 2 sequences that are not empty, and
        for SIDs of another shape or out of range.
        """
        config = config or SmallLMConfig()
        usable = [np.asarray(sequence, dtype=np.int32) for sequence in sequences if len(sequence)]
        if len(usable) < 2:
            raise ValueError(f"sequences: {len(usable)} are not empty, at least 2 are needed (one is held out)")
        for i, sequence in enumerate(usable):
            if sequence.ndim != 2 or sequence.shape[1] != levels:
                raise ValueError(f"sequences: number {i} has shape {sequence.shape}, expected (n, {levels})")
            if sequence.min() < 0 or sequence.max() >= codebook_size:
                raise ValueError(f"sequences: number {i} has codes outside [0, {codebook_size})")
        order = np.random.default_rng(seed).permutation(len(usable))
        held = max(1, round(config.held_out * len(usable)))
        shape = Shape(levels, codebook_size, config.history, config.dim, config.layers, config.heads, config.dropout)
        # Initial weights and dropout come from torch's generator; the caller's is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SidTransformer(shape)
            losses = train(
                model,
                [usable[i] for i in order[held:]],
                [usable[i] for i in order[:held]],
                config.schedule,
                seed,
                device or torch.device("cpu"),
                on_progress,
            )
        return cls(model, losses, device)

    @property
    def version(self) -> str:
        return self._version

    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        if beams < 1:
            raise ValueError(f"beams must be at least 1, got {beams}")
        return [self._generate(history.sids, trie, beams) for history in histories]

    @torch.inference_mode()
    def _generate(self, sids: IntArray, trie: SidTrie, beams: int) -> Beams:
        shape, model, device = self._model.shape, self._model, self._device
        sids = sids[-shape.history :]
        if len(sids) and sids.shape[1] != shape.levels:
            raise ValueError(f"history: SIDs of {sids.shape[1]} levels, the model has {shape.levels}")
        offsets = np.arange(shape.levels) * shape.codebook_size
        flat = torch.from_numpy((sids.astype(np.int64) + offsets).reshape(1, -1))
        tokens = torch.cat((torch.full((1, 1), shape.bos), flat), dim=1).to(device)
        # The slot of token t, as in training: BOS is 0, the tokens of the n-th item are n.
        slots = ((torch.arange(tokens.shape[1]) + shape.levels - 1) // shape.levels).to(device)
        cache = Cache()
        first = model.logits(model(tokens, slots, cache)[:, -1], 0)
        trunk = tokens.shape[1]
        next_slot = torch.tensor([len(sids) + 1], device=device)
        ancestors = torch.zeros((1, 1, 0), dtype=torch.bool, device=device)

        def advance(level: int, parents: Tensor, codes: Tensor) -> Tensor:
            # A beam attends to the trunk, to its ancestors, and to itself.
            nonlocal ancestors
            width = codes.shape[1]
            inherited = ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, ancestors.shape[-1]))
            own = torch.eye(width, dtype=torch.bool, device=device).unsqueeze(0)
            ancestors = torch.cat((inherited, own), dim=-1)
            seen = torch.ones((1, width, trunk), dtype=torch.bool, device=device)
            mask = torch.cat((seen, ancestors), dim=-1).unsqueeze(1)
            hidden = model(codes + (level - 1) * shape.codebook_size, next_slot, cache, mask)
            return model.logits(hidden, level)

        found, logprobs = beam_search(first, advance, trie, shape.levels, beams)
        real = torch.isfinite(logprobs[0])
        return Beams(found[0][real].cpu().numpy().astype(np.int32), logprobs[0][real].cpu().numpy().astype(np.float32))

    def save(self, directory: Path) -> None:
        """Write weights (safetensors) and description (JSON) into ``directory`` (made if missing)."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / WEIGHTS_FILE).write_bytes(self._weights())
        description = {
            "kind": self.kind,
            "version": self.version,
            "shape": asdict(self._model.shape),
            "losses": self.losses,
        }
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, device: torch.device | None = None) -> SmallLM:
        """Load what ``save`` wrote. Raises ValueError for weights that are damaged or not those described."""
        description: dict[str, Any] = json.loads((directory / GENERATOR_FILE).read_text())
        model = SidTransformer(Shape(**description["shape"]))
        path = directory / WEIGHTS_FILE
        try:
            model.load_state_dict(load_tensors(path.read_bytes()))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: not the weights of this generator: {error}") from error
        loaded = cls(model, description["losses"], device)
        if loaded.version != description["version"]:
            raise ValueError(f"{path}: weights of version {loaded.version}, expected {description['version']}")
        return loaded

    def _weights(self) -> bytes:
        return save_tensors({name: tensor.cpu().contiguous() for name, tensor in self._model.state_dict().items()})

    def _hash(self) -> str:
        shape = json.dumps(asdict(self._model.shape), sort_keys=True).encode()
        return f"{self.kind}-{hashlib.sha256(shape + self._weights()).hexdigest()[:12]}"
