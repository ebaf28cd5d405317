"""Vision transformers through transformers, from a local folder or the hub: DINOv2, SigLIP, CLIP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from untwine.encoders.base import Encoder, Features, sha256_of, three_channels

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CENTRED = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class VisionTransformer(Encoder):
    """Pooled features and patch tokens of a pretrained vision transformer.

    Args:
        path: folder of the checkpoint, or a hub id, downloaded once.
        side: pixels that pictures are resized to, square; default: the size in the checkpoint's config.
    """

    package = "transformers"
    model_class: ClassVar[str]
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    default_side: ClassVar[int | None] = None

    def __init__(self, path: Path | str, side: int | None = None) -> None:
        super().__init__()
        self.folder = str(find_checkpoint(path))
        self.network = load_network(self.folder, self.model_class)
        config = getattr(self.network.config, "vision_config", self.network.config)
        self.side = side or self.default_side or config.image_size
        if self.side % config.patch_size:
            raise ValueError(f"side must be a multiple of the patch size {config.patch_size}, got {self.side}")
        self.weights_sha256 = sha256_of_folder(self.folder)
        self.input = f"{self.side} x {self.side} by antialiased bicubic, mean {self.statistics[0]}, std " + str(
            self.statistics[1]
        )
        self.freeze()

    def normalise(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the network was trained on them."""
        x = three_channels(images)
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in self.statistics)
        return (x - mean) / std

    def run(self, images: Tensor) -> Any:
        """The network's own output; position embeddings are interpolated to another size than the checkpoint's."""
        return self.network(pixel_values=self.normalise(images), interpolate_pos_encoding=True)


class DINOv2(VisionTransformer):
    """Class token and patch tokens after the last norm; with ViT-L/14 the features of FD-DINOv2 (arXiv 2306.04675)."""

    name = "dinov2"
    model_class = "Dinov2Model"
    statistics = IMAGENET
    default_side = 224

    def run(self, images: Tensor) -> Any:
        return self.network(pixel_values=self.normalise(images))  # interpolates without being asked

    def forward(self, images: Tensor) -> Features:
        hidden = self.run(images).last_hidden_state
        return Features(hidden[:, 0], hidden[:, 1:])


class SigLIP(VisionTransformer):
    """The attention-pooled vector and the patch tokens (arXiv 2303.15343)."""

    name = "siglip"
    model_class = "SiglipVisionModel"
    statistics = CENTRED

    def forward(self, images: Tensor) -> Features:
        found = self.run(images)
        return Features(found.pooler_output, found.last_hidden_state)


class CLIP(VisionTransformer):
    """The projected picture embedding and the patch tokens; embeds texts into the same space (arXiv 2103.00020)."""

    name = "clip"
    model_class = "CLIPModel"
    statistics = OPENAI

    def forward(self, images: Tensor) -> Features:
        found = self.network.vision_model(pixel_values=self.normalise(images), interpolate_pos_encoding=True)
        return Features(self.network.visual_projection(found.pooler_output), found.last_hidden_state[:, 1:])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """(B, D) embeddings of captions, for :func:`untwine.evaluation.metrics.clip_score`."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        length = self.network.config.text_config.max_position_embeddings
        tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        device = next(self.network.parameters()).device
        found = self.network.text_model(
            input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
        )
        return self.network.text_projection(found.pooler_output)


WANTED = ["*.json", "*.txt", "*.model", "*.safetensors"]
"""files of a hub repository"""


def find_checkpoint(path: Path | str, argument: str = "path", fix: str = "name the folder of a copy") -> Path:
    """The folder of a checkpoint of transformers: ``path`` itself, else a hub repository, downloaded once.

    Raises:
        ValueError: where it is neither, or the hub does not give it.
    """
    name = str(path)
    if Path(name).is_dir():
        return Path(name)
    owner, _, repository = name.partition("/")
    if not owner or not repository or "/" in repository or owner[0] in ".~" or Path(owner).exists():
        raise ValueError(f"{argument}: {name!r} is no folder here, and no hub id owner/name; {fix}")
    import_transformers()
    from huggingface_hub import snapshot_download

    for offline in (True, False):
        try:
            return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=offline))
        except Exception as error:  # whatever the hub's client raises without a network, a right or a repository
            if not offline:
                raise ValueError(
                    f"{argument}: {name!r} is no folder here, and the hub did not give it: "
                    f"{str(error).splitlines()[0]}; {fix}"
                ) from error
    raise AssertionError


def import_transformers() -> Any:
    """The package; ImportError tells how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this encoder comes with transformers: pip install transformers") from error
    return transformers


def load_network(folder: Path | str, name: str, *, argument: str = "path", optional: tuple[str, ...] = ()) -> Any:
    """The network of a checkpoint, strictly: transformers would fill missing parameters with random numbers.

    Args:
        name: class of transformers.
        optional: prefixes of parameters that may be missing.
    """
    transformers = import_transformers()
    from transformers.utils import logging as settings

    bar = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        network, loading = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{argument}: {folder} cannot be loaded as a {name}: {str(error).splitlines()[0]}") from error
    finally:
        if bar:
            settings.enable_progress_bar()
    if missing := sorted(key for key in loading["missing_keys"] if not key.startswith(optional)):
        raise ValueError(f"{argument}: {folder} holds no complete {name}; it lacks {missing[:5]}")
    return network


def sha256_of_folder(folder: Path | str) -> str:
    """One hash of the weights files of a checkpoint, by name."""
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
    return hashlib.sha256(json.dumps([(f.name, sha256_of(f)) for f in files]).encode()).hexdigest()
