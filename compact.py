"""Cut what pruning emptied out of a BERT: a smaller dense network that computes the same function.

    python compact.py R/hybrid --data D --out R/hybrid-compact          compact, check, score
    python compact.py --compare R/teacher R/hybrid-compact R/filled     the table, with speed

Attention heads and inner dimensions of the feed-forward layers go; the residual width E stays. How
they are cut stands in blockprune.py, cut_heads() and cut_dimensions(); here are BERT, the check on
real text, what is counted and timed, and the command line. After Lagunas et al. 2021 (the authors'
compile_model and optimize_model, huggingface/nn_pruning at 0cef2b2, nn_pruning/patch_coordinator.py
and inference_model_patcher.py), but exact where they are not.

    E hidden size   H heads   D head size   F width of a feed-forward layer   B batch   T tokens
Comments: `# Differs:` marks a deviation from the authors, `# Note:` a remark of ours.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

import blockprune
import train_squad as ts
from bert import (BertConfig, BertForQuestionAnswering, hf_tensors, load_model, load_tokenizer,
                  replacing, save_model, write_json)

# -------------------------------------------------------------------------------------- compaction


@torch.no_grad()
def compact(model: BertForQuestionAnswering) -> BertForQuestionAnswering:
    """A smaller model with the same function: in eval mode, on inputs with at least one real token.

    model: masked, baked, dense or compacted, of finite weights; it is left as it is. What adds
    nothing or a constant is cut, and the constant goes into the bias that follows.
    Differs: the reference drops the constants, and keeps at least one head and one dimension in
    every layer.
    """
    device = model.qa_outputs.weight.device
    small = copy.deepcopy(model)
    # Note: constants are folded in fp64, which an Apple GPU does not have.
    if device.type == "mps":
        small = small.cpu()
    # From masks to zeros.
    small = blockprune.bake(small)
    # From zeros to smaller matrices, layer by layer.
    for layer in small.bert.layers:
        attention, ffn = layer.attention, layer.ffn
        heads_left = blockprune.cut_heads(attention.query, attention.key, attention.value,
                                          attention.out, model.config.head_size)
        attention.heads = len(heads_left)
        ffn.width = len(blockprune.cut_dimensions(ffn.fc1, ffn.fc2, ffn.act))
    # The configuration says how many of each are left in every layer.
    heads = [layer.attention.heads for layer in small.bert.layers]
    widths = [layer.ffn.width for layer in small.bert.layers]
    small.config = dataclasses.replace(model.config, heads=heads, ffn=widths)
    return small.to(device)


@torch.no_grad()
def heads_authors_rule(model: BertForQuestionAnswering) -> list[int]:
    """How many heads the reference would leave in each layer: those with none of Q, K and V empty.

    At least one stays in a layer that has any. Not exact: see cut_heads() of blockprune.py.
    Source: nn_pruning/inference_model_patcher.py.
    """
    D = model.config.head_size
    left = []
    for layer in model.bert.layers:
        attention = layer.attention
        # A head is kept where it has something in its rows of query, of key, and of value.
        kept = torch.ones(attention.heads, dtype=torch.bool)
        for linear in (attention.query, attention.key, attention.value):
            rows_of_head = linear.weight.view(attention.heads, D * linear.weight.shape[1])
            kept &= (rows_of_head != 0).any(dim=1).cpu()
        at_least = min(1, attention.heads)
        left.append(max(at_least, int(kept.sum())))
    return left


# ----------------------------------------------------------------------- the check on real text


@torch.no_grad()
def check(model: BertForQuestionAnswering, small: BertForQuestionAnswering, batches,
          best_spans) -> tuple[float, float]:
    """Both models on the same batches: the largest |Δ logit| at a real token, and what is allowed.

    Allowed is 1e-5 · max(1, max |logit|). Where the best span is another one, the first model must
    score the two within twice that. Raises ValueError otherwise.
    batches: dicts with ids, types, real, context, each (B, T). best_spans(start, end, context)
    gives the best span's score, first and last position, each (B,).
    """
    worst = torch.zeros(())
    largest = 1.0
    gaps = []       # where the best span is another one: how much worse it is, by the first model
    for batch in batches:
        real = batch["real"]
        # Logits of both models, (B, T) each.
        start, end = model(batch["ids"], batch["types"], real)
        small_start, small_end = small(batch["ids"], batch["types"], real)
        # Logits at padding mean nothing.
        start = start.masked_fill(~real, 0)
        end = end.masked_fill(~real, 0)
        small_start = small_start.masked_fill(~real, 0)
        small_end = small_end.masked_fill(~real, 0)

        # The largest difference of a logit. Note: torch.maximum hands a NaN on; max() would not.
        difference = torch.stack([(start - small_start).abs(), (end - small_end).abs()]).max()
        worst = torch.maximum(worst, difference.cpu())
        largest = max(largest, float(start.abs().max()), float(end.abs().max()))

        # Do both find the same answer? If not, how much does the first model prefer its own?
        span_score, i, j = best_spans(start, end, batch["context"])
        _, small_i, small_j = best_spans(small_start, small_end, batch["context"])
        row = torch.arange(len(i), device=i.device)
        gap = span_score - start[row, small_i] - end[row, small_j]      # (B,)
        moved = (i != small_i) | (j != small_j)
        gaps += gap[moved].tolist()

    # A logit of NaN or infinity never agrees.
    allowed = 1e-5 * largest
    logits_agree = bool(worst <= allowed) and math.isfinite(allowed)
    spans_agree = all(gap <= 2 * allowed for gap in gaps)
    if not logits_agree or not spans_agree:
        raise ValueError(f"the compacted model differs: |Δ logit| {worst:.2e} where {allowed:.2e} "
                         f"is allowed, {len(gaps)} other spans. No model was written")
    return worst.item(), allowed


@contextlib.contextmanager
def highest_precision():
    """Compute products in full fp32, also where the user's settings allow less.

    With less, two models that are the same function would differ by more than is allowed.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------- counts and speed


