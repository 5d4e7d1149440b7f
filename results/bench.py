"""Measures the speed table: each row beside its baseline, in one run on one machine.

    python results/bench.py --data FOLDER       make bench DATA=FOLDER; default: the built-in corpus
    python results/bench.py --quick             does it run? A few minutes, and no file is written

Writes bench-cpu.json beside this file, or bench-cuda.json on an NVIDIA GPU. Ours and the baseline
take turns. A time is the median over the turns, a spread is (longest - shortest) / median.
The baselines run the same model through scaled_dot_product_attention: what differs is what the row
says. Attention dropout, which the reference recipe has, alone takes torch off its fast kernel on a
CPU; so rows 1 and 2 stand without it too.

In order: what a row is; then the rows, in the order of their numbers; then the command line.
"""
import argparse
import copy
import dataclasses
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import blockprune                                                                   # noqa: E402
import train_squad as ts                                                            # noqa: E402
from bert import BertConfig, BertForQuestionAnswering, load_model, load_tokenizer   # noqa: E402
from compact import benchmark, flops                                                # noqa: E402

DEVICE = "cpu"
if torch.cuda.is_available():
    DEVICE = "cuda"

# The paper's model of the headline, with 26.2 % of the weights of BERT-base.
HEADLINE = BertConfig(heads=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],
                      ffn=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238])


@dataclasses.dataclass
class Amount:
    """How many questions are read, and how many turns are timed."""
    train_questions: int = 800
    dev_questions: int = 500
    training_turns: int = 5         # rows 1 and 2
    evaluation_turns: int = 3       # row 3
    step_turns: int = 31            # row 4
    forward_turns: int = 21         # rows 5 and 6


QUICK = Amount(train_questions=32, dev_questions=20, training_turns=1, evaluation_turns=1,
               step_turns=1, forward_turns=1)


# ------------------------------------------------------------------------------------------ a row


def row(goal: str, what: str, baseline: float | None, ours: float | None, unit: str,
        ratio: float | None, wanted: float | None, noise: float = 0.0,
        at_most: bool = False) -> dict:
    """Print a row of the table, and return it.

    baseline, ours: in `unit`, None where not measured. wanted: the least that the ratio should be,
    or the most (at_most); None where nothing is wanted of it. noise: the spread of ours.
    """
    met = None
    if ratio is not None and wanted is not None:
        met = bool(ratio >= wanted)
        if at_most:
            met = bool(ratio <= wanted)

    text = f"{goal:3} {what}"
    if baseline is not None:
        text += f": {baseline:.4g} -> {ours:.4g} {unit}"
    elif ours is not None:
        text += f": {ours:.4g} {unit}"
    if ratio is not None:
        text += f", ratio {ratio:.3f}"
    if wanted is not None:
        sign = "<=" if at_most else ">="
        text += f" (wanted {sign} {wanted})"
    if met is False:
        text += " MISSED"
    print(text, flush=True)
    return {"goal": goal, "what": what, "baseline": baseline, "ours": ours, "unit": unit,
            "ratio": ratio, "wanted": wanted, "at_most": at_most, "met": met, "spread": noise}


def not_here(goal: str, what: str, reason: str) -> dict:
    """A row that cannot be measured on this machine."""
    return row(goal, f"{what}: not measured, {reason}", None, None, "", None, None)


NO_BF16 = "this processor has no bf16 units"


def cpu_goal(wanted: float) -> float | None:
    """A goal that was set for a CPU: on a GPU nothing is held against it."""
    if DEVICE == "cpu":
        return wanted
    return None


def seconds(work: typing.Callable[[int], object], turn: int) -> float:
    """The seconds of work(turn). A GPU is waited for."""
    synchronize = torch.get_device_module(DEVICE).synchronize       # does nothing on a CPU
    synchronize()
    start = time.perf_counter()
    work(turn)
    synchronize()
    return time.perf_counter() - start


