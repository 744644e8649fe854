"""Runs parts within a budget of time, writes what they find at once, and prints a table."""

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from common.command_line import use_device
from common.record import git_commit, versions, write_json
from common.tables import markdown_table
from gpu_checks.args import card_name
from gpu_checks.parts import Part
from gpu_checks.setup import DeviceLostError, Row, Setup, UnavailableError, is_good

# A part that would get less than this is not started.
LEAST_SECONDS = 5.0


def describe(row: Row) -> str:
    """A row in one line, for the log."""
    if "fault" in row:
        return f"FAULT: {row['fault'].strip().splitlines()[-1]}"
    figures = {key: value for key, value in row.items() if key != "case"}
    error = f"{figures.pop('error'):.2e} <= {figures.pop('limit'):.0e} " if "limit" in row else ""
    return (
        f"{'' if is_good(row) else 'BEYOND LIMIT: '}{error}{json.dumps(figures, default=str)[:300] if figures else ''}"
    )


class Runner:
    """One run of the command.

    Args:
        args: Arguments of gpu_check.py.
        parts: Parts by name, in order.
        script: The command, to be started again where this process has lost the device.
    """

    def __init__(self, args: argparse.Namespace, parts: Mapping[str, Part], script: Path) -> None:
        self.args, self.parts, self.script = args, parts, script
        self.names = [name for name in parts if not args.only or name in args.only]
        device = torch.device(args.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        use_device(device)
        self.setup = Setup(device, args.small)
        self.end = time.monotonic() + 60 * args.minutes
        self.result: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "versions": versions(),
            "device": card_name(args.device),
            "small": args.small,
            "parts": {},
        }
        if args.keep and args.output.exists():
            self.result["parts"] = json.loads(args.output.read_text(encoding="utf-8"))["parts"]
        command = shlex.join(["gpu_check.py", *sys.argv[1:]])
        for name in self.names:
            self.result["parts"][name] = {"status": "waiting", "command": command, "rows": []}

    def run(self) -> bool:
        """Run the parts; whether all in the file are good."""
        for number, name in enumerate(self.names):
            rest = self.names[number:]
            left = self.end - time.monotonic()
            seconds = left * self.parts[name].share / sum(self.parts[other].share for other in rest)
            if seconds < LEAST_SECONDS and number > 0:
                self.finish(name, "skipped", f"{max(left, 0):.0f} s were left for {len(rest)} parts")
                continue
            try:
                self.run_part(name, seconds)
            except DeviceLostError as error:
                self.finish(name, "failed", f"the device was lost {error}")
                if rest[1:]:
                    self.hand_over(rest[1:])
                break
        print(self.table(), flush=True)
        print(f"\nall figures: {self.args.output}", file=sys.stderr)
        return all(record["status"] != "failed" for record in self.result["parts"].values())

    def run_part(self, name: str, seconds: float) -> None:
        """Run one part until it ends, fails, or has had its time.

        Raises:
            DeviceLostError: The device computes no more.
        """
        record = self.result["parts"][name]
        record["status"] = "running"
        self.save()
        start = time.monotonic()
        rows, note, is_cut = self.parts[name].run(replace(self.setup, until=start + seconds)), "", False
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        try:
            for row in rows:
                record["rows"].append(row)
                record["seconds"] = round(time.monotonic() - start, 1)
                print(f"  {row['case']}: {describe(row)}", file=sys.stderr, flush=True)
                self.save()
                if time.monotonic() - start > seconds:
                    is_cut = True
                    rows.close()
                    break
        except UnavailableError as error:
            note = str(error)
        except DeviceLostError:
            raise
        except Exception as error:  # whatever a part raises is what is to be found out
            note = f"{type(error).__name__}: {error}"
            record["fault"] = traceback.format_exc()
            self.setup.check_alive()
        record["seconds"] = round(time.monotonic() - start, 1)
        if "fault" in record or not all(map(is_good, record["rows"])):
            self.finish(name, "failed", note)
        elif note:
            self.finish(name, "unavailable", note)
        elif is_cut:
            self.finish(name, "cut", f"its {seconds:.0f} s were over")
        else:
            self.finish(name, "passed", "")
        if self.setup.on_gpu:
            torch.cuda.empty_cache()

    def finish(self, name: str, status: str, note: str) -> None:
        """Record how a part ended."""
        self.result["parts"][name] |= {"status": status, "note": note}
        print(f"{name}: {status} {note}", file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """Write all that is known."""
        write_json(self.args.output, self.result)

    def hand_over(self, names: list[str]) -> None:
        """Become a new process that runs parts: the device answers it again, and has this one's memory back."""
        minutes = max(self.end - time.monotonic(), 1) / 60
        command = [sys.executable, str(self.script), "--keep", "--minutes", f"{minutes:.2f}"]
        command += ["--output", str(self.args.output), "--device", self.args.device]
        command += ["--small"] * self.args.small
        for name in names:
            command += ["--only", name]
        print(f"a new process goes on with {', '.join(names)}", file=sys.stderr, flush=True)
        os.execv(command[0], command)

    def table(self) -> str:
        """What was found, a line for each part."""
        lines = []
        for name, record in self.result["parts"].items():
            rows = record["rows"]
            bad = [row["case"] for row in rows if not is_good(row)]
            shares = [row["error"] / row["limit"] for row in rows if row.get("limit") and is_good(row)]
            note = record.get("note", "").strip().splitlines()
            found = "; ".join([*note[-1:], *(f"bad: {case}" for case in bad[:3])])
            if len(bad) > 3:
                found += f" and {len(bad) - 3} more"
            if not found and shares:
                found = f"largest error {100 * max(shares):.0f} % of its limit"
            good = f"{len(rows) - len(bad)}/{len(rows)}"
            lines.append([name, record["status"], good, f"{record.get('seconds', 0):.0f}", found[:150] or "-"])
        figures = [line for record in self.result["parts"].values() for line in figures_of(record["rows"])]
        head = f"{self.result['device']}, torch {self.result['versions']['torch']}, commit {self.result['commit']}\n\n"
        return "\n".join([head + markdown_table(("part", "status", "good", "s", "found"), lines), *figures])


def figures_of(rows: list[Row]) -> list[str]:
    """Lines that rows have for the end of the log, as `summary`."""
    return [f"{row['case']}: {row['summary']}" for row in rows if row.get("summary")]
