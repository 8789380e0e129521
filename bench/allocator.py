"""Cost of the C library's allocator, and its effect on the ranking of models.

Times timm models in new processes, which alternate between two settings. In one, the process keeps
the memory it frees (`hovit.utils.device.keep_freed_memory`, as `hovit measure` does); in the other,
glibc returns large blocks to the system. For each model it prints the ratio of the two settings
(median and quartiles over pairs of processes), and, for each setting, the model's time over that of
the first model (median and range over processes). The file has the median of every process.
`--workload gradients` times a forward and a backward pass.

    python bench/allocator.py
    python bench/allocator.py --models swin_tiny_patch4_window7_224 resnet50 --batch 1 --threads 2
    python bench/allocator.py --models levit_deck hovit --batch 32 --workload gradients
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch

import hovit.models  # noqa: F401 (registers)
from hovit.measure.latency import forward_ms, gradients_ms, measure_latency, summary
from hovit.utils.device import describe_device, keep_freed_memory
from hovit.utils.files import write_json

WAYS = ("kept", "returned")
TIMERS = {"inference": forward_ms, "gradients": gradients_ms}


def time_models(options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each model in this process."""
    torch.set_num_threads(options.threads)
    if options.way == "kept" and not keep_freed_memory():
        sys.exit("error: this C library has no mallopt: only glibc's allocator is compared")
    models = {name: timm.create_model(name) for name in options.models}
    samples = measure_latency(
        models, torch.device("cpu"), image_size=224, batches=(options.batch,),
        rounds=options.rounds, warmup=2, timer=TIMERS[options.workload],
    )  # fmt: skip
    return {
        name: float(np.median(by_batch[str(options.batch)])) for name, by_batch in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["efficientvit_paper_m5", "efficientnet_b0", "mobilenetv3_large_100", "resnet50"]
    parser.add_argument("--models", nargs="+", default=models, help="timm models at 224 px")
    parser.add_argument("--workload", choices=TIMERS, default="inference",
                        help="gradients: a forward and a backward pass")  # fmt: skip
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5, help="processes for each setting")
    parser.add_argument("--way", choices=WAYS, help="time in this process and print JSON")
    parser.add_argument("--out", type=Path, default=Path("results/bench/allocator.json"))
    options = parser.parse_args()
    if options.way:
        print(json.dumps(time_models(options)))
        return
    if min(options.batch, options.threads, options.rounds, options.processes) < 1:
        parser.error("--batch, --threads, --rounds and --processes: 1 at least")
    unknown = [name for name in options.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm knows no model {', '.join(unknown)}")
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.processes):
        for way in WAYS:
            child = subprocess.run(
                [sys.executable, *sys.argv, "--way", way], stdout=subprocess.PIPE, text=True
            )
            if child.returncode:
                sys.exit(child.returncode)
            times[way].append(json.loads(child.stdout))
    found = {}
    for name in options.models:
        ms = {way: [each[name] for each in times[way]] for way in WAYS}
        slower = summary([a / b for a, b in zip(ms["returned"], ms["kept"], strict=True)])
        over = {way: [each[name] / each[options.models[0]] for each in times[way]] for way in WAYS}
        found[name] = {"ms": ms, "returned / kept": slower, "over the first": over}
        spread = "; ".join(
            f"{way} {np.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for way, r in over.items()
        )
        ratio = "{median:.2f} ({q1:.2f} to {q3:.2f})".format(**slower)
        print(f"{name}: returned {ratio} times kept; over {options.models[0]}: {spread}")
    torch.set_num_threads(options.threads)
    about = {"device": describe_device(torch.device("cpu")).model_dump(), "batch": options.batch,
             "workload": options.workload}  # fmt: skip
    write_json(options.out, about | {"torch": torch.__version__, "models": found})
    print(f"n = {options.processes} processes for each setting; written to {options.out}")


if __name__ == "__main__":
    main()
