"""What a checkpoint costs a training loop, written at once and in the background, and what its hashes cost a reader.

python benchmarks/saving.py --device cpu

The state is that of a DDT with AdamW and one average: four numbers a parameter. The stall is how long the loop waits
for a save; of one in the background the rest is told as well, during which steps are made as ever.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, save

sys.path.insert(0, str(ROOT))
from tests.tiny import tiny

from untwine.training.checkpoint import verify
from untwine.training.saving import Keeper
from untwine.training.trainer import Trainer


def _seconds(fn: Any, *args: Any, **options: Any) -> float:
    started = time.perf_counter()
    fn(*args, **options)
    return time.perf_counter() - started


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = {"kind": "ddt", "hidden_size": options.width, "depth": 12, "encoder_depth": 9, "num_heads": 6}
    recipe = tiny(**{"model": model, "train.async_save": True, "ema": [{"kind": "constant", "decay": 0.999}]})
    trainer = Trainer(recipe, folder / "run", device=options.device)
    networks = trainer.networks
    size = sum(t.numel() * t.element_size() for t in networks.tensors().values())
    found: dict[str, list[float]] = {"at_once": [], "stall": [], "rest": [], "verify": []}
    with Keeper(folder / "kept", trainer.recipe, {"data": {}}) as keeper:
        keeper.save(0, networks, in_background=True)  # allocates the copy
        for step in range(1, 2 * options.repeats, 2):
            keeper.settle()
            found["at_once"].append(_seconds(keeper.save, step, networks))
            found["stall"].append(_seconds(keeper.save, step + 1, networks, in_background=True))
            found["rest"].append(_seconds(keeper.settle))
            assert keeper.path is not None
            found["verify"].append(_seconds(verify, keeper.path))
    medians = {name: statistics.median(values) for name, values in found.items()}
    gigabytes = size / 1e9
    return {
        "parameters": sum(p.numel() for p in networks.model.parameters()),
        "gigabytes": gigabytes,
        "seconds": medians,
        "stall_seconds_per_gb": {"at once": medians["at_once"] / gigabytes, "background": medians["stall"] / gigabytes},
        "verify_seconds_per_gb": medians["verify"] / gigabytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="untwine-") as folder:
        save("saving", {"settings": vars(options), **measure(Path(folder), options)})


if __name__ == "__main__":
    main()
