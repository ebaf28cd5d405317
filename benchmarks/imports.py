"""How long ``import untwine`` and ``untwine --help`` take, and what they import.

python benchmarks/imports.py
"""

from __future__ import annotations

import subprocess
import sys

from common import paired, save

IMPORT = "import sys, untwine; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
HELP = (
    "import sys; from untwine.cli import main; main(['--help']); assert not {'torch', 'diffusers'} & set(sys.modules)"
)
RUNS = {"python -c pass": "pass", "import untwine": IMPORT, "untwine --help": HELP, "import torch": "import torch"}


def main() -> None:
    def starts(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    seconds = paired({name: starts(code) for name, code in RUNS.items()}, repeats=5)
    save("imports", {"seconds": seconds})


if __name__ == "__main__":
    main()