def take_turns(works: list[typing.Callable[[int], object]], turns: int) -> list[list[float]]:
    """The seconds of each work in each turn. A work is called with the number of the turn.

    Each is called once before, to warm up.
    """
    for work in works:
        work(0)
    times: list[list[float]] = [[] for _ in works]
    for turn in range(turns):
        for work, of_work in zip(works, times):
            of_work.append(seconds(work, turn))
    return times


def spread(numbers: list[float]) -> float:
    return (max(numbers) - min(numbers)) / statistics.median(numbers)


# ------------------------------------------------------------------------- rows 1 and 2: training


def stepper(config: ts.Config, features: ts.Features, plain_adamw: bool = False) -> typing.Callable:
    """A training step as in train(), without a teacher: a function of the windows in its batch.

    config: its method, precision and attention dropout count.
    """
    # The learning rate changes nothing of the speed; at this one the model hardly moves.
    config = dataclasses.replace(config, lr=1e-5, score_lr=1e-5)
    torch.manual_seed(0)
    model = load_model(config.init, fresh_head=True).train()
    masked = config.method != "dense"
    if masked:
        ts.add_masks(model, config.method, config.block)
        blockprune.set_threshold(model, 0.05)
    optimizer = ts.prepare(model, config)
    if plain_adamw:
        groups = blockprune.parameter_groups(model, config.lr, config.score_lr)
        optimizer = torch.optim.AdamW(groups)

    def step(windows: np.ndarray) -> None:
        batch = features.batch(windows, config.device)
        with ts.autocast(config):
            logits = model(batch["ids"], batch["types"], batch["real"])
        loss, _ = ts.loss_terms(logits, None, batch, config.temperature)
        if masked:
            loss = loss + blockprune.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
    return step


def all_padded(features: ts.Features, length: int) -> ts.Features:
    """The same windows, each of them padded to `length`."""
    padded = copy.copy(features)
    padded.lengths = np.full_like(features.lengths, length)
    return padded


def training_rates(step: typing.Callable, reference_step: typing.Callable, features: ts.Features,
                   turns: int) -> tuple[float, list[float]]:
    """Windows a second of the reference step, and of ours in each turn.

    Ours has all batches of an epoch, a part in each turn; the parts are alike in their lengths. The
    reference has one full batch a turn, twice: with its padding all full batches take equally long.
    """
    batches = ts.training_batches(features.lengths, 16, seed=0, epoch=0)
    batches.sort(key=lambda windows: features.lengths[windows].max())
    parts = [batches[turn::turns] for turn in range(turns)]
    full = [windows for windows in batches if len(windows) == 16]

    def ours(turn: int) -> None:
        for windows in parts[turn]:
            step(windows)

    def reference(turn: int) -> None:
        reference_step(full[turn])
        reference_step(full[turn])

    our_times, reference_times = take_turns([ours, reference], turns)
    rates = []
    for part, of_turn in zip(parts, our_times):
        rates.append(sum(len(windows) for windows in part) / of_turn)
    return 2 * 16 / statistics.median(reference_times), rates


def training_rows(config: ts.Config, features: ts.Features, turns: int) -> list[dict]:
    """Rows 1 and 2, each with the reference's attention dropout and without."""
    padded = all_padded(features, config.max_length)
    rows = []
    for goal, precision, wanted in (("1", "bf16", 8), ("2", "fp32", 3.5)):
        what = (f"training in {precision}, against the reference recipe: fp32, all padded to "
                f"{config.max_length}, attention dropout, plain AdamW")
        if precision not in ("fp32", config.precision):
            rows.append(not_here(goal, what, NO_BF16))
            continue
        also = "the same, but no attention dropout in the baseline either"
        for text, dropout, bound in ((what, 0.1, cpu_goal(wanted)), (also, 0.0, None)):
            ours = dataclasses.replace(config, precision=precision)
            reference = dataclasses.replace(config, precision="fp32", attention_dropout=dropout)
            baseline, rates = training_rates(stepper(ours, features),
                                             stepper(reference, padded, plain_adamw=True),
                                             features, turns)
            rate = statistics.median(rates)
            rows.append(row(goal, text, baseline, rate, "examples/s", rate / baseline, bound,
                            spread(rates)))
    return rows


