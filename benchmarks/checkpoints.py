"""The shipped checkpoints by a named protocol: FD-EffLite0 with its floor, KID, precision, recall, copies.

    python benchmarks/checkpoints.py --checkpoint ddt-digits --reference digits
    python benchmarks/checkpoints.py --checkpoint ddt-fashion --reference fashion
    python benchmarks/checkpoints.py --checkpoint ddt-emoji --reference emoji

Each run adds its checkpoint to ``benchmarks/results/checkpoints.json`` and leaves ``grid.png`` and ``nearest.png`` (the
samples most like a real picture, above that picture) in ``out/checkpoints``. The samples are those of the checkpoint's
own settings, seed 0, classes in turn.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from common import COMMIT, RESULTS, hardware, save

import untwine
from untwine.evaluation.protocols import find_protocol
from untwine.evaluation.references import open_reference
from untwine.evaluation.report import evaluate
from untwine.pipelines.writing import make_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="ddt-digits")
    parser.add_argument("--reference", default="digits", help="as of untwine evaluate")
    parser.add_argument("--protocol", default="fd-efflite0-1k")
    parser.add_argument("--num-samples", type=int)
    parser.add_argument("--out", type=Path, default=Path("out/checkpoints"))
    options = parser.parse_args()
    protocol = find_protocol(options.protocol, num_samples=options.num_samples)
    samples = untwine.sample(options.checkpoint, count=protocol.num_samples, seed=0, batch_size=100)
    out = options.out / options.checkpoint
    report = evaluate(samples.images, open_reference(options.reference), protocol, out=out)
    make_grid(samples.images[:72], columns=18).save(out / "grid.png")
    file = RESULTS / "checkpoints.json"
    known = json.loads(file.read_text(encoding="utf-8"))["checkpoints"] if file.is_file() else {}
    values = {name: report.values[name] for name in ("metrics", "floor", "memorisation", "counts", "protocol")}
    name = re.sub(r"(?<=[:,])root=[^,]*,?", "", options.reference).rstrip(":,")  # where it lies is no part of it
    told = {
        "reference": name,
        "sampling": samples.report["sampling"],
        "seconds": samples.report["seconds"],
    }
    about = {"commit": COMMIT, "threads": torch.get_num_threads(), "cpu": hardware()["cpu"]}
    save("checkpoints", {"checkpoints": {**known, options.checkpoint: {**values, **told, **about}}})


if __name__ == "__main__":
    main()
