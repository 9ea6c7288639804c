"""How many users a second a generator serves on this machine, and what share of the machine's limit that is.

The limit is a roofline (Williams et al. 2009): a batch needs at least its arithmetic at the speed of the machine's own
large matrix product, and at least its reads of weights and key-value cache at the speed of its own memory copy; both
are measured here, in the same run. Weights are random: speed does not depend on their values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gpl.anchors.base import AnchorGenerator, History
from gpl.anchors.base_models import cast
from gpl.anchors.lora_lm import LoraConfig, LoraLM, Precision, choose_device, choose_dtype
from gpl.anchors.sid_causal_lm import SidCausalLM
from gpl.anchors.small_lm import SmallLM
from gpl.anchors.transformer import Shape, SidTransformer
from gpl.codes.quantiser import suggest_codebook_size
from gpl.codes.trie import SidTrie

Model = Literal["small-lm", "smollm2-135m", "qwen2.5-0.5b"]
LEVELS = 3


@dataclass(frozen=True)
class Throughput:
    """Rates are per second, over the best of the repetitions."""

    model: str
    device: str
    dtype: str
    threads: int
    parameters: int
    """Of the linear layers that every position passes."""
    history: int
    beams: int
    batch_users: int
    users_per_second: float
    flops_per_user: float
    machine_flops: float
    """Of a large matrix product in the same type, measured."""
    bytes_per_user: float
    """Weights and key-value cache that must be read and written, shared by the users of a batch."""
    machine_bytes: float
    """Of a large memory copy, read and write counted, measured."""

    @property
    def limit(self) -> float:
        """Users a second that the roofline allows."""
        return 1 / max(self.flops_per_user / self.machine_flops, self.bytes_per_user / self.machine_bytes)

    @property
    def share(self) -> float:
        """Of the limit that was reached."""
        return self.users_per_second / self.limit


def measure(
    model: Model,
    history: int = 100,
    beams: int = 20,
    users: int = 64,
    batch_users: int = 16,
    items: int = 10_000,
    device: str | None = None,
    precision: Precision = "auto",
    repetitions: int = 3,
    seed: int = 0,
) -> Throughput:
    """Generate for ``users`` made-up histories of ``history`` items over a made-up catalogue, ``repetitions`` times."""
    rng = np.random.default_rng(seed)
    size = suggest_codebook_size(items)
    sids = rng.integers(0, size, size=(items, LEVELS)).astype(np.int32)
    trie = SidTrie(sids, size)
    target = choose_device(device)
    dtype = torch.float32 if model == "small-lm" else choose_dtype(precision, target)
    torch.manual_seed(seed)
    generator: AnchorGenerator
    if model == "small-lm":
        batch_users = 1  # it takes users one by one
        network = SidTransformer(Shape(LEVELS, size, history, dim=64, layers=1, heads=2)).to(target)
        generator, flops, moved = SmallLM(network), *_small_cost(network, history, beams)
        parameters = _linear_parameters(network)
    else:
        config = LoraConfig(history=history, precision=precision, batch_users=batch_users)
        lm = SidCausalLM(cast(_backbone(model), dtype), LEVELS, size).to(target)
        generator = LoraLM(lm, config, "random", {})
        flops, moved = _lm_cost(lm, history, beams, batch_users, torch.finfo(dtype).bits // 8)
        parameters = _linear_parameters(lm.backbone)
    drawn = sids[rng.integers(items, size=(users, history))]
    nowhere = np.zeros((history, 1), np.float32)  # language models read SIDs only
    histories = [History(rows, nowhere) for rows in drawn]
    generator.generate(histories[:batch_users], trie, beams)
    seconds = _best(lambda: generator.generate(histories, trie, beams), repetitions, target)
    return Throughput(
        model=model,
        device=torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        parameters=parameters,
        history=history,
        beams=beams,
        batch_users=batch_users,
        users_per_second=users / seconds,
        flops_per_user=flops,
        machine_flops=_machine_flops(target, dtype),
        bytes_per_user=moved,
        machine_bytes=_machine_bytes(target),
    )


def _backbone(model: Model) -> Any:
    """A random transformer of the model's shape; the vocabulary of words, which is never asked, is left small."""
    from transformers import AutoModel, LlamaConfig, Qwen2Config

    if model == "smollm2-135m":
        config: Any = LlamaConfig(
            vocab_size=64,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    else:
        config = Qwen2Config(
            vocab_size=64,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        )
    return AutoModel.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def _linear_parameters(network: nn.Module) -> int:
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))


def _lm_cost(network: SidCausalLM, history: int, beams: int, batch_users: int, width: int) -> tuple[float, float]:
    """Arithmetic, and bytes moved, a user."""
    config, parameters = network.backbone.config, _linear_parameters(network.backbone)
    read = history + 1
    widths = [min(beams, network.codebook_size**level) for level in range(1, network.levels)]
    lengths = [read + sum(widths[: at + 1]) for at in range(len(widths))]
    pairs = read * (read + 1) / 2 + sum(count * length for count, length in zip(widths, lengths, strict=True))
    head = 2 * config.hidden_size * network.codebook_size * (1 + sum(widths))
    flops = 2 * parameters * (read + sum(widths)) + 4 * config.hidden_size * config.num_hidden_layers * pairs + head
    each = 2 * config.num_hidden_layers * config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cache = width * each * (read + sum(widths) + sum(lengths))
    return float(flops), float(width * parameters * network.levels / batch_users + cache)


def _small_cost(network: SidTransformer, history: int, beams: int) -> tuple[float, float]:
    shape, blocks = network.shape, sum(m.weight.numel() for m in network.blocks.modules() if isinstance(m, nn.Linear))
    depth = network.depth_up.weight.numel() + network.depth_down.weight.numel()
    spelled = 1 + beams * (shape.levels - 1)
    read = history + 1
    flops = (
        2 * blocks * read
        + 4 * shape.dim * shape.layers * read * (read + 1) / 2
        + 2 * (depth + shape.dim * shape.codebook_size) * spelled
    )
    return float(flops), float(4 * _linear_parameters(network))


def _best(work: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Seconds of the quickest of ``repetitions``."""
    best = float("inf")
    for _ in range(repetitions):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine_flops(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, 5, device)


def _machine_bytes(device: torch.device) -> float:
    source = torch.zeros(2**28 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source), 5, device)
