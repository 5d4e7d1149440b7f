"""Measures the speed table: each row beside its baseline, in one run on one machine.

    python results/bench.py --data FOLDER       (make bench DATA=FOLDER; the built-in corpus without one)

Writes bench-cpu.json or bench-cuda.json beside this file. Ours and the baseline take turns; a time is the
median over the turns, the spread is (longest - shortest) / median. The baselines run the same model through
scaled_dot_product_attention: what differs is what is named in the row. Attention dropout, which the reference
recipe has, alone takes torch off its fast kernel on a CPU; so rows 1 and 2 stand without it too.
"""
import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import blockprune                                                                   # noqa: E402
import train_squad as ts                                                            # noqa: E402
from bert import BertConfig, BertForQuestionAnswering, load_model, load_tokenizer   # noqa: E402
from compact import benchmark, flops                                                # noqa: E402

HEADLINE = dict(heads=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],     # of the paper's model: 26.2 % of its weights
                ffn=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURNS = 5


# ---------------------------------------------------------------------------------------- arithmetic

def seconds(work) -> float:
    """Of one call, the GPU's queue included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(*works, turns: int = TURNS) -> list[list[float]]:
    """Seconds of each work by turn; works are called with the number of the turn, and once before to warm up."""
    for work in works:
        work(0)
    times = [[seconds(lambda: work(turn)) for work in works] for turn in range(turns)]
    return [list(column) for column in zip(*times)]


def spread(times: list[float]) -> float:
    return (max(times) - min(times)) / statistics.median(times)


def row(goal: str, what: str, baseline: float | None, ours: float | None, unit: str, ratio: float | None, wanted: float | None,
        noise: float = 0.0, at_most: bool = False) -> dict:
    """A row of the table. baseline, ours: in `unit`, None where not measured; wanted: of the ratio, None for a side remark."""
    met = None if None in (ratio, wanted) else bool(ratio <= wanted if at_most else ratio >= wanted)
    numbers = [f"{x:.4g}" for x in (baseline, ours) if x is not None]
    print(f"{goal:3} {what}: {' -> '.join(numbers)} {unit}, {ratio and round(ratio, 3)} (wanted {'<=' if at_most else '>='} "
          f"{wanted}) {'MISSED' if met is False else ''}", flush=True)
    return dict(goal=goal, what=what, baseline=baseline, ours=ours, unit=unit, ratio=ratio, wanted=wanted, at_most=at_most,
                met=met, spread=noise)


def not_here(goal: str, what: str, wanted: float) -> dict:
    return row(goal, f"{what}: not measured, this processor has no bf16 units", None, None, "", None, wanted)


# ------------------------------------------------------------------------------------------- training

def stepper(config: ts.Config, features: ts.Features, attention_dropout: float, fused: bool, masked: bool = False):
    """A training step as in train(), without a teacher: a function of the windows and a length to pad to."""
    torch.manual_seed(0)
    model = load_model(config.init, fresh_head=True).train()
    for layer in model.bert.layers:
        layer.attention.dropout = attention_dropout
    if masked:
        ts.add_masks(model, "hybrid", "32x32")
        blockprune.set_threshold(model, 0.05)
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(blockprune.parameter_groups(model, 1e-5, 1e-5), **({"fused": True} if fused else {}))

    def step(indices, length=None):
        batch = features.batch(indices, DEVICE)
        if length:
            batch = {name: torch.nn.functional.pad(t, (0, length - t.shape[1])) if t.dim() == 2 else t
                     for name, t in batch.items()}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = model(batch["ids"], batch["types"], batch["real"])
        loss = ts.loss_terms(logits, None, batch, 2)[0]
        if masked:
            loss = loss + blockprune.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def training(config: ts.Config, features: ts.Features) -> list[dict]:
    """Rows 1 and 2: every turn of ours is TURNS-th of all batches of an epoch's sample, by length."""
    batches = sorted(ts.training_batches(features.lengths, 16, 0, 0), key=lambda b: features.lengths[b].max())
    parts, full = [batches[turn::TURNS] for turn in range(TURNS)], [b for b in batches if len(b) == 16]

    def against(padded, precision: str):
        step = stepper(dataclasses.replace(config, precision=precision), features, 0.0, fused=True)
        ours, theirs = take_turns(lambda turn: [step(b) for b in parts[turn]],
                                  lambda turn: [padded(full[turn], config.max_length) for _ in range(2)])
        done, base = [sum(map(len, part)) / t for part, t in zip(parts, ours)], 32 / statistics.median(theirs)
        return base, statistics.median(done), "examples/s", statistics.median(done) / base, spread(done)

    def as_row(goal, what, wanted, measured):
        return row(goal, what, *measured[:4], wanted, measured[4])
    fp32 = dataclasses.replace(config, precision="fp32")
    reference, plain = (stepper(fp32, features, dropout, fused=False) for dropout in (0.1, 0.0))
    what = "training in {}, against the reference recipe: fp32, all padded to 384, attention dropout, plain AdamW"
    also, rows = "the same, but no attention dropout in the baseline either", []
    for goal, precision, wanted in (("1", "bf16", 8), ("2", "fp32", 3.5)):
        if precision in ("fp32", config.precision):
            rows += [as_row(goal, what.format(precision), wanted, against(reference, precision)),
                     as_row(goal, also, None, against(plain, precision))]
        else:
            rows.append(not_here(goal, what.format(precision), wanted))
    return rows


