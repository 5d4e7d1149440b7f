"""Cut what pruning emptied out of a BERT: a smaller dense network that computes the same function.

    python compact.py R/hybrid --data D --out R/hybrid-compact          compact, check, score
    python compact.py --compare R/teacher R/hybrid-compact R/filled     the table, with speed

Attention heads and inner dimensions of the feed-forward layers go; the hidden size stays. How they
are cut is in blockprune.py, cut_heads() and cut_dimensions(). After Lagunas et al. 2021 (the
authors' compile_model and optimize_model, huggingface/nn_pruning at 0cef2b2,
nn_pruning/patch_coordinator.py and inference_model_patcher.py), but exact where they are not.
Comments: `# Differs:` marks a deviation from the authors, `# Note:` a remark of ours.
"""
import argparse
import copy
import dataclasses
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

import blockprune
import train_squad as ts
from bert import (BertConfig, BertForQuestionAnswering, folder_sha256, hf_tensors, load_model,
                  load_tokenizer, replacing, save_model, write_json)

# -------------------------------------------------------------------------------------- compaction


@torch.no_grad()
def compact(model: BertForQuestionAnswering) -> BertForQuestionAnswering:
    """A smaller model with the same function: in eval mode, on rows with at least one real token.

    A head goes if its rows of value or its columns of out are all 0, an inner dimension if its row
    of fc1 or its column of fc2 is. What it adds is nothing or a constant, and the constant goes
    into the bias that follows.
    model: masked, baked, dense or compacted, of finite weights; it is left as it is.
    Differs: the reference drops the constants, also cuts heads whose query or key is empty, and
    keeps at least one head and one dimension in every layer.
    """
    # Note: on the CPU, since an Apple GPU has no fp64, in which constants are folded.
    small = copy.deepcopy(model).cpu()
    # From masks to zeros: W becomes W ⊙ M(S).
    blockprune.bake(small)
    # From zeros to smaller matrices, layer by layer. The cuts return the indices of what is left.
    for layer in small.bert.layers:
        attention, ffn = layer.attention, layer.ffn
        heads = blockprune.cut_heads(attention.query, attention.key, attention.value,
                                     attention.out, model.config.head_size)
        attention.heads = len(heads)
        dimensions = blockprune.cut_dimensions(ffn.fc1, ffn.fc2, ffn.act)
        ffn.width = len(dimensions)
    # The configuration says how many of each are left in every layer.
    small.config = dataclasses.replace(
        model.config,
        heads=[layer.attention.heads for layer in small.bert.layers],
        ffn=[layer.ffn.width for layer in small.bert.layers])
    return small.to(model.qa_outputs.weight.device)


# ==================================================================================================
# A reader of the paper may stop here. What follows checks, counts, times and draws the result.
# ==================================================================================================
# --------------------------------------------------------------------------- the check on real text


@torch.no_grad()
def check(model: BertForQuestionAnswering, small: BertForQuestionAnswering, features: ts.Features,
          config: ts.Config) -> tuple[int, float, float]:
    """Compare both models in fp64 on up to 256 random windows.

    Every |Δ logit| at a real token must be under 1e-5 · max(1, max |logit|).
    Returns the number of windows, the largest |Δ logit|, and what is allowed. Raises ValueError if
    the models differ by more.
    """
    # Note: in fp32 rounding alone can be more than what is allowed. Apple's GPUs have no fp64.
    device = "cpu" if config.device == "mps" else config.device
    model = copy.deepcopy(model).to(device).double()
    small = copy.deepcopy(small).to(device).double()

    generator = torch.Generator().manual_seed(config.seed)
    windows = torch.randperm(len(features), generator=generator)[:256].numpy()
    worst = torch.zeros(())
    largest = 1.0
    for begin in range(0, len(windows), 32):
        batch = features.batch(windows[begin:begin + 32], device)
        inputs = batch["ids"], batch["types"], batch["real"]
        # Start and end logits of each row's tokens, (2, B, T).
        logits = torch.stack(model(*inputs))
        small_logits = torch.stack(small(*inputs))
        # Logits at padding mean nothing.
        logits = logits.masked_fill(~batch["real"], 0)
        small_logits = small_logits.masked_fill(~batch["real"], 0)

        # Note: torch.maximum hands a NaN on; max() would not.
        worst = torch.maximum(worst, (logits - small_logits).abs().max().cpu())
        largest = max(largest, logits.abs().max().item())

    allowed = 1e-5 * largest
    # With <, neither a NaN nor infinity ever agrees.
    if not worst < allowed:
        raise ValueError(f"the compacted model differs: |Δ logit| is {worst:.2e}, where "
                         f"{allowed:.2e} is allowed. No model was written")
    return len(windows), worst.item(), allowed


# ----------------------------------------------------------------------------- counts and speed