@torch.no_grad()
def count_parameters(model: BertForQuestionAnswering) -> dict[str, int]:
    """Sizes of a model, masks folded in. "linear" are the encoder's matrices, which density is of.

    linear: their elements.
    linear_nonzero: those that are not 0.
    linear_dense: their elements in the dense model of the same configuration.
    encoder, total: all parameters, biases and norms too.
    bytes: those of `total` in fp32.
    """
    tensors = hf_tensors(model)     # W ⊙ M(S) where there are masks
    # The matrices are query, key, value, out, fc1 and fc2 of every layer.
    encoder = [tensor for name, tensor in tensors.items() if name.startswith("encoder.")]
    matrices = [tensor for tensor in encoder if tensor.dim() == 2]
    # Before pruning a layer has four matrices of E × E, and two of E × F.
    c = model.config
    dense_layer = (4 * c.hidden_size + 2 * c.intermediate_size) * c.hidden_size
    total = sum(tensor.numel() for tensor in tensors.values())
    return {
        "linear": sum(tensor.numel() for tensor in matrices),
        "linear_nonzero": sum(int(tensor.count_nonzero()) for tensor in matrices),
        "linear_dense": c.num_hidden_layers * dense_layer,
        "encoder": sum(tensor.numel() for tensor in encoder),
        "total": total,
        "bytes": 4 * total,
    }


def counted(model: BertForQuestionAnswering) -> dict:
    """What results.json says of a model's size.

    density is non-zero / dense linear weights: a weight that a mask keeps may still be zero.
    heads and ffn are those that compaction leaves.
    """
    parameters = count_parameters(model)
    small = compact(model).config
    return {
        "parameters": parameters,
        "density": parameters["linear_nonzero"] / parameters["linear_dense"],
        "heads": small.heads,
        "ffn": small.ffn,
    }