def evaluation(config: ts.Config, features: ts.Features) -> list[dict]:
    """Row 3: features to predictions; the baseline pads all to 384, in the authors' batches of 128 and in batches like ours."""
    model, fp32, ours = load_model(config.init, fresh_head=True), dataclasses.replace(config, precision="fp32"), ts.evaluation_batches

    def padded(size):
        whole = features.lengths
        features.lengths = np.full_like(whole, config.max_length)
        if size:    # in the order of the file
            ts.evaluation_batches = lambda lengths, device: np.split(np.arange(len(lengths)), range(size, len(lengths), size))
        try:
            ts.predict(model, features, fp32)
        finally:
            features.lengths, ts.evaluation_batches = whole, ours
    times = take_turns(lambda turn: ts.predict(model, features, config), lambda turn: padded(128), lambda turn: padded(0), turns=3)
    per_second = [len(features) / statistics.median(t) for t in times]
    what = f"dev windows to predictions in {config.precision}, against fp32, all padded to 384"
    return [row("3", what + more, base, per_second[0], "windows/s", per_second[0] / base, wanted, spread(times[0]))
            for more, base, wanted in ((", batches of 128 as the authors'", per_second[1], 6), (", batches like ours", per_second[2], None))]


def masked_step(config: ts.Config, features: ts.Features) -> dict:
    """Row 4: the time of a Hybrid 32x32 step against a dense one."""
    batch = np.argsort(features.lengths)[len(features) // 2:][:16]
    dense, masked = (stepper(config, features, 0.0, True, masked=m) for m in (False, True))
    a, b = take_turns(lambda turn: dense(batch), lambda turn: masked(batch), turns=31)
    a, b, noise = statistics.median(a), statistics.median(b), spread(b)
    return row("4", f"a masked (Hybrid 32x32) training step in {config.precision} against a dense one", 1000 * a, 1000 * b, "ms",
               b / a, 1.08, noise, at_most=True)


# ------------------------------------------------------------------------------- forward, features, tests

def forward(goal: str, what: str, dense: BertConfig, small: BertConfig, batch: int, length: int, precision: str,
            wanted: float, of_flops: bool = False) -> dict:
    """Random weights: speed does not depend on them."""
    torch.manual_seed(0)
    a, b = benchmark([BertForQuestionAnswering(c) for c in (dense, small)], batch, length, 21, precision, DEVICE)
    bound, ratio = flops(dense, length) / flops(small, length), statistics.median(a) / statistics.median(b)
    return row(goal, f"{what}, {batch} x {length}, {precision}: {ratio:.2f} x, FLOPs {bound:.2f} x", statistics.median(a),
               statistics.median(b), "ms", ratio / bound if of_flops else ratio, wanted, spread(b))


def forwards(best: str) -> list[dict]:
    """Rows 5 and 6. best: bf16, where the machine multiplies in it."""
    headline = "headline architecture against BERT-base"
    left = json.loads((ROOT / "results/squad-10000/hybrid-compact/results.json").read_text())
    mini = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    small = dataclasses.replace(mini, heads=left["heads"], ffn=left["ffn"])
    goals = ((8, "fp32", 3.4), (8, "bf16", 2.7)) if DEVICE == "cpu" else ((128, "fp32", 2.44), (128, "bf16", 2.44))
    return [forward("5", "compact MiniLM of results/squad-10000 against dense, as a share of the FLOP ratio", mini, small, 32,
                    128, "fp32", 0.85, of_flops=True),
            *(forward("6", headline, BertConfig(), BertConfig(**HEADLINE), batch, 384, precision, wanted)
              if precision in ("fp32", best) else not_here("6", f"{headline}, {batch} x 384, bf16", wanted)
              for batch, precision, wanted in goals)]


def in_processes(config: ts.Config) -> list[dict]:
    """Rows 4 and 7, memory in a process each. To be run first: on Linux a child's peak counts its parent's size."""
    def child(name: str) -> list[float]:
        command = [sys.executable, __file__, "--data", config.data, "--memory", name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [float(x) for x in printed.splitlines()[-1].split()]
    count, took, peak = child("features")
    dense, masked = child("dense")[-1], child("masked")[-1]
    return [row("4", "peak memory of a masked training step against a dense one", dense, masked, "MB", masked / dense, 1.10,
                at_most=True),
            row("7", f"features of all {count:,.0f} questions", None, took, "s", took, 60, at_most=True),
            row("7", "their peak memory", None, peak, "MB", peak, 1000, at_most=True)]


def memory(name: str, config: ts.Config) -> None:
    """In a process of its own: prints (for features their number, their seconds and) the peak in MB."""
    found = ()
    if name == "features":
        start = time.perf_counter()
        squad = ts.read_squad(config.data, "train-v1.1.json")
        ts.Features(squad, load_tokenizer(config.init), config, training=True)
        found = len(squad.questions), time.perf_counter() - start
    else:
        features = ts.Features(ts.read_squad(config.data, "dev-v1.1.json", 200), load_tokenizer(config.init), config, True)
        step = stepper(config, features, 0.0, True, masked=name == "masked")
        for _ in range(5):
            step(np.argsort(features.lengths)[len(features) // 2:][:16])
    peak = torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" and name != "features" else None
    print(*found, peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--memory")
    a = parser.parse_args()
    config = ts.settle(ts.Config(data=a.data, attention_dropout=0.0))
    if a.memory:
        return memory(a.memory, config)
    rows, tokenizer = in_processes(config), load_tokenizer(config.init)
    rows += forwards(config.precision)      # first: what training leaves in memory changes the ratios
    train, dev = (ts.Features(ts.read_squad(config.data, f"{part}-v1.1.json", count), tokenizer, config, part == "train")
                  for part, count in (("train", 800), ("dev", 500)))
    rows += [*training(config, train), *evaluation(config, dev), masked_step(config, train)]
    code = []
    took = seconds(lambda: code.append(subprocess.run(["make", "test", "VENV=", f"PYTHON={sys.executable}"], cwd=ROOT,
                                                      stdout=subprocess.DEVNULL).returncode))
    rows.append(row("8", "make test" + " (SOME FAILED)" * bool(code[0]), None, took, "s", took, 90, at_most=True))
    cpu = torch.cpu.get_capabilities().get("cpu_name")
    ts.write_json(ROOT / "results" / f"bench-{DEVICE}.json", dict(
        rows=sorted(rows, key=lambda r: r["goal"]), device=torch.cuda.get_device_name() if DEVICE == "cuda" else cpu,
        threads=torch.get_num_threads(), precision=config.precision, torch=torch.__version__, data=Path(config.data).name,
        command=" ".join(["python", "results/bench.py", *sys.argv[1:]])))


if __name__ == "__main__":
    main()
