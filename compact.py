"""Cut what pruning emptied out of a BERT: a smaller dense network that computes the same function.

    python compact.py R/hybrid --data D --out R/hybrid-compact        compact, check on real text, score
    python compact.py --compare R/teacher R/hybrid-compact R/filled --data D        the table, with speed

compact() needs bert.py and blockprune.py: heads and FFN dimensions go, the residual width E stays. After Lagunas
et al. 2021 (the authors' compile_model and optimize_model, huggingface/nn_pruning at 0cef2b2,
nn_pruning/patch_coordinator.py and inference_model_patcher.py), but exact where they are not.

    E hidden size   H heads   D head size   F FFN width   (out, in) weights
Comments: `# Differs:` marks a deviation from the authors, `# Note:` a remark of ours.
"""
import argparse
import copy
import dataclasses
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

import blockprune
from bert import (BertConfig, BertForQuestionAnswering, hf_tensors, load_model, load_tokenizer, save_model,
                  write_json)
import train_squad as ts

# ------------------------------------------------------------------------------------- compaction

@torch.no_grad()
def compact(model: BertForQuestionAnswering) -> BertForQuestionAnswering:
    """A smaller model with the same function: in eval mode, for rows with at least one real token.

    model: masked, baked, dense or compacted, of finite weights; it is left as it is. Heads and FFN dimensions
    that add nothing or a constant go, and the constants go into the bias that follows: see cut_heads() and
    cut_dimensions() of blockprune.py.

    # Differs: the reference drops the constants, and keeps at least one head and one dimension a layer.
    """
    small = blockprune.bake(copy.deepcopy(model))
    for layer in small.bert.layers:
        a, ffn = layer.attention, layer.ffn
        a.heads = blockprune.cut_heads(a.query, a.key, a.value, a.out, model.config.head_size)
        ffn.width = blockprune.cut_dimensions(ffn.fc1, ffn.fc2, ffn.act)
    small.config = dataclasses.replace(model.config, heads=[layer.attention.heads for layer in small.bert.layers],
                                       ffn=[layer.ffn.width for layer in small.bert.layers])
    return small


@torch.no_grad()
def heads_authors_rule(model: BertForQuestionAnswering) -> list[int]:
    """Heads left in each layer by the reference's rule: Q, K and V not empty, and at least one (not exact)."""
    D = model.config.head_size
    return [max(min(1, a.heads), int(torch.stack([(w.view(-1, D * w.shape[1]) != 0).any(1) for w in (
            a.query.weight, a.key.weight, a.value.weight)]).all(0).sum()))
            for a in (layer.attention for layer in model.bert.layers)]


# ----------------------------------------------------------------------------------------- counts

@torch.no_grad()
def count_parameters(model: BertForQuestionAnswering) -> dict[str, int]:
    """Sizes of a model, masks folded in. "linear" are the matrices of the encoder: what density is of.

    linear: their elements; linear_nonzero: those that are not 0; linear_dense: their elements in the
    dense model of the same configuration; encoder, total: all parameters, with biases and norms;
    bytes: those of `total` in fp32.
    """
    c, tensors = model.config, hf_tensors(model)
    encoder = {name: t for name, t in tensors.items() if name.startswith("encoder.")}
    linear = [t for name, t in encoder.items() if t.dim() == 2]
    total = sum(t.numel() for t in tensors.values())
    return dict(linear=sum(t.numel() for t in linear), linear_nonzero=sum(int(t.count_nonzero()) for t in linear),
                linear_dense=c.num_hidden_layers * (4 * c.hidden_size + 2 * c.intermediate_size) * c.hidden_size,
                encoder=sum(t.numel() for t in encoder.values()), total=total, bytes=4 * total)


def flops(config: BertConfig, length: int) -> int:
    """Floating point operations of one row's forward pass, 2 for each multiply-add, products alone.

    For T tokens a layer of H heads and width F has 4 · T · E · HD (projections), 2 · T² · HD (scores
    and the mean they weigh) and 2 · T · E · F multiply-adds; the QA head 2 · T · E.
    """
    T, E, D = length, config.hidden_size, config.head_size
    layers = sum(4 * T * E * H * D + 2 * T * T * H * D + 2 * T * E * F for H, F in zip(config.heads, config.ffn))
    return 2 * (layers + 2 * T * E)


