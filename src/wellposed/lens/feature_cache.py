"""Text features on disk, so that a text is encoded once and the 13 GB of GPT-OSS are loaded only for a new one.

An entry belongs to a digest of all that features depend on: the prompt, the template with its date, limit and
truncation, the weights, the taps and the floating-point format. It is a safetensors file of its own, in one of 256
folders, with a checksum: 23 KB for each token of gpt-oss-20b in bfloat16.

A file appears by being renamed, so two processes may write the same entry, and an interrupted one leaves no half of it.
An entry that cannot be read, or whose checksum is wrong, is computed anew.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wellposed.lens.template import PUBLISHED_TEMPLATE, Conversation
from wellposed.lens.text_encoder import TAPS, LensTextEncoder, TextFeatures, join_features

__all__ = ["FeatureCache", "FeatureKey", "hash_checkpoint"]

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """All that features depend on, but for the prompt.

    Attributes:
        weights: names the weights: :func:`hash_checkpoint` of their folder, ``hash_weights`` of
            :mod:`wellposed.evaluation.features` for a model in memory, or a name with a commit. Two ways of naming the
            same weights make two keys.
        template: the encoder's.
        taps: the encoder's.
        dtype: of the features.
    """

    weights: str
    template: Conversation = PUBLISHED_TEMPLATE
    taps: tuple[int, ...] = TAPS
    dtype: torch.dtype = torch.bfloat16

    def digest(self, prompt: str) -> str:
        """SHA-256 of this key and a prompt."""
        parts = {
            "prompt": prompt,
            "prefix": self.template.prefix,
            "suffix": self.template.suffix,
            "max_length": self.template.max_length,
            "truncation": self.template.truncation,
            "weights": self.weights,
            "taps": self.taps,
            "dtype": str(self.dtype),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Features of prompts that were encoded before.

    ::

        key = FeatureKey(weights=hash_checkpoint("gpt-oss-20b"))
        cache = FeatureCache(folder=Path("features"), key=key)
        encoder = functools.cache(lambda: LensTextEncoder.from_pretrained("gpt-oss-20b", device_map="cuda"))
        features = cache.fetch(["a red lighthouse at dusk"], encoder)       # loads the encoder if this one is new

    Attributes:
        folder: made when the first entry is written; keys of all kinds may share it.
        key: what the features depend on.
        max_bytes: what the folder may hold; the entries that were not used for longest go first. None: no limit.
    """

    folder: Path
    key: FeatureKey
    max_bytes: int | None = None

    def path(self, prompt: str) -> Path:
        """Where the entry of a prompt is, or would be."""
        digest = self.key.digest(prompt)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def fetch(
        self,
        prompts: Sequence[str],
        encoder: Callable[[], LensTextEncoder],
        *,
        batch_size: int = 8,
        pad_to_multiple_of: int | None = None,
        device: torch.device | str = "cpu",
    ) -> TextFeatures:
        """Features of prompts, from the folder or else from the encoder, which is asked for only if needed.

        A prompt that comes twice is encoded once. Whoever is over the template's limit is warned of when it is encoded,
        not when it is found.

        Args:
            prompts: one or more.
            encoder: gives the encoder, ``lambda: encoder`` if there is one already.
            batch_size: new prompts encoded at a time; what is encoded is kept if a later one fails.
            pad_to_multiple_of: see :func:`join_features`.
            device: where to.

        Raises:
            ValueError: no prompts, a single string; an encoder that is not the one of the key.
        """
        if isinstance(prompts, str) or not prompts or batch_size < 1:
            raise ValueError(
                f"got prompts {prompts!r} and batch_size {batch_size}; give a list of prompts and at least 1"
            )
        found: dict[str, TextFeatures] = {}
        missing: list[str] = []
        for prompt in dict.fromkeys(prompts):
            entry = self._read(prompt)
            if entry is None:
                missing.append(prompt)
            else:
                found[prompt] = entry
        for first in range(0, len(missing), batch_size):
            group = missing[first : first + batch_size]
            features = self._checked(encoder())(group).to("cpu")
            if features.hidden_states.dtype != self.key.dtype:
                raise ValueError(
                    f"the encoder gave {features.hidden_states.dtype}, the key says {self.key.dtype}; make the key "
                    f"with dtype={features.hidden_states.dtype}"
                )
            for row, prompt in enumerate(group):
                length = int(features.mask[row].sum())
                states = features.hidden_states[row : row + 1, :, :length].clone()
                found[prompt] = TextFeatures(hidden_states=states, mask=features.mask[row : row + 1, :length].clone())
                self._write(prompt, states)
        if missing and self.max_bytes is not None:
            self._evict(self.max_bytes)
        return join_features([found[prompt] for prompt in prompts], pad_to_multiple_of=pad_to_multiple_of).to(device)

    def _checked(self, encoder: LensTextEncoder) -> LensTextEncoder:
        if encoder.template != self.key.template or encoder.taps != self.key.taps:
            raise ValueError(
                f"the encoder has {encoder.template} and taps {encoder.taps}, the key {self.key.template} and "
                f"{self.key.taps}; make both with the same"
            )
        return encoder

    def _read(self, prompt: str) -> TextFeatures | None:
        path = self.path(prompt)
        try:
            tensors = load(path.read_bytes())
            states = tensors["hidden_states"]
            if not torch.equal(tensors["sha256"], _checksum(states)):
                raise ValueError("its checksum is wrong")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warnings.warn(f"{path} cannot be read ({error}); its features are computed anew", stacklevel=3)
            return None
        if self.max_bytes is not None:
            _note_use(path)
        return TextFeatures(hidden_states=states, mask=torch.ones(1, states.shape[2], dtype=torch.bool))

    def _write(self, prompt: str, states: Tensor) -> None:
        path = self.path(prompt)
        content = save({"hidden_states": states, "sha256": _checksum(states)}, metadata={"prompt": prompt})
        try:
            _write_atomically(path, content)
        except OSError as error:
            # The features are at hand; a full or read-only disk is no reason to lose them.
            warnings.warn(f"{path} cannot be written ({error}); its features are not kept", stacklevel=3)

    def _evict(self, max_bytes: int) -> None:
        entries: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process is evicting
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def hash_checkpoint(*folders: str | Path, memo: str | Path | None = None) -> str:
    """SHA-256 over the weights and configurations in folders: all their ``.safetensors`` and ``.json`` files.

    Args:
        folders: of the model, and of the tokenizer if it is not the usual one.
        memo: a JSON file that remembers the hash of each file, with its size and time: 14 GB are read once. It is made
            if it is not there.

    Raises:
        ValueError: no folder, or one without weights or configuration.
    """
    if not folders:
        raise ValueError("there is no folder; give the one with the encoder's weights")
    known = _remembered(memo)
    digest = hashlib.sha256()
    fresh: dict[str, str] = {}
    for folder in map(Path, folders):
        files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".json"))
        if not files:
            raise ValueError(f"{str(folder)!r} holds neither .safetensors nor .json; give the folder of a saved model")
        for path in files:
            status = path.stat()
            name = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
            fresh[name] = known.get(name) or _file_hash(path)
            digest.update(f"{path.name} {fresh[name]}\n".encode())
    if memo is not None and not fresh.keys() <= known.keys():
        _write_atomically(Path(memo), json.dumps(known | fresh, indent=0).encode())
    return digest.hexdigest()


def _remembered(memo: str | Path | None) -> dict[str, str]:
    try:
        remembered: Any = json.loads(Path(memo).read_bytes()) if memo is not None else {}
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(states: Tensor) -> Tensor:
    content = states.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def _note_use(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # gone meanwhile, or somebody else's: it is read already
        return


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, be it on another machine.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
