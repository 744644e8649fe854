"""Wall time of a cold and a warm `create_model(pretrained=True)`: `python -m tests.hub.walltime --help`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import timm
from safetensors.torch import save

import fdconv_zoo  # noqa: F401  (registers the models)
from tests.fakehub import FakeHub, as_endpoint


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hub.walltime",
        description="Load a model from a loop-back Hub that holds (random) weights of its static twin.",
    )
    parser.add_argument("--model", default="resnet50_fdconv", help="model of the zoo")
    parser.add_argument("--static", default="resnet50", help="its static twin")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind; medians are printed")
    args = parser.parse_args()
    content = save(timm.create_model(args.static).state_dict())
    print(f"{args.model}, {len(content) / 1e6:.1f} MB, median of {args.repeats}")

    with as_endpoint(FakeHub()) as hub:
        commit = hub.add("org/net", {"model.safetensors": content})

        def load(name: str, cache_dir: str) -> None:
            overlay = {"hf_hub_id": f"org/net@{commit}", "hf_hub_filename": "model.safetensors"}
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir)

        for name in (args.static, args.model):
            built = statistics.median(seconds(lambda name=name: timm.create_model(name)) for _ in range(args.repeats))
            cold, warm = [], []
            for _ in range(args.repeats):
                with tempfile.TemporaryDirectory() as cache_dir:
                    cold.append(seconds(lambda name=name, cache=cache_dir: load(name, cache)))
                    warm.append(seconds(lambda name=name, cache=cache_dir: load(name, cache)))
            times = f"cold {statistics.median(cold):.2f} s, warm {statistics.median(warm):.2f} s"
            print(f"{name}: without weights {built:.2f} s, {times}")


if __name__ == "__main__":
    main()