@torch.no_grad()
def benchmark(models: list[torch.nn.Module], batch: int, length: int, repeats: int = 9, precision: str = "fp32",
              device: str = "cpu") -> list[list[float]]:
    """Milliseconds of a forward pass, by model: the models take turns, of two passes each, of which the second counts.

    So each finds its weights and its memory as it left them, not as the others did. Random ids without padding;
    the models are moved to the device and set to eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models[0].config.vocab_size, (batch, length), generator=generator).to(device)
    synchronize = torch.get_device_module(device).synchronize       # nothing on a CPU
    times: list[list[float]] = [[] for _ in models]
    models = [model.eval().to(device) for model in models]
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):   # Note: so weights are cast once
        for _ in range(1 + repeats):    # the first turn warms up
            for model, spent in zip(models, times):
                model(ids)
                synchronize()
                start = time.perf_counter()
                model(ids)
                synchronize()
                spent.append(1000 * (time.perf_counter() - start))
    return [spent[1:] for spent in times]


# --------------------------------------------------------------------------------------- pictures

def draw(config: BertConfig) -> str:
    """Heads and FFN width left in each layer, as text."""
    full, most = config.num_attention_heads, config.intermediate_size
    return "\n".join(f"layer {i:2}  heads {'■' * heads:·<{full}} {heads:2}/{full}   "
                     f"ffn {'█' * round(24 * width / most):·<24} {width:4}/{most}"
                     for i, (heads, width) in enumerate(zip(config.heads, config.ffn)))


@torch.no_grad()
def mask_rows(model: BertForQuestionAnswering) -> dict[str, dict[str, list[str]]]:
    """The masks on the grid of blocks, a string of 0 and 1 a row, by layer and matrix."""
    return {str(i): {name: ["".join("01"[int(x)] for x in row)
                            for row in module.parametrizations.weight[0].block_mask()]
                     for name, module in (*layer.attention.named_children(), *layer.ffn.named_children())}
            for i, layer in enumerate(model.bert.layers)}


# -------------------------------------------------------------------------------- on disk, and the check

@torch.no_grad()
def check(model: BertForQuestionAnswering, small: BertForQuestionAnswering, batches, spans) -> float:
    """Both models on real text: the largest |Δ logit| at a real token. ValueError if it is too large.

    Allowed is 1e-5 · max(1, max |logit|), and another best span only where two spans are nearer than
    twice that. batches: ids, types, real, context; spans(start, end, context) → score, i, j.
    """
    worst, largest, doubtful = torch.zeros(()), 1.0, []
    for batch in batches:
        real = batch["real"]
        (s, e), (s2, e2) = ([logits.masked_fill(~real, 0) for logits in m(batch["ids"], batch["types"], real)]
                            for m in (model, small))
        worst = torch.maximum(worst, torch.stack([(s - s2).abs(), (e - e2).abs()]).max().cpu())     # NaN stays NaN
        largest = max(largest, float(s.abs().max()), float(e.abs().max()))
        (value, i, j), (_, i2, j2) = spans(s, e, batch["context"]), spans(s2, e2, batch["context"])
        row = torch.arange(len(i), device=i.device)
        moved = (i != i2) | (j != j2)
        doubtful += (value - s[row, i2] - e[row, j2])[moved].tolist()   # how much worse the other span is
    tolerance = 1e-5 * largest
    if not worst <= tolerance < math.inf or any(gap > 2 * tolerance for gap in doubtful):
        raise ValueError(f"the compacted model differs: |Δ logit| {worst:.2e} where {tolerance:.2e} is allowed, "
                         f"{len(doubtful)} other spans. No model was written")
    return worst.item()


# ---------------------------------------------------------------------------------- command line

def counted(model: BertForQuestionAnswering) -> dict:
    """What results.json says of a model's size. heads and ffn are those that compaction leaves."""
    parameters = count_parameters(model)
    small = compact(model).config
    return dict(parameters=parameters, density=parameters["linear_nonzero"] / parameters["linear_dense"],
                heads=small.heads, heads_authors_rule=heads_authors_rule(model), ffn=small.ffn)


def run(folder: Path, out: Path, data: str, v2: bool, dev_questions: int | None,
        command: str) -> None:
    """Compact a run folder into another: checked on real text, then scored as read back from disk."""
    began = time.monotonic()
    trained = ts.read_run(folder)
    if trained is None:
        raise ValueError(f"{folder}: no run of ours is in it")
    scored(folder)

    # The settings are those of the run, but for what is scored, and where.
    config = ts.Config(**trained["settings"])
    config.out = str(out)
    config.device = None
    if data:
        config.data = data
    if v2:
        config.v2 = True
    if dev_questions is not None:
        config.dev_questions = dev_questions
    config = ts.settle(config)
    dev = ts.read_squad(config.data, ts.file_name("dev", config.v2), config.dev_questions)
    contents = {"contents of dev": dev.sha256, **ts.contents_of("run", folder)}

    with ts.held(out):
        if ts.claim(config, contents, command, compacted=folder):
            print(f"{out}: finished before, its results.json is there")
            return
        features = ts.Features(dev, load_tokenizer(folder), config, training=False)
        masked = ts.load_pruning(folder).eval().to(config.device)
        small = compact(masked)
        # No model is written before the two are seen to be one function, on 1,024 windows at random.
        some = torch.randperm(len(features), generator=torch.Generator().manual_seed(config.seed))[:1024].numpy()
        worst = check(masked, small, (features.batch(some[i:i + 32], config.device) for i in range(0, len(some), 32)),
                      lambda s, e, context: ts.best_spans(s, e, context, config.max_answer))
        save_model(small, out, folder / "vocab.txt")
        if hasattr(masked.bert.layers[0].ffn.fc1, "parametrizations"):
            write_json(out / "masks.json", mask_rows(masked))
        small = load_model(out)
        before, after = (ts.evaluate(model, features, config, out) for model in (masked, small))
        of_masked = counted(masked)
        sizes = counted(small) | dict(heads_authors_rule=of_masked["heads_authors_rule"])
        ts.write_results(out, config, None, dev, **after, exact_match_masked=before["exact_match"], f1_masked=before["f1"],
                         density_masked=of_masked["density"], **sizes, max_abs_logit_difference=worst, command=command,
                         seconds=time.monotonic() - began)
    print(f"{draw(small.config)}\n{out}: F1 {before['f1']:.2f} masked, {after['f1']:.2f} compact; the largest logit "
          f"difference over {len(some)} windows in fp32 is {worst:.1e}")


