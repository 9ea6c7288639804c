"""Anchors from a pre-trained causal LM, tuned by LoRA on users' sequences of SIDs.

The paper's generator (Qwen2.5-0.5B there); LoRA is Hu et al., ICLR 2022, by the library peft.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpl.anchors.base import GENERATOR_FILE, Beams, History
from gpl.anchors.base_models import SMOLLM2, BaseModelMissingError, cast, checksum, load_backbone, model_path
from gpl.anchors.beam import Decoding, as_beams, beam_search, closed_nodes
from gpl.anchors.sampling import IntArray
from gpl.anchors.sid_causal_lm import SidCausalLM, text_codes
from gpl.anchors.sids import check_sids, check_trie
from gpl.anchors.training import Progress, Resume, Schedule, train
from gpl.codes.trie import SidTrie

_WEIGHTS = "generator.safetensors"

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class LoraConfig:
    """``rank``, ``alpha``, ``dropout``: of the adapters, which sit on every linear layer of the LM."""

    base: str = SMOLLM2
    """See `load_backbone`."""
    history: int = 50
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    precision: Precision = "auto"
    """Of the LM's frozen weights and its arithmetic; "auto": bfloat16 where the processor multiplies it natively."""
    batch_users: int = 16
    """Users that are decoded at once."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(epochs=5, patience=1, batch_items=200, learning_rate=1e-3, weight_decay=0.01)
    )
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        for name in ("history", "rank", "alpha", "batch_users"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout}, must be in [0, 1)")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision: {self.precision!r}, expected auto, float32 or bfloat16")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: what answers depend on, so without the schedule."""
        return {name: value for name, value in asdict(self).items() if name != "schedule"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """Of ``to_dict``. Raises TypeError for a key that is none, ValueError for a value that cannot be."""
        return cls(**{**values, "decoding": Decoding(**values["decoding"])})


class LoraLM:
    """Anchor generator over `SidCausalLM`. Immutable.

    Users are decoded in batches, at padded length: beams depend on the others in a call by float rounding (with
    bfloat16 in the third digit of a logprob), which is what the speed costs. Elsewhere the contract holds.
    """

    kind: ClassVar[str] = "lora-lm"

    def __init__(
        self,
        network: SidCausalLM,
        config: LoraConfig,
        base_sha256: str,
        adapters: dict[str, Tensor],
        validation_losses: Sequence[float] = (),
    ) -> None:
        """``network``: adapters merged into its backbone. ``adapters``: all that was trained, as it is saved."""
        self._network = network.eval().requires_grad_(False)
        self.config = config
        self.base_sha256 = base_sha256
        self._adapters = adapters
        self.validation_losses = tuple(validation_losses)
        """Nats an item on held-out users after each epoch; empty for a generator that was loaded."""
        self._version = _version(config, base_sha256, adapters)

    @property
    def version(self) -> str:
        """``lora-lm-`` and a hash of the base model's checksum, the adapters and the configuration."""
        return self._version

    @property
    def codebook_size(self) -> int:
        return self._network.codebook_size

    def with_decoding(self, decoding: Decoding) -> LoraLM:
        """The same weights, read in another way."""
        config = LoraConfig.from_dict({**self.config.to_dict(), "decoding": decoding.to_dict()})
        return LoraLM(self._network, config, self.base_sha256, self._adapters, self.validation_losses)

    @classmethod
    def train(
        cls,
        sequences: Sequence[IntArray],
        validation: Sequence[IntArray],
        levels: int,
        codebook_size: int,
        config: LoraConfig,
        seed: int,
        device: torch.device | str | None = None,
        on_progress: Progress | None = None,
        resume: Resume | None = None,
        texts: Sequence[tuple[str, IntArray]] = (),
    ) -> LoraLM:
        """Train on users' positives: SIDs (n, levels) int32, oldest first; users of ``validation`` decide when to stop.

        ``texts``: items' texts and SIDs (levels,); codes then begin near what the LM knows of these words.
        ``resume``: where an interrupted call left its state. The same arguments give the same weights on one machine's
        CPU with one thread count; on CUDA they may differ by rounding. Raises ValueError without a sequence, for SIDs
        that do not fit, and where training diverges; BaseModelMissingError where peft or the base model is missing.
        """
        if not any(map(len, sequences)):
            raise ValueError("sequences: no items to train on")
        for name, group in (("sequences", sequences), ("validation", validation)):
            for at, sequence in enumerate(group):
                check_sids(sequence, levels, codebook_size, f"{name}[{at}]")
        device = choose_device(device)
        backbone = load_backbone(config.base)
        base = checksum(backbone)
        cast(backbone, choose_dtype(config.precision, device))
        codes = _codes_of_texts(config.base, backbone, texts, levels, codebook_size) if texts else None
        # Initialisation and dropout draw from torch's global generator: it is borrowed, and given back as it was.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            network = SidCausalLM(backbone, levels, codebook_size, codes)
            _add_adapters(network, config)
            network.to(device)
            losses = train(
                network,
                network.negative_log_likelihood,
                config.history,
                sequences,
                validation,
                config.schedule,
                seed,
                on_progress,
                resume,
                {"alpha": config.alpha, "dropout": config.dropout, "backbone": backbone.config.to_dict()},
            )
        trained = {name: p.detach().cpu().contiguous() for name, p in network.named_parameters() if p.requires_grad}
        _merge(network)
        return cls(network, config, base, trained, losses)

    @torch.inference_mode()
    def generate(self, histories: Sequence[History], trie: SidTrie, beams: int) -> list[Beams]:
        """One `Beams` a history, in order; see `AnchorGenerator`. An empty history asks for what people start with."""
        network, config = self._network, self.config
        if beams < 1:
            raise ValueError(f"beams: {beams}, must be at least 1")
        check_trie(trie, network.levels, network.codebook_size)
        for history in histories:
            check_sids(history.sids, network.levels, network.codebook_size, "history")
        trie = trie.to(network.device)
        answers: dict[int, Beams] = {}
        # Similar lengths together keep padding small.
        order = sorted(range(len(histories)), key=lambda at: (len(histories[at].last(config.history)), at))
        for begin in range(0, len(order), config.batch_users):
            chosen = order[begin : begin + config.batch_users]
            reading = network.read([histories[at].last(config.history).sids for at in chosen])
            sids, logprobs = beam_search(
                reading,
                trie,
                len(chosen),
                beams,
                config.decoding.temperature,
                closed_nodes(trie, [histories[at].sids for at in chosen], config.decoding),
            )
            for row, at in enumerate(chosen):
                answers[at] = as_beams(sids[row], logprobs[row])
        return [answers[at] for at in range(len(histories))]

    def save(self, directory: Path) -> None:
        """Write ``generator.json`` and ``generator.safetensors`` into ``directory``: adapters and SID embeddings, a
        reference to the base model and its checksum, none of its weights.
        """
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self._adapters, directory / _WEIGHTS)
        description = {
            "kind": self.kind,
            "version": self.version,
            "base_sha256": self.base_sha256,
            "levels": self._network.levels,
            "codebook_size": self._network.codebook_size,
            "config": self.config.to_dict(),
        }
        (directory / GENERATOR_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, device: torch.device | str | None = None) -> LoraLM:
        """What ``save`` wrote, over the base model it names.

        Raises FileNotFoundError, BaseModelMissingError where the base model or peft is not installed, ValueError when
        description, weights and base model do not agree.
        """
        path = directory / GENERATOR_FILE
        description = json.loads(path.read_text())
        try:
            config = LoraConfig.from_dict(description["config"])
            trained = load_file(directory / _WEIGHTS)
            shape = int(description["levels"]), int(description["codebook_size"])
            expected = str(description["base_sha256"])
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path}: not a description of a LoRA generator: {error!r}") from error
        version = _version(config, expected, trained)
        if version != description.get("version"):
            raise ValueError(f"{path}: version {description.get('version')}; the weights beside it are {version}")
        device = choose_device(device)
        backbone = load_backbone(config.base)
        found = checksum(backbone)
        if found != expected:
            raise ValueError(f"{path}: trained on {config.base!r} {expected[:12]}, the one installed is {found[:12]}")
        network = SidCausalLM(cast(backbone, choose_dtype(config.precision, device)), *shape)
        _add_adapters(network, config)
        missing, unexpected = network.load_state_dict(trained, strict=False)
        wanted = {name for name, p in network.named_parameters() if p.requires_grad}
        if unexpected or wanted & set(missing):
            raise ValueError(f"{path}: the weights beside it are not those of this configuration")
        network.to(device)
        _merge(network)
        return cls(network, config, expected, trained)


