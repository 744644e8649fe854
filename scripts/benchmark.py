#!/usr/bin/env python3
"""Measure what FDConv models cost beside their static twins: time, memory, parameters and MACs."""

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarking.args import check_args, parse_args
from benchmarking.measure import measure
from benchmarking.models import (
    Pair,
    expand_fdconv_names,
    layer_pair,
    model_pair,
    parts_pair,
    small_net_pair,
)
from benchmarking.picture import draw
from benchmarking.report import Row, describe, full_table, preset_table
from benchmarking.traffic import traffic_table
from common.command_line import fail, use_device
from common.record import cpu_name, timestamp, versions, write_json
from fdconv_zoo.cost import count_macs, count_parameters

TABLE_MODELS = ("resnet50_fdconv", "convnext_tiny_fdconv", "swin_tiny_fdconv")
TABLE_WORKLOADS = ((1, "eval"), (8, "eval"), (4, "train"))

SMALL_WORKLOADS = ((1, "eval"), (8, "eval"))
SMALL_PARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("layer[1234]", {}),  # what resnet18_fdconv converts
    ("layer[1234]", {"num_bands": 4}),
    ("layer[123]", {}),
    ("layer[12]", {}),
)

Workload = tuple[int, str]  # batch size, mode
Plan = list[tuple[Callable[[], Pair], Sequence[Workload]]]


def make_plan(args: argparse.Namespace) -> Plan:
    """Return how to build each pair, with the workloads it is measured on.

    Raises:
        ValueError: A model is unknown or has no static twin.
    """
    if args.preset == "small-images":
        return [
            (partial(parts_pair, "resnet18", parts, args.img_size[0], args.seed, **options), SMALL_WORKLOADS)
            for parts, options in SMALL_PARTS
        ]
    if args.preset:
        build = partial(model_pair, img_size=args.img_size[0], seed=args.seed, model_kwargs=args.model_kwargs)
        plan: Plan = [(partial(build, name), TABLE_WORKLOADS) for name in TABLE_MODELS]
        plan.append((partial(layer_pair, args.seed), [(8, "eval")]))
        plan.append((partial(small_net_pair, args.seed), [(64, "train")]))
        return plan
    workloads = [(batch, mode) for mode, batch in product(args.mode, args.batch_size)]
    return [
        (partial(model_pair, name, size, args.seed, args.model_kwargs), workloads)
        for name, size in product(expand_fdconv_names(args.model), args.img_size)
    ]


def run_plan(plan: Plan, args: argparse.Namespace, rows: list[Row], save: Callable[[], None]) -> None:
    """Measure everything, append to `rows`, and call `save` after every measurement.

    A workload that fails (memory, a compiler) is a row with its `error`; the others go on.

    Raises:
        ValueError, RuntimeError: A pair can't be built, or not with that image size.
    """
    total = sum(len(workloads) for _, workloads in plan) * len(args.threads)
    count = 0
    for build, workloads in plan:
        gc.collect()  # the last pair's weights
        pair = build()
        costs = {
            kind: {"parameters": count_parameters(model), "macs": count_macs(model, pair.input_size)}
            for kind, model in (("static", pair.static), ("fdconv", pair.fdconv))
        }
        for (batch_size, mode), threads in product(workloads, args.threads):
            count += 1
            workload: dict[str, Any] = {"mode": mode, "batch_size": batch_size, "img_size": pair.input_size[1]}
            what = f"{pair.name}, {mode}, batch {batch_size}, {pair.input_size[1]} px, threads: {threads}"
            print(f"[{count}/{total}] {what}", file=sys.stderr, flush=True)
            try:
                measured = measure(pair, batch_size, mode, threads, args)
            except Exception as error:  # of torch, its compilers and the C++ compiler behind them: no common base
                message = str(error).strip().splitlines() or [type(error).__name__]
                print(f"  failed: {message[0]}", file=sys.stderr, flush=True)
                names = {"model": pair.name, "static_model": pair.static_name}
                measured = [{**names, **workload, "threads": threads, "engine": "-", "error": "\n".join(message)}]
            for row in measured:
                if "error" not in row:
                    print(describe(row), file=sys.stderr, flush=True)
                    for kind, cost in costs.items():
                        row[kind].update(cost)
            rows += measured
            save()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_args(args)
        use_device(args.device)
        plan = make_plan(args)
    except ValueError as error:
        raise fail("benchmark.py", error) from error

    rows: list[Row] = []
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else cpu_name()
    result = {
        "command": shlex.join(["benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": timestamp(),
        "versions": versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": device,
        "settings": {key: str(value) for key, value in vars(args).items()},
        "rows": rows,
    }
    if args.traffic:
        pairs = (build() for build, _ in plan if build.func in (model_pair, parts_pair))
        rows[:], table = traffic_table(pairs, args.batch_size[0], getattr(torch, args.traffic), "train" in args.mode)
        write_json(args.results_file, result)
        print(
            f"{table}\n\nbatch {args.batch_size[0]}, {args.traffic}, {args.mode[0]}: counted with fake tensors, not run"
        )
        return
    ending = None
    try:
        run_plan(plan, args, rows, lambda: write_json(args.results_file, result))
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
        ending = SystemExit(130)
    except (ValueError, RuntimeError) as error:  # a pair that can't be built, or not with that image size
        ending = fail("benchmark.py", error)
    if rows:
        print(f"{device}, {', '.join(f'{name} {version}' for name, version in result['versions'].items())}\n")
        if args.preset:
            print(preset_table(rows), end="\n\n")
        print(full_table(rows), flush=True)
        print(f"\nall figures: {args.results_file}", file=sys.stderr)
        if args.plot:
            drawn = draw(rows, args.plot, device)
            print(f"picture: {args.plot}" if drawn else "no picture: no two points of a line", file=sys.stderr)
    if ending:
        raise ending
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