def scored(folder: Path) -> dict:
    """The results.json of a folder; ValueError where it has none of the files that are there."""
    results = ts.scored(folder)
    if results is None:
        raise ValueError(f"{folder}/results.json is missing or not of the weights beside it: run what "
                         "made it again")
    return results


def compare(folders: list[Path], data: str, v2: bool, batch: int, length: int) -> None:
    """The table of some run folders; speed is held against the first, measured in one go in fp32.

    ValueError if they were not all scored on the same dev set, that of the folder `data` if it is given, or if the
    results.json of one is not of its weights.
    """
    data = data and ts.settle(ts.Config(data=data)).data
    rows = [scored(folder) for folder in folders]
    dev_sets = set()
    for results in rows:
        dev_sets.add((results["data"]["sha256"].get("dev"), results["data"].get("dev_questions")))
    if len(dev_sets) > 1 or data and next(iter(dev_sets))[0] != ts.read_squad(data, ts.file_name("dev", v2)).sha256:
        raise ValueError("the models were not scored on the same dev questions")
    models = [load_model(folder) for folder in folders]
    if min(batch, length) < 1 or length > (most := min(model.config.max_position_embeddings for model in models)):
        raise ValueError(f"--batch {batch}, --length {length}: over 0, and within the models' {most} positions")
    device, full = "cuda" if torch.cuda.is_available() else "cpu", models[0].config
    times = [statistics.median(t) for t in benchmark(models, batch, length, device=device)]
    print(f"\n{'model':16} {'EM':>6} {'F1':>6} {'linear':>8} {'density':>8} {'total':>8} {'heads':>7} {'FLOPs':>7} "
          f"{'ms':>7} {'speed':>6}")
    table = []
    for folder, results, model, ms in zip(folders, rows, models, times):
        results.update({**counted(model), **{k: results[k] for k in ("heads_authors_rule",) if k in results}})
        results.update(latency_ms=ms, speedup=times[0] / ms, batch=batch, length=length, device=device,
                       threads=torch.get_num_threads(), flops_ratio=flops(full, length) / flops(model.config, length))
        with ts.held(folder):
            for path in ts.half_written(folder):    # by a table that was killed
                path.unlink()
            write_json(folder / "results.json", results)
        p, heads = results["parameters"], f"{sum(results['heads']):3}/{sum(full.heads)}"
        print(f"{folder.name:16} {results['exact_match']:6.2f} {results['f1']:6.2f} {p['linear_nonzero'] / 1e6:7.2f}M "
              f"{results['density']:8.3f} {p['total'] / 1e6:7.2f}M {heads:>7} "
              f"{results['flops_ratio']:6.2f}x {ms:7.1f} {results['speedup']:5.2f}x")
        table.append({"model": folder.name, **results})
    write_json(folders[0].parent / "summary.json", table)
    print(f"forward pass of {batch} x {length} word pieces in fp32 on {device}, {torch.get_num_threads()} threads. "
          + ("The built-in made-up corpus, NOT SQuAD." if table[0]["data"].get("name") == "builtin" else ""))


def main(argv: list[str] | None = None) -> int:
    ts.forgiving_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the run folder to compact")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="FOLDER", help="print the table of run folders")
    parser.add_argument("--data", default="", help="folder with dev-v1.1.json; default: that of the run")
    parser.add_argument("--v2", action="store_true", help="score on dev-v2.0.json, whatever the run was trained on")
    parser.add_argument("--dev-questions", type=int, help="as in train_squad.py; default: that of the run")
    parser.add_argument("--batch", type=int, default=32, help="rows of the timed forward pass")
    parser.add_argument("--length", type=int, default=128, help="word pieces in each of them")
    if argv is None:
        argv = sys.argv[1:]
    a = parser.parse_args(argv)
    if a.compare:
        return ts.exit_status(compare, a.compare, a.data, a.v2, a.batch, a.length)
    if not a.folder or not a.out:
        parser.error("give a run folder and --out, or --compare")
    return ts.exit_status(run, a.folder, a.out, a.data, a.v2, a.dev_questions,
                          shlex.join(["python", "compact.py", *argv]))


if __name__ == "__main__":
    sys.exit(main())