# ------------------------------------------------------------------------------- row 3: prediction


@torch.no_grad()
def predict_in_order(model: BertForQuestionAnswering, features: ts.Features, config: ts.Config,
                     size: int) -> dict[str, tuple[str, float]]:
    """What ts.predict() returns, but in batches of `size` windows, in the order of the file."""
    model.eval().to(config.device)
    best = {question_id: ("", -math.inf) for question_id, _, _, _ in features.squad.questions}
    with ts.autocast(config):
        for first in range(0, len(features), size):
            windows = np.arange(first, min(first + size, len(features)))
            batch = features.batch(windows, config.device)
            start, end = model(batch["ids"], batch["types"], batch["real"])
            spans = ts.best_spans(start, end, batch["context"], config.max_answer)
            span_scores, i, j = (column.tolist() for column in spans)
            for b, window in enumerate(windows):
                question_id = features.squad.questions[features.rows[window, 0]][0]
                if span_scores[b] > best[question_id][1]:
                    best[question_id] = (features.text(window, i[b], j[b]), span_scores[b])
    return best


def prediction_rows(config: ts.Config, features: ts.Features, turns: int) -> list[dict]:
    """Row 3: from windows to predictions.

    The baseline pads all to 384, in the authors' batches of 128 and in batches like ours.
    """
    model = load_model(config.init, fresh_head=True)
    padded = all_padded(features, config.max_length)
    fp32 = dataclasses.replace(config, precision="fp32")

    def ours(turn: int) -> None:
        ts.predict(model, features, config)

    def in_authors_batches(turn: int) -> None:
        predict_in_order(model, padded, fp32, 128)

    def in_batches_like_ours(turn: int) -> None:
        ts.predict(model, padded, fp32)

    times = take_turns([ours, in_authors_batches, in_batches_like_ours], turns)
    rate, authors, like_ours = [len(features) / statistics.median(of_work) for of_work in times]
    what = (f"dev windows to predictions in {config.precision}, against fp32, all padded to "
            f"{config.max_length}, ")
    noise = spread(times[0])
    return [
        row("3", what + "batches of 128 as the authors'", authors, rate, "windows/s",
            rate / authors, cpu_goal(6), noise),
        row("3", what + "batches like ours", like_ours, rate, "windows/s",
            rate / like_ours, None, noise),
    ]


# ----------------------------------------------------------------------------- row 4: a masked step


