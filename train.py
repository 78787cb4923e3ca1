"""Train a preset: `python train.py --preset ... --out DIR`, `deepspeed train.py ...`, `torchrun train.py ...`.

The same as `fastasync train`; a file at the root, because launchers want one.
"""

import sys

from fastasync.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