def flops(config: BertConfig, length: int) -> int:
    """Floating point operations of one row's forward pass: its products, 2 a multiply-add."""
    T = length
    E = config.hidden_size
    D = config.head_size
    multiply_adds = 0
    for H, F in zip(config.heads, config.ffn):
        multiply_adds += 4 * T * E * H * D      # query, key, value and out
        multiply_adds += 2 * T * T * H * D      # Q Kᵀ, and the mean of V that it weighs
        multiply_adds += 2 * T * E * F          # fc1 and fc2
    multiply_adds += 2 * T * E                  # the QA head
    return 2 * multiply_adds


@torch.no_grad()
def benchmark(models: list[torch.nn.Module], batch: int, length: int, repeats: int = 9,
              precision: str = "fp32", device: str = "cpu") -> list[list[float]]:
    """Milliseconds of `repeats` forward passes of each model, on random ids without padding.

    The models take turns of two passes, of which the second counts: so each finds its weights and
    its memory as it left them, not as the others did. They are moved to the device and set to eval
    mode.
    """
    # The same word pieces for all models, (batch, length).
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models[0].config.vocab_size, (batch, length), generator=generator)
    ids = ids.to(device)
    # A GPU computes behind our back: wait for it before a look at the clock. A CPU needs no wait.
    synchronize = torch.get_device_module(device).synchronize
    for model in models:
        model.eval().to(device)
    times: list[list[float]] = [[] for _ in models]
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        # The first turn warms up, and is left out of what is returned.
        for _ in range(1 + repeats):
            for model, of_model in zip(models, times):
                model(ids)
                synchronize()
                start = time.perf_counter()
                model(ids)
                synchronize()
                of_model.append(1000 * (time.perf_counter() - start))
    return [of_model[1:] for of_model in times]


# ---------------------------------------------------------------------------------------- pictures


def draw(config: BertConfig) -> str:
    """Heads and width left in each layer, as text."""
    # A box is a head; a bar is 24 characters long, whatever the width.
    all_heads = config.num_attention_heads
    full_width = config.intermediate_size
    lines = []
    for i, (heads, width) in enumerate(zip(config.heads, config.ffn)):
        head_bar = "■" * heads + "·" * (all_heads - heads)
        filled = round(24 * width / full_width)
        width_bar = "█" * filled + "·" * (24 - filled)
        lines.append(f"layer {i:2}  heads {head_bar} {heads:2}/{all_heads}   "
                     f"ffn {width_bar} {width:4}/{full_width}")
    return "\n".join(lines)


@torch.no_grad()
def mask_rows(model: BertForQuestionAnswering) -> dict[str, dict[str, list[str]]]:
    """The masks on the grid of blocks, by layer and matrix: each row is a string of 0 and 1."""
    masks = {}
    for i, layer in enumerate(model.bert.layers):
        of_layer = {}
        for part in (layer.attention, layer.ffn):
            for name, linear in part.named_children():
                mask = linear.parametrizations.weight[0]
                grid = mask.block_mask().int().tolist()
                of_layer[name] = ["".join(map(str, row)) for row in grid]
        masks[str(i)] = of_layer
    return masks


def write_masks(path: Path, masks: dict[str, dict[str, list[str]]]) -> None:
    """Write masks.json, with a line for each matrix."""
    layers = []
    for i, of_layer in masks.items():
        matrices = [f'  "{name}": {json.dumps(rows)}' for name, rows in of_layer.items()]
        layers.append(f' "{i}": {{\n' + ",\n".join(matrices) + "\n }")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(layers) + "\n}\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ command line


