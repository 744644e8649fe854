"""What command lines share: the layout of their help, errors in one line, a device that is there."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What stands before the message of an error in a loader process: all frames, and its type where it has a message.
TRACEBACK = re.compile(r'\A.*^  File "[^\n]*\n(?: +[^\n]*\n)*(?:[\w.]+: )?', re.MULTILINE | re.DOTALL)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of the examples, and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False, {}, []):
            return action.help
        return super()._get_help_string(action)


def fail(program: str, error: object) -> SystemExit:
    """Return the exit for a mistake that is not the program's: one line on stderr, status 1."""
    told = str(error)
    if " in DataLoader worker process " in told:
        told = TRACEBACK.sub("", told)
    return SystemExit(f"{program}: error: {' '.join(told.split())}")


@contextmanager
def needs_extra(program: str, extra: str) -> Iterator[None]:
    """Imports of a command: without the extra that brings them it ends in one line that says so."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise fail(program, f"needs {error.name}: pip install -e '.[{extra}]'") from error


def check_device(device: str) -> None:
    """Refuse a device that this machine or this torch does not have.

    Raises:
        ValueError: Says why.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def use_device(device: str | torch.device) -> None:
    """Make one GPU of several the current one: streams, events and captures that name no device are on that one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
