"""Runs train_dense.py, after which each process writes its own weights and losses to rank<N>.pt in --output."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import torch

import train_dense
from dense.args import parse_args
from dense.modules import DenseModule

if __name__ == "__main__":
    modules = []
    create_module = train_dense.create_module

    def keep_module(*args):
        modules.append(create_module(*args))
        return modules[0]

    losses = []
    log_losses = DenseModule.log_losses

    def keep_losses(self, of_pass, batch_index):
        losses.append(of_pass["loss"].item())
        log_losses(self, of_pass, batch_index)

    train_dense.create_module, DenseModule.log_losses = keep_module, keep_losses
    train_dense.main()
    found = {"weights": modules[0].model.state_dict(), "losses": losses}
    torch.save(found, parse_args().output / f"rank{os.environ['RANK']}.pt")