def longer_half(features: ts.Features) -> np.ndarray:
    """A batch of 16 windows, the shortest of the longer half."""
    return np.argsort(features.lengths)[len(features) // 2:][:16]


def masked_step_row(config: ts.Config, features: ts.Features, turns: int) -> dict:
    """Row 4: the time of a Hybrid 32x32 step against a dense one."""
    windows = longer_half(features)
    dense_step = stepper(config, features)
    masked_step = stepper(dataclasses.replace(config, method="hybrid"), features)

    def dense(turn: int) -> None:
        dense_step(windows)

    def masked(turn: int) -> None:
        masked_step(windows)

    dense_times, masked_times = take_turns([dense, masked], turns)
    dense_time = statistics.median(dense_times)
    masked_time = statistics.median(masked_times)
    what = f"a masked (Hybrid 32x32) training step in {config.precision} against a dense one"
    return row("4", what, 1000 * dense_time, 1000 * masked_time, "ms", masked_time / dense_time,
               cpu_goal(1.08), spread(masked_times), at_most=True)


# --------------------------------------------------------------------- rows 5 and 6: a forward pass


def forward(goal: str, what: str, dense: BertConfig, small: BertConfig, batch: int, length: int,
            precision: str, wanted: float | None, turns: int, of_flops: bool = False) -> dict:
    """A row of two architectures. Weights are random: speed does not depend on them.

    of_flops: what counts is the speed-up as a share of the ratio of FLOPs.
    """
    torch.manual_seed(0)
    models = [BertForQuestionAnswering(dense), BertForQuestionAnswering(small)]
    dense_times, small_times = benchmark(models, batch, length, turns, precision, DEVICE)
    dense_time = statistics.median(dense_times)
    small_time = statistics.median(small_times)
    speedup = dense_time / small_time
    flops_ratio = flops(dense, length) / flops(small, length)
    ratio = speedup
    if of_flops:
        ratio = speedup / flops_ratio
    text = f"{what}, {batch} x {length}, {precision}: {speedup:.2f} x, FLOPs {flops_ratio:.2f} x"
    return row(goal, text, dense_time, small_time, "ms", ratio, wanted, spread(small_times))


def forward_rows(best_precision: str, turns: int) -> list[dict]:
    """Rows 5 and 6. best_precision: bf16, where the machine multiplies in it."""
    run = "squad-10000"
    results = ROOT / "results" / run / "hybrid-compact" / "results.json"
    left = json.loads(results.read_text(encoding="utf-8"))
    mini = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    small = dataclasses.replace(mini, heads=left["heads"], ffn=left["ffn"])
    what = f"compact MiniLM of results/{run} against dense, as a share of the FLOP ratio"
    rows = [forward("5", what, mini, small, 32, 128, "fp32", cpu_goal(0.85), turns, of_flops=True)]

    # This row has goals for a GPU too: the speed-up that the paper reports, in its batches of 128.
    batch = 8
    wanted = {"fp32": 3.4, "bf16": 2.7}
    if DEVICE == "cuda":
        batch = 128
        wanted = {"fp32": 2.44, "bf16": 2.44}
    what = "headline architecture against BERT-base"
    for precision in ("fp32", "bf16"):
        if precision not in ("fp32", best_precision):
            rows.append(not_here("6", f"{what}, {batch} x 384, {precision}", NO_BF16))
            continue
        rows.append(forward("6", what, BertConfig(), HEADLINE, batch, 384, precision,
                            wanted[precision], turns))
    return rows


# -------------------------------------------------- rows 4 and 7: memory, in processes of their own


def peak_megabytes() -> float | None:
    """The most memory that this process has had, in MB; None where that cannot be known."""
    try:
        import resource     # here, since Windows has no such module
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak *= 1024        # macOS counts bytes, Linux KiB
    return peak / 1e6


def measure_memory(job: str, config: ts.Config) -> None:
    """Do a job, and print as JSON what it took. It is the only one of this process.

    features: of all training questions. dense, masked: training steps.
    """
    found = {}
    if job == "features":
        start = time.perf_counter()
        squad = ts.read_squad(config.data, "train-v1.1.json")
        ts.Features(squad, load_tokenizer(config.init), config, training=True)
        found["questions"] = len(squad.questions)
        found["seconds"] = time.perf_counter() - start
        found["peak"] = peak_megabytes()
    else:
        squad = ts.read_squad(config.data, "dev-v1.1.json", limit=200)
        features = ts.Features(squad, load_tokenizer(config.init), config, training=True)
        if job == "masked":
            config = dataclasses.replace(config, method="hybrid")
        step = stepper(config, features)
        for _ in range(5):
            step(longer_half(features))
        found["peak"] = peak_megabytes()
        if DEVICE == "cuda":
            found["peak"] = torch.cuda.max_memory_allocated() / 1e6
    print(json.dumps(found))


def in_a_process(job: str, config: ts.Config) -> dict:
    """What measure_memory() prints of a job in a process of its own."""
    command = [sys.executable, __file__, "--data", config.data, "--init", config.init,
               "--memory", job]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])     # what comes before is of load_model()


