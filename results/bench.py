"""Measures the speed table: each row beside its baseline, in one run on one machine.

    python results/bench.py --data FOLDER       make bench DATA=FOLDER

Writes bench-cpu.json beside this file, or bench-cuda.json on an NVIDIA GPU. Ours and the baseline
take turns. A time is the median over the turns, a spread is (longest - shortest) / median.
"""
import argparse
import copy
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from figures import HERE, ROOT

sys.path.insert(0, str(ROOT))
import train_squad as ts                                                        # noqa: E402
from bert import load_model, load_tokenizer                                     # noqa: E402

DEVICE = "cpu"
if torch.cuda.is_available():
    DEVICE = "cuda"
TURNS = 31


def training(config: ts.Config, features: ts.Features, batches: list[np.ndarray]):
    """A function that does a training step, without a teacher, on one batch after another."""
    torch.manual_seed(0)
    model = load_model(config.init, fresh_head=True).to(DEVICE).train()
    for layer in model.bert.layers:
        layer.attention.dropout = config.attention_dropout
    if config.method != "dense":
        ts.add_masks(model, config.method, config.block)
    optimizer = ts.make_optimizer(model, config)
    # Every step is one in the middle of a run, where τ rises.
    step, total, warmup = 50, 100, 5

    def steps() -> None:
        for windows in batches:
            batch = features.batch(windows, DEVICE)
            terms = ts.step_loss(model, batch, None, step, config, total, warmup)
            optimizer.zero_grad()
            terms["loss"].backward()
            ts.update(model, optimizer, step, config, total, warmup)
    return steps


def take_turns(works: list, turns: int) -> list[list[float]]:
    """Milliseconds of each work in each turn."""
    synchronize = torch.get_device_module(DEVICE).synchronize       # does nothing on a CPU
    times: list[list[float]] = [[] for _ in works]
    for _ in range(1 + turns):
        for work, of_work in zip(works, times):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            of_work.append(1000 * (time.perf_counter() - start))
    # The first turn warmed up.
    return [of_work[1:] for of_work in times]


def row(what: str, unit: str, baseline: list[float], ours: list[float]) -> dict:
    """Print a row of the table, and return it. The ratio is that of medians, ours / baseline."""
    before = statistics.median(baseline)
    after = statistics.median(ours)
    found = {"what": what, "baseline": before, "ours": after, "unit": unit, "ratio": after / before,
             "spread": (max(ours) - min(ours)) / after}
    print(found, flush=True)
    return found


def rates(windows: int, times: list[float]) -> list[float]:
    """Windows a second."""
    return [1000 * windows / milliseconds for milliseconds in times]


def training_row(config: ts.Config, features: ts.Features, dropout: float) -> dict:
    """Training against the reference recipe: fp32, every window padded to max_length."""
    padded = copy.copy(features)
    padded.lengths = np.full_like(features.lengths, config.max_length)
    config = dataclasses.replace(config, method="dense")
    reference = dataclasses.replace(config, precision="fp32", attention_dropout=dropout)
    # Five batches of all lengths. Padded, one batch takes as long as another.
    batches = ts.training_batches(features.lengths, 16, seed=0, epoch=0)
    batches.sort(key=lambda windows: features.lengths[windows].max())
    some = batches[len(batches) // 10::len(batches) // 5]
    works = [training(reference, padded, some[:1]), training(config, features, some)]
    baseline, ours = take_turns(works, TURNS // 3)
    what = (f"training in {config.precision}, against fp32, all padded to {config.max_length}, "
            f"attention dropout {dropout:g}")
    return row(what, "examples/s", rates(16, baseline), rates(16 * len(some), ours))


def a_step(config: ts.Config, features: ts.Features, method: str):
    """A training step on the shortest 16 windows of the longer half."""
    windows = np.argsort(features.lengths)[len(features) // 2:][:16]
    return training(dataclasses.replace(config, method=method), features, [windows])


def peak_megabytes(step) -> float:
    """The most memory of this process, after five steps."""
    for _ in range(5):
        step()
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6     # Linux: KiB


def memory_row(arguments: list[str]) -> dict:
    """Memory of a masked step against a dense one, each in a process of its own."""
    peaks = []
    for method in ("dense", "hybrid"):
        command = [sys.executable, __file__, *arguments, "--memory", method]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks.append(float(printed.splitlines()[-1]))
    return row("peak memory of a masked training step against a dense one", "MB", peaks[:1],
               peaks[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train-v1.1.json")
    parser.add_argument("--init", default="weights/minilm", help="model folder to start from")
    parser.add_argument("--memory", help="print the memory of this method: how it calls itself")
    a = parser.parse_args()
    # The settings of a pruning; for a dense step the method is replaced.
    config = ts.fill_in(ts.Config(data=a.data, init=a.init, device=DEVICE, method="hybrid"))
    squad = ts.read_squad(config.data, "train-v1.1.json", 800)
    features = ts.Features(squad, load_tokenizer(a.init), config, training=True)
    if a.memory:
        print(peak_megabytes(a_step(config, features, a.memory)))
        return

    # Memory first: on Linux the peak of a new process counts the size of the one that starts it.
    rows = [memory_row(sys.argv[1:])]
    works = [a_step(config, features, "dense"), a_step(config, features, "hybrid")]
    what = f"a masked (Hybrid 32x32) training step in {config.precision} against a dense one"
    rows.append(row(what, "ms", *take_turns(works, TURNS)))
    for dropout in (0.1, 0.0):
        rows.append(training_row(config, features, dropout))
    machine = ts.environment(DEVICE)
    found = {"rows": rows, "device": machine["processor"], "threads": machine["threads"],
             "torch": machine["torch"], "data": a.data,
             "command": " ".join(["python", "results/bench.py", *sys.argv[1:]])}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (HERE / f"bench-{DEVICE}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
