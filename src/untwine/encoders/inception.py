"""Inception-v3 of the FID (Heusel et al., arXiv 1706.08500): the TensorFlow graph of 2015 in torch-fidelity's port."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from torch import Tensor

from untwine.encoders.base import Encoder, Features, sha256_of, three_channels

FILE = "weights-inception-2015-12-05-6726825d.pth"
HASH = "6726825d"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
VARIABLE = "UNTWINE_INCEPTION"


class InceptionV3(Encoder):
    """2048 pooled features for the FID, 1008 logits without bias for the IS, spatial features for the sFID.

    ``tokens`` are the first 7 channels of the 17 x 17 map ``mixed_6/conv``, (B, 289, 7): flattened, they stand in
    TensorFlow's order, height, width, channel (ADM, arXiv 2105.05233; Nash et al., arXiv 2103.03841).

    Args:
        weights: the file; default: ``$UNTWINE_INCEPTION``, then the cache of torch.hub. Nothing is downloaded.
        check_hash: refuse a file that does not hold the published weights.
    """

    name = "inception"
    package = "torch-fidelity"
    input = "299 x 299 by bilinear interpolation in the coordinates of TensorFlow 1, (x - 128) / 128 of levels 0..255"

    def __init__(self, weights: Path | None = None, check_hash: bool = True) -> None:
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception-v3 comes with torch-fidelity: pip install untwine[metrics]") from error
        path = find_weights(weights)
        self.weights_sha256 = sha256_of(path)
        if check_hash and not self.weights_sha256.startswith(HASH):
            raise ValueError(
                f"weights: the sha256 of {path} starts with {self.weights_sha256[:8]}, that of {FILE} with {HASH}; "
                f"get the file again from {URL}"
            )
        # torch-fidelity unpickles whatever is in the file: it gets a copy of what was read safely.
        safe = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
        self.freeze()

    def forward(self, images: Tensor) -> Features:
        found: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: found.append(call[-1][:, :7]))
        try:
            pooled, logits = self.network((three_channels(images) * 255).round().to(torch.uint8))
        finally:
            hook.remove()
        return Features(pooled, found[0].flatten(2).transpose(1, 2), logits)


def find_weights(given: Path | None = None) -> Path:
    """The local weights file.

    Raises:
        ValueError: where there is none; says which file goes where.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    path = named or cached
    if not path.is_file():
        raise ValueError(
            f"weights: the Inception-v3 of the FID is not at {path}; get {FILE} (its sha256 starts with {HASH}) from "
            f"{URL} and put it at {cached}, or name the file by weights= or {VARIABLE}"
        )
    return path
