"""The latent cache: images/s to build it and to read it, and a training step from it against one that encodes.

    python benchmarks/latent_cache.py

It is built by one process and by two, in turn, each with one thread: what a second one gains where there is a core for
it. Pictures are read from their folder and from tar shards.

Images of noise, as hard to encode as any other, a VAE of factor 8 with random weights (the size of Stable Diffusion's
with --width 128; the default is a quarter of that width, for a CPU), and a DDT on its latents. Both trainings see the
same latents up to float rounding; reading and the steps are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import tarfile
import tempfile
import time
from functools import partial
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
from untwine.data.shards import Shards
from untwine.diffusion.draws import Draws
from untwine.models.ddt import DDT
from untwine.training.distributed import Distributed, together
from untwine.training.objectives.flow_matching import FlowMatching

PORT = "29611"


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


def encode(rank: int, world_size: int, root: Path, args: argparse.Namespace, queue: Any) -> None:
    """One of the processes that build a cache; rank 0 tells how long it took and what it was estimated to take."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    processes = Distributed.start("cpu")
    codec = VAECodec(str(root / "vae"), mean=(0.0,), std=(1.0,))
    out, shards = root / f"cache-{world_size}", -(-args.images // 8)
    encoder = Encoder(ImageFolder(root / "pictures", args.size), codec, out, batch_size=args.batch, shard_size=shards)
    estimate = encoder.estimate()
    processes.barrier()
    started = time.perf_counter()
    encoder.run(rank=rank, world_size=world_size, together=together)
    if rank == 0:
        queue.put((time.perf_counter() - started, estimate))
    processes.close()


def build(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Images/s of one process, and of two."""
    context, told = torch.multiprocessing.get_context("spawn"), {}
    for count in (1, 2):
        queue = context.SimpleQueue()
        options = (count, root, args, queue)
        torch.multiprocessing.spawn(encode, options, nprocs=count)
        seconds, estimate = queue.get()
        told[count] = {
            "images_per_second": args.images / seconds,
            "seconds": seconds,
            "seconds_estimated_by_one": estimate.seconds,
            "bytes_per_image": estimate.num_bytes / args.images,
        }
    files = {count: sorted((root / f"cache-{count}").iterdir()) for count in (1, 2)}
    same = all(a.read_bytes() == b.read_bytes() for a, b in zip(files[1], files[2], strict=True))
    return {**told[1], "by_two_processes": {**told[2], "same_bytes": same}}


def read_pictures(folder: ImageFolder, root: Path, args: argparse.Namespace) -> dict[str, float]:
    """Pictures/s, decoded and cut, from files and from the same files in one shard."""
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "all.tar", "w") as tar:
        for name in folder.files:
            tar.add(folder.root / name, name)
    sources = {"folder": folder, "shards": Shards(root / "shards", args.size)}
    order = Draws(0).permutation("read", len(folder), 0).tolist()
    runs = {name: partial(lambda source: [source.read(k) for k in order], source) for name, source in sources.items()}
    return {name: len(folder) / told["median"] for name, told in paired(runs, repeats=args.repeats).items()}


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    make_pictures(root / "pictures", args.images, args.size)
    codec, folder = make_vae(root / "vae", args.width), ImageFolder(root / "pictures", args.size)
    building = build(root, args)
    cache = Latents(root / "cache-1")
    runs = {
        name: Training(data, data.bind(codec), args.batch, folder.num_classes)
        for name, data in {"pictures": folder, "cache": cache}.items()
    }
    reading = paired({name: run.read for name, run in runs.items()}, repeats=args.repeats)
    steps = paired({name: run.step for name, run in runs.items()}, repeats=args.repeats)
    return {
        "build": building,
        "pictures_read_per_second": read_pictures(folder, root, args),
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