def memory_rows(config: ts.Config) -> list[dict]:
    """The memory of row 4, and row 7."""
    features = in_a_process("features", config)
    dense = in_a_process("dense", config)["peak"]
    masked = in_a_process("masked", config)["peak"]
    of_step = "peak memory of a masked training step against a dense one"
    of_features = "their peak memory"
    took = features["seconds"]
    rows = [row("7", f"features of all {features['questions']:,} questions", None, took, "s", took,
                cpu_goal(60), at_most=True)]
    if dense is None:
        reason = "this system does not tell a process its peak"
        rows.append(not_here("4", of_step, reason))
        rows.append(not_here("7", of_features, reason))
        return rows
    peak = features["peak"]
    rows.append(row("4", of_step, dense, masked, "MB", masked / dense, cpu_goal(1.10),
                    at_most=True))
    rows.append(row("7", of_features, None, peak, "MB", peak, cpu_goal(1000), at_most=True))
    return rows


# ------------------------------------------------------------------------------- row 8: make test


def tests_row() -> dict:
    what = "make test"
    if shutil.which("make") is None:
        return not_here("8", what, "there is no make")
    command = ["make", "test", "VENV=", f"PYTHON={sys.executable}"]
    start = time.perf_counter()
    status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    took = time.perf_counter() - start
    if status != 0:
        what = "make test (SOME FAILED)"
    return row("8", what, None, took, "s", took, cpu_goal(90), at_most=True)


# ------------------------------------------------------------------------------------ command line


def measure(config: ts.Config, amount: Amount) -> list[dict]:
    """All rows but the last, by number."""
    # Memory first: on Linux the peak of a new process counts the size of the one that starts it.
    rows = memory_rows(config)
    # Then whole models: what training leaves in memory would change their ratios.
    rows += forward_rows(config.precision, amount.forward_turns)

    tokenizer = load_tokenizer(config.init)
    squad = ts.read_squad(config.data, "train-v1.1.json", amount.train_questions)
    train = ts.Features(squad, tokenizer, config, training=True)
    squad = ts.read_squad(config.data, "dev-v1.1.json", amount.dev_questions)
    dev = ts.Features(squad, tokenizer, config, training=False)
    rows += training_rows(config, train, amount.training_turns)
    rows += prediction_rows(config, dev, amount.evaluation_turns)
    rows.append(masked_step_row(config, train, amount.step_turns))
    return sorted(rows, key=lambda of_table: of_table["goal"])


def run(data: str, init: str, quick: bool, memory: str | None, command: str) -> None:
    config = ts.settle(ts.Config(data=data, init=init, device=DEVICE, attention_dropout=0.0))
    if memory is not None:
        measure_memory(memory, config)
        return
    if quick:
        measure(config, QUICK)
        return
    rows = measure(config, Amount())
    rows.append(tests_row())
    machine = ts.surroundings(DEVICE)
    ts.write_json(ROOT / "results" / f"bench-{DEVICE}.json", {
        "rows": rows,
        "device": machine["processor"],
        "threads": machine["threads"],
        "precision": config.precision,
        "torch": machine["torch"],
        "data": Path(config.data).name,
        "command": command,
    })


def main() -> int:
    """Returns the exit status, as that of train_squad.py."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin",
                        help="folder of train-v1.1.json, dev-v1.1.json; default: builtin")
    parser.add_argument("--init", default=ts.Config.init, help="model folder to start from")
    parser.add_argument("--quick", action="store_true",
                        help="does it run? One turn of each; no file is written")
    parser.add_argument("--memory", choices=("features", "dense", "masked"),
                        help="do one job and print its peak memory: how the benchmark calls itself")
    a = parser.parse_args()
    command = shlex.join(["python", "results/bench.py", *sys.argv[1:]])
    return ts.exit_status(run, a.data, a.init, a.quick, a.memory, command)


if __name__ == "__main__":
    sys.exit(main())