def run(folder: Path, out: Path, data: str, v2: bool, dev_questions: int | None, device: str | None,
        command: str) -> None:
    """Compact a run folder into another: checked on real text, then scored as it is on disk."""
    began = time.monotonic()
    # What is compacted must be the end of a run: its results are there, and are of its weights.
    trained = ts.read_run(folder)
    if trained is None:
        raise ValueError(f"{folder}: no run of ours is in it")
    scored(folder)

    # The settings are those of the run, but for what is scored, and where.
    config = ts.Config(**trained["settings"])
    config.out = str(out)
    if device is not None:
        config.device = device
    elif not ts.device_works(config.device):
        config.device = None
    if data:
        config.data = data
    if v2:
        config.v2 = True
    if dev_questions is not None:
        config.dev_questions = dev_questions
    config = ts.settle(config)
    dev_file = ts.file_name("dev", config.v2)
    dev = ts.read_squad(config.data, dev_file, config.dev_questions)

    # The new folder is of these contents and no others. One process at a time writes into it.
    contents = {"contents of dev": dev.sha256, **ts.contents_of("run", folder)}
    with ts.held(out):
        if ts.claim(config, contents, command, compacted=folder):
            print(f"{out}: finished before, its results.json is there")
            return
        features = ts.Features(dev, load_tokenizer(folder), config, training=False)

        # 1. Compact. A run that is not pruned has no masks, and is loaded just the same.
        masked = ts.load_pruning(folder).eval().to(config.device)
        small = compact(masked)

        # 2. Check. No model is written before the two are seen to be one function.
        windows, worst, allowed = check_on_dev(masked, small, features, config)
        save_model(small, out, tokenizer_from=folder)
        if list(blockprune.masks(masked)):
            write_masks(out / "masks.json", mask_rows(masked))

        # 3. Score both, the smaller one as it is on disk.
        small = load_model(out)
        before = ts.evaluate(masked, features, config, out)
        after = ts.evaluate(small, features, config, out)

        # 4. Count. The authors' rule needs the masked model: its queries and keys are all there.
        ts.write_results(out, config, None, dev, **after, exact_match_masked=before["exact_match"],
                         f1_masked=before["f1"], density_masked=counted(masked)["density"],
                         **counted(small), heads_authors_rule=heads_authors_rule(masked),
                         max_abs_logit_difference=worst, allowed_logit_difference=allowed,
                         command=command, seconds=time.monotonic() - began)
    print(draw(small.config))
    print(f"{out}: F1 {before['f1']:.2f} masked, {after['f1']:.2f} compact; the largest difference "
          f"of a logit over {windows} windows in fp32 is {worst:.1e}, {allowed:.1e} is allowed")


def check_on_dev(masked: BertForQuestionAnswering, small: BertForQuestionAnswering,
                 features: ts.Features, config: ts.Config) -> tuple[int, float, float]:
    """check() on up to 1,024 random windows of the dev set. Returns their number and its result."""
    generator = torch.Generator().manual_seed(config.seed)
    windows = torch.randperm(len(features), generator=generator)[:1024].numpy()

    def batches():
        for first in range(0, len(windows), 32):
            yield features.batch(windows[first:first + 32], config.device)

    def best_spans(start, end, context):
        return ts.best_spans(start, end, context, config.max_answer)

    with highest_precision():
        worst, allowed = check(masked, small, batches(), best_spans)
    return len(windows), worst, allowed


def scored(folder: Path) -> dict:
    """The results.json of a folder; ValueError where it has none of the files that are there."""
    results = ts.scored(folder)
    if results is None:
        raise ValueError(f"{folder}/results.json is missing or not of the weights beside it: run "
                         "what made it again")
    return results