@torch.no_grad()
def count_parameters(model: BertForQuestionAnswering) -> dict[str, int]:
    """Sizes of a model, masks folded in. "linear" are the encoder's matrices."""
    tensors = hf_tensors(model)     # W ⊙ M(S) where there are masks
    # The matrices are query, key, value, out, fc1 and fc2 of every layer.
    encoder = [tensor for name, tensor in tensors.items() if name.startswith("encoder.")]
    matrices = [tensor for tensor in encoder if tensor.dim() == 2]
    # Before pruning a layer has four matrices of E × E, and two of E × F.
    c = model.config
    dense_layer = (4 * c.hidden_size + 2 * c.intermediate_size) * c.hidden_size
    # Biases and norms count too, but for "linear".
    total = sum(tensor.numel() for tensor in tensors.values())
    return {
        "linear": sum(tensor.numel() for tensor in matrices),
        "linear_nonzero": sum(int(tensor.count_nonzero()) for tensor in matrices),
        "linear_dense": c.num_hidden_layers * dense_layer,
        "encoder": sum(tensor.numel() for tensor in encoder),
        "total": total,
        "bytes": 4 * total,     # in fp32
    }


def size_of(model: BertForQuestionAnswering) -> dict:
    """What results.json has about a model's size."""
    parameters = count_parameters(model)
    # Note: a weight that a mask keeps may still be zero, so this can be less than what masks keep.
    density = parameters["linear_nonzero"] / parameters["linear_dense"]
    # How many heads and dimensions compaction leaves in each layer.
    small = compact(model).config
    return dict(parameters=parameters, density=density, heads=small.heads, ffn=small.ffn)


