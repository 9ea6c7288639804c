"""The default generator: a small causal LM over SIDs, trained on this site's own sequences, on a CPU in seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpl.anchors.base import GENERATOR_FILE, Beams, History
from gpl.anchors.beam import Decoding, as_beams, beam_search, closed_nodes
from gpl.anchors.sampling import IntArray
from gpl.anchors.sids import check_sids, check_trie
from gpl.anchors.training import PADDING, Progress, Resume, Schedule, padded, train
from gpl.anchors.transformer import Shape, SidTransformer
from gpl.codes.trie import SidTrie

_WEIGHTS = "generator.safetensors"


@dataclass(frozen=True)
class SmallLMConfig:
    """Size and training of the network.

    The defaults are what got furthest in 15 s of one core on MovieLens-100K's first half in time (487 users, 28,383
    positives). Held-out nats an item: one layer 6.27, 6.19, 6.17 after 16, 20, 24 epochs; two layers 6.40 after 12
    (both seeds tried); one layer of width 128 6.39 after 8.
    """

    history: int = 50
    dim: int = 64
    layers: int = 1
    heads: int = 2
    dropout: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout}, must be in [0, 1)")


class SmallLM:
    """Anchor generator over `SidTransformer`. Immutable; on CPU until moved with ``to``.

    Users are computed one at a time, at the natural length of their history, so a user's beams do not depend on who
    else is in the call, bit for bit (on one machine with one torch and thread count). It costs speed: batches of 32
    were 5 times faster (1,800 users/s against 360 on one core, 20 beams, 50 items) and moved logprobs by up to 1e-6.
    """

    kind: ClassVar[str] = "small-lm"

    def __init__(
        self, model: SidTransformer, decoding: Decoding | None = None, validation_losses: Sequence[float] = ()
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self.decoding = decoding or Decoding()
        self.validation_losses = tuple(validation_losses)
        """Nats an item on held-out users after each epoch; empty for a generator that was loaded."""
        self._version = _version(model, self.decoding)

    @property
    def version(self) -> str:
        """``small-lm-`` and a hash of shape, weights and decoding."""
        return self._version

    @property
    def shape(self) -> Shape:
        return self._model.shape

    def to(self, device: torch.device | str) -> SmallLM:
        """This generator with its weights on ``device``."""
        moved = SidTransformer(self.shape)
        moved.load_state_dict(self._model.state_dict())
        return SmallLM(moved.to(device), self.decoding, self.validation_losses)

    def with_decoding(self, decoding: Decoding) -> SmallLM:
        """The same weights, read in another way."""
        return SmallLM(self._model, decoding, self.validation_losses)

    @classmethod
    def train(
        cls,
        sequences: Sequence[IntArray],
        validation: Sequence[IntArray],
        levels: int,
        codebook_size: int,
        config: SmallLMConfig,
        seed: int,
        device: torch.device | str = "cpu",
        on_progress: Progress | None = None,
        resume: Resume | None = None,
    ) -> SmallLM:
        """Train on users' positives: SIDs (n, levels) int32, oldest first; users of ``validation`` decide when to stop.

        ``resume``: where an interrupted call left its state, see `gpl.anchors.training.train`. The same arguments give
        the same weights on one machine's CPU with one thread count; on CUDA they may differ by rounding. Raises
        ValueError without a sequence, for SIDs that do not fit, and where training diverges.
        """
        if not any(map(len, sequences)):
            raise ValueError("sequences: no items to train on")
        for name, group in (("sequences", sequences), ("validation", validation)):
            for at, sequence in enumerate(group):
                check_sids(sequence, levels, codebook_size, f"{name}[{at}]")
        shape = Shape(levels, codebook_size, config.history, config.dim, config.layers, config.heads)
        device = torch.device(device)
        # Initialisation and dropout draw from torch's global generator: it is borrowed, and given back as it was.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = SidTransformer(shape, config.dropout).to(device)

            def likelihood(cut: Sequence[IntArray]) -> Tensor:
                targets = padded(cut, levels).to(device)
                # Padding is on the right and attention is causal: real items never see it.
                scores = model.all_codes(targets.clamp(min=0))
                return F.cross_entropy(scores.flatten(0, 2), targets.flatten(), ignore_index=PADDING, reduction="sum")

            losses = train(
                model,
                likelihood,
                config.history,
                sequences,
                validation,
                config.schedule,
                seed,
                on_progress,
                resume,
                {"heads": config.heads, "dropout": config.dropout},
            )
        return cls(model.cpu(), config.decoding, losses)

    @torch.inference_mode()
    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        """One `Beams` a history, in order; see `AnchorGenerator`. An empty history asks for what people start with."""
        if beams < 1:
            raise ValueError(f"beams: {beams}, must be at least 1")
        shape = self.shape
        check_trie(trie, shape.levels, shape.codebook_size)
        device = self._model.offsets.device
        trie = trie.to(device)
        return [self._generate([history], trie, beams, device)[0] for history in histories]

    @torch.inference_mode()
    def generate_batched(self, histories: Sequence[History], trie: SidTrie, beams: int, size: int = 64) -> list[Beams]:
        """As ``generate``, but equally long histories go through the network together, ``size`` at once.

        Several times as fast, for studies: logprobs move by up to 1e-6 with who else is in the batch, and beams with
        them where two are that close.
        """
        shape = self.shape
        check_trie(trie, shape.levels, shape.codebook_size)
        device = self._model.offsets.device
        trie = trie.to(device)
        lengths = np.array([min(len(history), shape.history) for history in histories])
        found: list[Beams | None] = [None] * len(histories)
        for length in np.unique(lengths).tolist():
            same = np.flatnonzero(lengths == length).tolist()
            for start in range(0, len(same), size):
                rows = same[start : start + size]
                for row, made in zip(
                    rows, self._generate([histories[r] for r in rows], trie, beams, device), strict=True
                ):
                    found[row] = made
        return [made for made in found if made is not None]

    def _generate(self, histories: Sequence[History], trie: SidTrie, beams: int, device: torch.device) -> list[Beams]:
        """Histories of one length, as far as the model reads them."""
        model = self._model
        recent = np.stack([history.last(self.shape.history).sids for history in histories])
        check_sids(recent.reshape(-1, recent.shape[2]), self.shape.levels, self.shape.codebook_size, "history")
        items = model.embed(torch.from_numpy(recent.astype(np.int64)).to(device)).sum(dim=2)
        context = model.context(items)[:, -1]
        sids, logprobs = beam_search(
            lambda prefixes, _: model.next_code(context, prefixes.to(device)),
            trie,
            len(histories),
            beams,
            self.decoding.temperature,
            # All that was seen, not only what the model reads.
            closed_nodes(trie, [history.sids for history in histories], self.decoding),
        )
        return [as_beams(*one) for one in zip(sids, logprobs, strict=True)]

    def save(self, directory: Path) -> None:
        """Write ``generator.json`` and ``generator.safetensors`` into ``directory``, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(_weights(self._model), directory / _WEIGHTS)
        description = {
            "kind": self.kind,
            "version": self.version,
            "shape": asdict(self.shape),
            "decoding": self.decoding.to_dict(),
        }
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> SmallLM:
        """What ``save`` wrote. Raises FileNotFoundError, or ValueError when description and weights do not agree."""
        path = directory / GENERATOR_FILE
        description = json.loads(path.read_text())
        try:
            model = SidTransformer(Shape(**description["shape"]))
            model.load_state_dict(load_file(directory / _WEIGHTS))
            generator = cls(model, Decoding(**description["decoding"]))
        except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path}: does not fit the weights beside it: {error}") from error
        if generator.version != description.get("version"):
            raise ValueError(
                f"{path}: version {description.get('version')}; the weights beside it are {generator.version}"
            )
        return generator


def _weights(model: SidTransformer) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}


def _version(model: SidTransformer, decoding: Decoding) -> str:
    digest = hashlib.sha256(json.dumps([asdict(model.shape), decoding.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(_weights(model).items()):
        digest.update(name.encode() + b"\0" + tensor.numpy().astype("<f4").tobytes())
    return f"{SmallLM.kind}-{digest.hexdigest()[:12]}"
