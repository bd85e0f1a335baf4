"""Trains the small weights that cvworker's modules ship, on pictures that it draws.

    python tools/train detect

Everything follows from --seed: the same command on the same machine gives the same weights, as long as the pictures
are drawn and the sums are split as before. Pictures to train on, to choose thresholds on and to test on have seeds of
their own, and the demo and the tests use others. Drawn pictures are kept in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

TRAINERS = {"threat": "classification", "scene": "classification", "detect": "detection"}
WEIGHTS = Path(__file__).parents[2] / "src" / "cvworker" / "modules" / "weights"


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    # it costs a tenth of the time, and nothing here reads such memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = importlib.import_module(TRAINERS[args.module])
    if args.evaluate:
        print(trainer.evaluate(args.output, args.evaluate, args.module))
    else:
        trainer.run(args, device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", choices=TRAINERS)
    parser.add_argument("--output", type=Path, help="safetensors file to write; default: the one that is shipped")
    parser.add_argument("--evaluate", type=int, metavar="N", help="train nothing: measure the file on N test pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, help="to train on")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="the highest learning rate")
    parser.add_argument("--threads", type=int, help="fixed, since sums depend on how they are split")
    args = parser.parse_args()
    args.output = args.output or WEIGHTS / f"{args.module}.safetensors"
    defaults = importlib.import_module(TRAINERS[args.module]).DEFAULTS
    for name, value in defaults.get(args.module, defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic sums need on a GPU
    main()
