"""Kill -9 at random moments, run the same command again, and compare every state with an uninterrupted run.

    python benchmarks/kill_resume.py --kills 20

Each round starts a run in a process of its own, kills its process group with SIGKILL at a random moment (start-up,
training, saving), and starts it again, until the run has been killed as often as asked; then it is left to finish. The
rounds go through AdamW and Muon, float32 and bf16, with two averages, accumulation 2, two data workers, epochs that end
within the run, and an objective with parameters of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, save

from untwine.training import checkpoint

CASES = {
    "adamw, float32": {},
    "muon, float32": {"optimizer": {"kind": "muon", "lr": 2e-2, "rest": {"kind": "adamw", "lr": 1e-3}}},
    "adamw, bf16": {"train.parallel": {"param_dtype": "bfloat16"}},
    "muon, bf16": {
        "optimizer": {"kind": "muon", "lr": 2e-2, "rest": {"kind": "adamw", "lr": 1e-3}},
        "train.parallel": {"param_dtype": "bfloat16"},
    },
}
COMMON = {
    "objective": {"kind": "flow_matching", "terms": [{"kind": "test_projector"}]},
    "train.num_steps": 60,
    "train.save_every": 5,
    "train.accumulation": 2,
    "train.num_workers": 2,
    "train.validation": 1500,
}
PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from tests.tiny import tiny
from untwine.training.trainer import Trainer
Trainer(tiny(**json.loads(sys.argv[2])), sys.argv[1]).fit(on_step=lambda step: print(step, flush=True))
print("done", flush=True)
"""


def launch(folder: Path, changes: dict) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(changes)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, env=env
    )


def finish(folder: Path, changes: dict) -> dict[str, torch.Tensor]:
    """Runs to the end and reads the last checkpoint's tensors."""
    process = launch(folder, changes)
    output = process.communicate(timeout=600)[0]
    if "done" not in output:
        raise RuntimeError(f"the run in {folder} did not finish")
    return saved(folder)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = checkpoint.latest(folder / "checkpoints")
    assert path is not None
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def kill_at_random(folder: Path, changes: dict, chance: random.Random) -> tuple[int, int]:
    """Starts and kills: the last step heard (-1: none yet), and how many of the steps heard are to be made again."""
    process = launch(folder, changes)
    steps = chance.randint(1, 12)
    early = chance.random() < 0.2
    last = -1
    if early:
        time.sleep(chance.uniform(1.0, 8.0))
    else:
        for heard, line in enumerate(process.stdout or (), start=1):
            if line.strip() == "done":
                break
            last = int(line)
            if heard >= steps:
                break
        time.sleep(chance.uniform(0.0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    path = checkpoint.latest(folder / "checkpoints")
    return last, max(0, last - (0 if path is None else int(path.name.removeprefix("step-"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, shared between the cases")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, rounds = random.Random(options.seed), []
    work = Path(tempfile.mkdtemp(prefix="untwine-kill-"))
    started = time.perf_counter()
    for number, (name, changes) in enumerate(CASES.items()):
        changes = {**COMMON, **changes}
        whole = finish(work / f"{number}-whole", changes)
        kills = options.kills // len(CASES) + (number < options.kills % len(CASES))
        at = [kill_at_random(work / f"{number}-killed", changes, chance) for _ in range(kills)]
        killed = finish(work / f"{number}-killed", changes)
        different = (
            [k for k in whole if not torch.equal(whole[k], killed[k])] if whole.keys() == killed.keys() else ["names"]
        )
        rounds.append(
            {
                "case": name,
                "kills": kills,
                "killed_after_step": [step for step, _ in at],
                "steps_lost": [lost for _, lost in at],
                "tensors": len(whole),
                "different": different,
            }
        )
        print(rounds[-1], flush=True)
    shutil.rmtree(work)
    equal = sum(not r["different"] for r in rounds)
    save(
        "kill_resume",
        {
            "kills": sum(r["kills"] for r in rounds),
            "runs_bitwise_equal": f"{equal} of {len(rounds)}",
            "rounds": rounds,
            "seconds": round(time.perf_counter() - started, 1),
        },
    )
    sys.exit(equal != len(rounds))


if __name__ == "__main__":
    main()
