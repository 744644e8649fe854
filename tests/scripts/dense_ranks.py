"""Runs train_dense.py, after which each process writes the weights it has itself to rank<N>.pt in --output."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import torch

import train_dense
from dense.args import parse_args

if __name__ == "__main__":
    modules = []
    create_module = train_dense.create_module

    def keep_module(*args):
        modules.append(create_module(*args))
        return modules[0]

    train_dense.create_module = keep_module
    train_dense.main()
    torch.save(modules[0].model.state_dict(), parse_args().output / f"rank{os.environ['RANK']}.pt")