def choose_device(device: torch.device | str | None) -> torch.device:
    """``device``, or where None the GPU if there is one. Raises ValueError for a device that cannot be used here."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # the latter of a build of torch without CUDA
        raise ValueError(f"device: {str(chosen)!r}, not usable here: {str(error).splitlines()[0]}") from error


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that ``precision`` means on ``device``.

    bfloat16 with AVX512-BF16 was 2.2 times as fast as float32 (SmolLM2, 100 items, batches of 8).
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported()
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _add_adapters(network: SidCausalLM, config: LoraConfig) -> None:
    """Adapters on every linear layer of the backbone, in float32; they and the SID embeddings ask for gradients."""
    try:
        import peft
    except ImportError as error:
        raise BaseModelMissingError("LoRA needs peft: pip install 'gpl-streams[lora]'") from error
    adapters = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules="all-linear"
    )
    peft.inject_adapter_in_model(adapters, network.backbone)
    for name, parameter in network.backbone.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _merge(network: SidCausalLM) -> None:
    """Add the adapters into the weights they sit on: decoding then costs what the base model costs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in list(network.backbone.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()


def _codes_of_texts(
    base: str, backbone: Any, texts: Sequence[tuple[str, IntArray]], levels: int, codebook_size: int
) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(base))
    words = backbone.get_input_embeddings().weight.float()
    tokens = tokenizer([text for text, _ in texts], truncation=True, max_length=128)["input_ids"]
    means = [words[ids].mean(dim=0) if ids else words.mean(dim=0) for ids in tokens]
    sids = np.stack([sid for _, sid in texts])
    check_sids(sids, levels, codebook_size, "texts")
    return text_codes(torch.stack(means), sids, levels, codebook_size)


def _version(config: LoraConfig, base_sha256: str, adapters: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([config.to_dict(), base_sha256], sort_keys=True).encode())
    for name, tensor in sorted(adapters.items()):
        digest.update(name.encode() + b"\0" + tensor.float().numpy().astype("<f4").tobytes())
    return f"{LoraLM.kind}-{digest.hexdigest()[:12]}"
