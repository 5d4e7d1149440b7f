"""What several test files need: a tiny BERT, a small corpus, the runs of `make squad` on them."""
import json
import re
from pathlib import Path

import torch

import compact
import train_squad as ts
from bert import BertConfig, BertForQuestionAnswering, save_model, write_json
from builtin import builtin_corpus

# Flags of every training: windows of the tiny model, a log line per step, comparable bits.
COMMON = ("--max-length 48 --max-question 16 --stride 8 --precision fp32 --device cpu "
          "--log-every 1").split()
# A pruning of which half is left, and a training of 12 steps, with masks that are pruned in these.
HYBRID = ("--method hybrid --block 4x6 --epochs 5 --lr 1e-3 --score-lr 0.2 --final-lambda 2 "
          "--final-warmup 4").split()
SHORT = "--questions 40 --epochs 3 --lr 1e-3".split()
SHORT_HYBRID = SHORT + ("--method hybrid --block 4x6 --score-lr 1 --final-lambda 5 "
                        "--final-warmup 2").split()


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_log(folder) -> list[dict]:
    """The lines of a run's log.jsonl, without what depends on the machine's speed."""
    lines = []
    for text in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        del line["examples_per_second"]
        lines.append(line)
    return lines


def snapshot(folder) -> dict:
    """What every file in a folder holds, and when it was written."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def bits(folder) -> dict:
    """What a run makes, and makes again to the bit."""
    names = ("config.json", "vocab.txt", "predictions.json", "f1.json", "masks.json")
    paths = [*folder.glob("*.safetensors"), *(folder / name for name in names)]
    found = {path.name: path.read_bytes() for path in paths if path.exists()}
    if (folder / "log.jsonl").exists():
        found["log"] = read_log(folder)
    return found


def tiny_config(vocab_size=50, **changes) -> BertConfig:
    """All sizes different, so that a transposed axis cannot hide."""
    values = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                  max_position_embeddings=64, initializer_range=0.1)
    return BertConfig(vocab_size, **{**values, **changes})


def write_bert(folder, words) -> None:
    """Write a model folder: a random BERT with this vocabulary."""
    torch.manual_seed(0)
    save_model(BertForQuestionAnswering(tiny_config(len(words))), folder)
    Path(folder, "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def write_home(home) -> None:
    """Write home/data, a made-up corpus in SQuAD's form, and home/bert, with the corpus's words."""
    text = ""
    for part, passages, seed in (("train", 100, 1), ("dev", 40, 2)):
        path = Path(home, f"data/{part}-v1.1.json")
        path.parent.mkdir(exist_ok=True)
        write_json(path, builtin_corpus(passages, seed, relations=3))
        text += path.read_text(encoding="utf-8").lower()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
    words += sorted(set(re.findall(r"[a-z]+|[^\w\s]", text)))
    write_bert(Path(home, "bert"), words)


def run_training(home, out, flags, init="bert", teacher=None) -> int:
    """Train on home/data; the exit status. Folders are in home, or wherever a whole path says."""
    arguments = ["--data", str(home / "data"), "--init", str(home / init), "--out", str(home / out)]
    if teacher is not None:
        arguments += ["--teacher", str(home / teacher)]
    return ts.main(arguments + COMMON + list(flags))


def run_compaction(folder, out, flags=()) -> int:
    """Compact a run folder into another; the exit status."""
    return compact.main([str(folder), "--out", str(out), "--device", "cpu", *flags])


def run_table(folders, flags=()) -> int:
    """Print the table of some run folders; the exit status."""
    folders = [str(folder) for folder in folders]
    return compact.main(["--compare", *folders, "--batch", "2", "--length", "48", *flags])


CHAIN = ("teacher", "hybrid", "small", "filled")


def run_step(home, name, flags=()) -> int:
    """One of the runs of `make squad` in home; the exit status. small is the compaction."""
    if name == "small":
        return run_compaction(home / "hybrid", home / "small", ["--data", f"{home}/data", *flags])
    if name == "teacher":
        return run_training(home, name, ["--epochs", "10", "--lr", "3e-3", *flags])
    if name == "hybrid":
        return run_training(home, name, [*HYBRID, *flags], init="teacher", teacher="teacher")
    filling = ["--fill", "--epochs", "2", "--lr", "1e-3", *flags]
    return run_training(home, name, filling, init="small", teacher="teacher")


def run_chain(home) -> None:
    """All of them; about 6 seconds."""
    for name in CHAIN:
        assert run_step(home, name) == 0