def compare(folders: list[Path], data: str, v2: bool, batch: int, length: int,
            device: str | None) -> None:
    """Print the table of some run folders. Speed is relative to the first, in one go, in fp32.

    What is counted and timed goes into each results.json, and the table into summary.json beside
    the first folder. ValueError if they were not all scored on the same dev set, that of the folder
    `data` if it is given, or if the results.json of one is not of its weights.
    """
    # All of them were scored on the same questions, or there is no table.
    rows = [scored(folder) for folder in folders]
    check_dev_sets(rows, data, v2)
    models = [load_model(folder) for folder in folders]
    most = min(model.config.max_position_embeddings for model in models)
    if batch < 1 or not 1 <= length <= most:
        raise ValueError(f"--batch {batch}, --length {length}: over 0, and within the models' "
                         f"{most} positions")
    # One number a model: the median is not moved by a pass that the machine interrupted.
    device = ts.pick_device(device)
    threads = torch.get_num_threads()
    passes = benchmark(models, batch, length, device=device)
    times = [statistics.median(of_model) for of_model in passes]

    print(f"\n{'model':16} {'EM':>6} {'F1':>6} {'linear':>8} {'density':>8} {'total':>8} "
          f"{'heads':>7} {'FLOPs':>7} {'ms':>7} {'speed':>6}")
    dense = models[0].config
    table = []
    for folder, results, model, milliseconds in zip(folders, rows, models, times):
        results.update(counted(model))
        # Of a compacted model the authors' rule was counted on the masked one: that number stays.
        results.setdefault("heads_authors_rule", heads_authors_rule(model))
        results.update(latency_ms=milliseconds, speedup=times[0] / milliseconds, batch=batch,
                       length=length, device=device, threads=threads,
                       flops_ratio=flops(dense, length) / flops(model.config, length))
        with ts.held(folder):
            # A table that was killed while it wrote leaves half a file.
            for path in ts.half_written(folder):
                path.unlink()
            write_json(folder / "results.json", results)
        print(table_line(folder.name, results, sum(dense.heads)))
        table.append({"model": folder.name, **results})
    write_json(folders[0].parent / "summary.json", table)
    print(f"forward pass of {batch} x {length} word pieces in fp32 on {device}, {threads} threads.")
    if table[0]["data"].get("name") == "builtin":
        print("The built-in made-up corpus, NOT SQuAD.")


def check_dev_sets(rows: list[dict], data: str, v2: bool) -> None:
    """ValueError unless all results are of one dev set, and that the one of the folder `data`."""
    # A dev set is told by the sha256 of its file, and by how many of its questions are taken.
    dev_sets = set()
    for results in rows:
        of_dev = results["data"]
        dev_sets.add((of_dev["sha256"].get("dev"), of_dev.get("dev_questions")))
    same = len(dev_sets) == 1
    if data:
        folder = ts.settle(ts.Config(data=data)).data
        wanted = ts.read_squad(folder, ts.file_name("dev", v2)).sha256
        same = same and wanted in {sha256 for sha256, _ in dev_sets}
    if not same:
        raise ValueError("the models were not scored on the same dev questions")


def table_line(name: str, results: dict, all_heads: int) -> str:
    parameters = results["parameters"]
    heads = f"{sum(results['heads'])}/{all_heads}"
    return (f"{name:16} {results['exact_match']:6.2f} {results['f1']:6.2f} "
            f"{parameters['linear_nonzero'] / 1e6:7.2f}M {results['density']:8.3f} "
            f"{parameters['total'] / 1e6:7.2f}M {heads:>7} {results['flops_ratio']:6.2f}x "
            f"{results['latency_ms']:7.1f} {results['speedup']:5.2f}x")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, as that of train_squad.py."""
    ts.forgiving_output()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the run folder to compact")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="FOLDER",
                        help="print the table of run folders")
    parser.add_argument("--data", default="",
                        help="folder with dev-v1.1.json; default: that of the run; with --compare: "
                             "refuse models that were scored on another")
    parser.add_argument("--v2", action="store_true",
                        help="dev-v2.0.json instead, whatever the run was trained on")
    parser.add_argument("--dev-questions", type=int,
                        help="as in train_squad.py; default: that of the run")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: that of the run")
    parser.add_argument("--batch", type=int, default=32, help="rows of the timed forward pass")
    parser.add_argument("--length", type=int, default=128, help="word pieces in each of them")
    if argv is None:
        argv = sys.argv[1:]
    a = parser.parse_args(argv)
    if a.compare:
        return ts.exit_status(compare, a.compare, a.data, a.v2, a.batch, a.length, a.device)
    if not a.folder or not a.out:
        parser.error("give a run folder and --out, or --compare")
    command = shlex.join(["python", "compact.py", *argv])
    return ts.exit_status(run, a.folder, a.out, a.data, a.v2, a.dev_questions, a.device, command)


if __name__ == "__main__":
    sys.exit(main())
