"""What a results file tells of where its figures come from, and how it is written."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

import fdconv_zoo


def cpu_name() -> str:
    """Return the name of the processor as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "fdconv_zoo": fdconv_zoo.__version__,
    }


def git_commit() -> str:
    """The commit of the code, with `-dirty` where files differ from it; `unknown` outside of a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def timestamp() -> str:
    """Date and time in UTC, to the second, as ISO 8601 writes them."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run_record(command: str, device: str, threads: int) -> dict[str, Any]:
    """What the results of a finished run tell of how they were made.

    Args:
        command: Its command line.
        device: That it ran on.
        threads: Of the CPU.
    """
    return {
        "command": command,
        "date": timestamp(),
        "versions": versions(),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "device": device,
        "threads": threads,
    }


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a file whole or not at all, its folder too; without ``indent`` on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    draft.replace(path)