def flops(config: BertConfig, length: int) -> int:
    """Floating point operations of one row's forward pass: its products, 2 per multiply-add."""
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
def benchmark(models: list[torch.nn.Module], batch: int, length: int, repeats: int = 25,
              device: str = "cpu") -> list[list[float]]:
    """Milliseconds of `repeats` forward passes of each model, on random ids without padding.

    The models take turns of two passes, of which the second counts: so each finds its weights and
    its memory as it left them. They are moved to the device and set to eval mode.
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
    # The first turn warms up, and is left out of what is returned.
    for _ in range(1 + repeats):
        for model, own_times in zip(models, times):
            model(ids)
            synchronize()
            start = time.perf_counter()
            model(ids)
            synchronize()
            own_times.append(1000 * (time.perf_counter() - start))
    return [own_times[1:] for own_times in times]


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


def mask_rows(model: BertForQuestionAnswering) -> dict[int, dict[str, list[str]]]:
    """The masks, by layer and matrix: each row of the grid of blocks as a string of 0 and 1."""
    layers = {}
    for i, layer in enumerate(model.bert.layers):
        matrices = {}
        for name, module in layer.named_modules():
            if isinstance(module, blockprune.BlockMask):
                # The name is, for example, attention.query.parametrizations.weight.0.
                matrix = name.split(".")[1]
                grid = module.block_mask().int().tolist()
                matrices[matrix] = ["".join(map(str, row)) for row in grid]
        layers[i] = matrices
    return layers


def write_masks(model: BertForQuestionAnswering, path: Path) -> None:
    """Write mask_rows() as masks.json, with a line per matrix."""
    layers = []
    for i, matrices in mask_rows(model).items():
        lines = [f'  "{name}": {json.dumps(rows)}' for name, rows in matrices.items()]
        layers.append(f' "{i}": {{\n' + ",\n".join(lines) + "\n }")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(layers) + "\n}\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ command line


def run(arguments: argparse.Namespace, command: str) -> None:
    """Compact a model folder into another: checked on real text, then scored as it is on disk."""
    began = time.monotonic()
    folder, out = arguments.folder, arguments.out
    config = ts.fill_in(settings_of(arguments))
    dev = ts.read_squad(config.data, ts.file_name("dev", config.v2), config.dev_questions)
    features = ts.Features(dev, load_tokenizer(folder), config, training=False)
    masked = ts.load_pruning(folder).eval().to(config.device)
    inputs = {"run": folder_sha256(folder), "dev file": dev.sha256}
    with ts.locked(out):
        if ts.is_finished(config, inputs, command):
            print(f"{out}: finished before, its results.json is there")
            return
        # No model is written before the two are seen to be one function.
        small = compact(masked)
        windows, difference, allowed = check(masked, small, features, config)
        save_model(small, out, tokenizer_from=folder)
        if any(blockprune.masks(masked)):
            write_masks(masked, out / "masks.json")
        # Score both, the smaller one as it is on disk.
        small = load_model(out)
        before = ts.evaluate(masked, features, config, out)
        after = ts.evaluate(small, features, config, out)
        ts.write_results(config, None, dev, **after, exact_match_masked=before["exact_match"],
                         f1_masked=before["f1"], density_masked=size_of(masked)["density"],
                         **size_of(small), max_abs_logit_difference=difference,
                         allowed_logit_difference=allowed, command=command,
                         seconds=time.monotonic() - began)
    print(draw(small.config))
    print(f"{out}: F1 {before['f1']:.2f} masked, {after['f1']:.2f} compact; the largest "
          f"difference of a logit over {windows} windows in fp64 is {difference:.1e}, "
          f"{allowed:.1e} is allowed")


def settings_of(arguments: argparse.Namespace) -> ts.Config:
    """The settings of the run in the folder, but for what is scored, and where."""
    config = ts.read_run(arguments.folder)
    if config is None:
        config = ts.Config()        # any BERT folder: somebody else's fine-tuned model, for example
    else:
        finished_results(arguments.folder)
    return dataclasses.replace(config, out=str(arguments.out), device=arguments.device,
                               data=arguments.data or config.data,
                               v2=arguments.v2 or config.v2,
                               dev_questions=arguments.dev_questions or config.dev_questions)


def finished_results(folder: Path) -> dict:
    """The results.json of a folder; ValueError if there is none that belongs to its weights."""
    results = ts.read_results(folder)
    if results is None:
        raise ValueError(f"{folder}: no results.json that belongs to its weights. Rerun the "
                         "command that made this folder")
    return results


def compare(arguments: argparse.Namespace) -> None:
    """Print the table of some run folders. Speed is relative to the first, in one go, in fp32.

    What is counted and timed goes into each results.json, and the table into summary.json beside
    the first folder. ValueError if they were not all scored on the same dev questions, those in the
    folder of --data if it is given.
    """
    folders = arguments.compare
    rows = [finished_results(folder) for folder in folders]
    # Dev questions are the first so many of a file's seeded shuffle.
    dev_files = {row["data"]["sha256"]["dev"] for row in rows}
    numbers = {row["data"]["dev_questions"] for row in rows}
    if arguments.data:
        name = ts.file_name("dev", rows[0]["data"]["v2"])
        dev_files.add(ts.read_squad(arguments.data, name).sha256)
    if len(dev_files) > 1 or len(numbers) > 1:
        raise ValueError("the models were not scored on the same dev questions")

    # One number per model: the median is not moved by a pass that the machine interrupted.
    models = [load_model(folder) for folder in folders]
    batch, length = arguments.batch, arguments.length
    device = ts.pick_device(arguments.device)
    passes = benchmark(models, batch, length, device=device)
    times = [statistics.median(own_times) for own_times in passes]
    threads = torch.get_num_threads()

    print(f"\n{'model':16} {'EM':>6} {'F1':>6} {'linear':>8} {'density':>8} {'total':>8} "
          f"{'heads':>7} {'FLOPs':>7} {'ms':>7} {'speed':>6}")
    dense = models[0].config
    table = []
    for folder, results, model, milliseconds in zip(folders, rows, models, times):
        results.update(size_of(model))
        results.update(latency_ms=milliseconds, speedup=times[0] / milliseconds, batch=batch,
                       length=length, device=device, threads=threads,
                       flops_ratio=flops(dense, length) / flops(model.config, length))
        with ts.locked(folder):
            write_json(folder / "results.json", results)
        print(table_line(folder.name, results, sum(dense.heads)))
        table.append({"model": folder.name, **results})
    write_json(folders[0].parent / "summary.json", table)
    print(f"forward pass of {batch} x {length} word pieces in fp32 on {device}, {threads} threads.")
    if rows[0]["data"]["builtin"]:
        print("The built-in made-up corpus, NOT SQuAD.")


def table_line(name: str, results: dict, all_heads: int) -> str:
    parameters = results["parameters"]
    heads = f"{sum(results['heads'])}/{all_heads}"
    return (f"{name:16} {results['exact_match']:6.2f} {results['f1']:6.2f} "
            f"{parameters['linear_nonzero'] / 1e6:7.2f}M {results['density']:8.3f} "
            f"{parameters['total'] / 1e6:7.2f}M {heads:>7} {results['flops_ratio']:6.2f}x "
            f"{results['latency_ms']:7.1f} {results['speedup']:5.2f}x")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, as that of train_squad.py."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the model folder to compact")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="FOLDER",
                        help="print the table of run folders")
    parser.add_argument("--data", default="", help="folder with dev-v1.1.json (that of the run); "
                        "with --compare: the one that all models must have been scored on")
    parser.add_argument("--v2", action="store_true", help="score on dev-v2.0.json (as the run)")
    parser.add_argument("--dev-questions", type=int, help="as in train_squad.py (that of the run)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"),
                        help="(a GPU that works, else the CPU)")
    parser.add_argument("--batch", type=int, default=32, help="rows of the timed forward pass (32)")
    parser.add_argument("--length", type=int, default=128, help="word pieces in each of them (128)")
    if argv is None:
        argv = sys.argv[1:]
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return ts.exit_status(compare, arguments)
    if not (arguments.folder and arguments.out):
        parser.error("a model folder and --out are needed, or --compare")
    return ts.exit_status(run, arguments, shlex.join(["python", "compact.py", *argv]))


if __name__ == "__main__":
    sys.exit(main())
