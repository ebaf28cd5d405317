"""The latent cache: images/s to build it and to read it, and a training step from it against one that encodes.

    python benchmarks/latent_cache.py

Images of noise, as hard to encode as any other, a VAE of factor 8 with random weights (the size of Stable Diffusion's
with --width 128; the default is a quarter of that width, for a CPU), and a DDT on its latents. Both trainings see the
same latents up to float rounding; reading and the steps are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import paired, save
from diffusers import AutoencoderKL
from PIL import Image

from untwine.codecs.vae import VAECodec
from untwine.contracts import Batch
from untwine.data.encoding import Encoder
from untwine.data.folder import ImageFolder
from untwine.data.latents import Latents
from untwine.data.loading import Loader
from untwine.diffusion.draws import Draws
from untwine.models.ddt import DDT
from untwine.training.objectives.flow_matching import FlowMatching


def make_pictures(root: Path, count: int, size: int) -> None:
    for i in range(count):
        levels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
        folder = root / f"class-{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).save(folder / f"{i:05d}.png")


def make_vae(folder: Path, width: int) -> VAECodec:
    torch.manual_seed(0)
    widths = [width, 2 * width, 4 * width, 4 * width]
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).save_pretrained(folder)
    return VAECodec(str(folder), mean=(0.0,), std=(1.0,))


class Training:
    """Steps of a small DDT, on batches that a loader makes."""

    def __init__(self, dataset: Any, codec: Any, batch_size: int, num_classes: int) -> None:
        self.batches = itertools.chain.from_iterable(Loader(dataset, codec, seed=0, batch_size=batch_size))
        torch.manual_seed(0)
        self.model = DDT(in_channels=4, num_classes=num_classes, hidden_size=128, depth=6, encoder_depth=4, num_heads=4)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.objective, self.draws = FlowMatching(), Draws(0)

    def read(self) -> Batch:
        return next(self.batches)

    def step(self) -> None:
        loss = self.objective({"model": self.model}, self.read(), update="model", step=0, draws=self.draws)
        self.optimizer.zero_grad()
        loss.total.backward()
        self.optimizer.step()


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    make_pictures(root / "pictures", args.images, args.size)
    codec, folder = make_vae(root / "vae", args.width), ImageFolder(root / "pictures", args.size)
    encoder = Encoder(folder, codec, root / "cache", batch_size=args.batch)
    estimate = encoder.estimate()
    started = time.perf_counter()
    encoder.run()
    seconds = time.perf_counter() - started
    cache = Latents(root / "cache")
    runs = {
        name: Training(data, data.bind(codec), args.batch, folder.num_classes)
        for name, data in {"pictures": folder, "cache": cache}.items()
    }
    reading = paired({name: run.read for name, run in runs.items()}, repeats=args.repeats)
    steps = paired({name: run.step for name, run in runs.items()}, repeats=args.repeats)
    return {
        "build": {
            "images_per_second": args.images / seconds,
            "seconds": seconds,
            "seconds_estimated": estimate.seconds,
            "bytes_per_image": estimate.num_bytes / args.images,
        },
        "batch_ready_images_per_second": {name: args.batch / told["median"] for name, told in reading.items()},
        "step_seconds": steps,
        "step_speedup": steps["pictures"]["median"] / steps["cache"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=32, help="of the autoencoder's first level")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save("latent_cache", {"settings": vars(args), **measure(Path(folder), args)})


if __name__ == "__main__":
    main()
