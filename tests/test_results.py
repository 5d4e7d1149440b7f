"""results/: the pages, the numbers in their tables, and how a run gets in, on a tiny run."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "results"))
import bench                                                                # noqa: E402
import figures                                                              # noqa: E402
import keep                                                                 # noqa: E402
import moments                                                              # noqa: E402
import pictures                                                             # noqa: E402
import train_squad as ts                                                    # noqa: E402
from bert import BertConfig, BertForQuestionAnswering, load_tokenizer, save_model   # noqa: E402
from cut_to_shape import cut_to_shape                                       # noqa: E402
from questions import write_questions                                       # noqa: E402


SIZES = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
             max_position_embeddings=16)


def test_the_pages_have_the_tables_that_would_be_written(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    assert figures.main() == 0, capsys.readouterr().out


def test_an_interval_is_196_standard_errors_to_either_side():
    # Mean 3, sample variance (4 + 1 + 0 + 9) / 3: a standard error of sqrt(14 / 12).
    mean, low, high = figures.interval(np.array([1.0, 2.0, 3.0, 6.0]))
    half = 1.96 * (14 / 12) ** 0.5
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half))


def write_model(folder, f1, **more):
    folder.mkdir()
    results = {"data": {"sha256": {"dev": "d"}}, "f1": 100 * sum(f1) / len(f1), "density": 0.232,
               "parameters": {"total": 14_402_604}, "heads": [3, 0], "flops_ratio": 4.145}
    (folder / "results.json").write_text(json.dumps(results | more), encoding="utf-8")
    (folder / "f1.json").write_text(json.dumps(f1), encoding="utf-8")


def test_a_table_holds_each_model_against_its_control(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    write_model(tmp_path / "C", [1, 1, 0.5, 0.5])
    write_model(tmp_path / "F", [0.5, 1, 0.5, 0], speedup=3.846)
    rows = [("dense", "C", "20", None), ("refilled", "F", "6 + 14", "C")]
    _, _, dense, refilled = figures.models_table(rows).splitlines()
    assert dense == ("| [dense](results/C/results.json) | 20 | 23.2 % | 14.4 M | 3 | 1/4.14 | – | "
                     "75.00 | – |")
    # −50, 0, 0, −50: a standard error of sqrt(2500 / 3 / 4).
    assert refilled.endswith("| 3.85 x | 50.00 | −25.00 (−53.29 to +3.29) |")
    # A model that was scored on other questions has no difference.
    write_model(tmp_path / "X", [1, 0, 1, 0], data={"sha256": {"dev": "another"}})
    with pytest.raises(ValueError, match="different questions"):
        figures.gain("X", "C")


def test_what_two_models_have_left_in_both(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    # A head is left if its row of value and its column of out have a block.
    layers = {"A": {"value": ["10", "01", "11"], "out": ["101", "100"], "fc1": list("1100")},
              "B": {"value": ["11", "00", "01"], "out": ["111", "000"], "fc1": list("0111")}}
    for name, layer in layers.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "masks.json").write_text(json.dumps({"0": layer}), encoding="utf-8")
    assert figures.left_in("A") == {"heads": [{0, 2}], "inner dimensions": [{0, 1}]}
    assert figures.left_in("B") == {"heads": [{0, 2}], "inner dimensions": [{1, 2, 3}]}
    _, _, heads, dimensions = figures.overlap_table("A", "B").splitlines()
    assert heads == "| heads | 2 | 2 | 2 | 0 |"             # 2 · 2 / 12
    assert dimensions == "| inner dimensions | 2 | 3 | 1 | 0 |"


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_a_cut_to_shape_is_the_dense_model_with_parts_removed(by):
    torch.manual_seed(0)
    dense = BertForQuestionAnswering(BertConfig(10, **SIZES))
    shape = BertConfig(10, **SIZES, heads=[2, 0], ffn=[7, 20])
    rows = dense.bert.layers[0].ffn.fc1.weight.tolist()
    small = cut_to_shape(dense, shape, by)
    assert (small.config.heads, small.config.ffn) == ([2, 0], [7, 20])
    assert all(row in rows for row in small.bert.layers[0].ffn.fc1.weight.tolist())


def test_by_magnitude_the_parts_of_the_largest_weights_are_left():
    torch.manual_seed(0)
    dense = BertForQuestionAnswering(BertConfig(10, **SIZES))
    layer = dense.bert.layers[1]
    # The second head is the largest by its columns of out, dimensions 3 and 8 by fc1 and by fc2.
    with torch.no_grad():
        layer.attention.out.weight[:, 4:8] += 1
        layer.ffn.fc1.weight[3] += 1
        layer.ffn.fc2.weight[:, 8] += 1
    query = layer.attention.query.weight[4:8].tolist()
    rows = layer.ffn.fc1.weight[[3, 8]].tolist()
    shape = BertConfig(10, **SIZES, heads=[3, 1], ffn=[20, 2])
    small = cut_to_shape(dense, shape, "magnitude").bert.layers[1]
    assert small.attention.query.weight.tolist() == query
    assert small.ffn.fc1.weight.tolist() == rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished fine-pruning of a tiny BERT, at home/hybrid, on a corpus of five words."""
    home = tmp_path_factory.mktemp("home")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] stone moon sun tree who".split()
    save_model(BertForQuestionAnswering(BertConfig(len(words), **SIZES)), home / "bert")
    (home / "bert/vocab.txt").write_text("\n".join(words), encoding="utf-8")
    answer = {"text": "moon", "answer_start": 6}
    questions = [{"id": f"q{n}", "question": "who", "answers": [answer]} for n in range(4)]
    paragraph = {"context": "stone moon sun tree", "qas": questions}
    squad = {"data": [{"title": "", "paragraphs": [paragraph]}]}
    for part in ("train", "dev"):
        (home / f"{part}-v1.1.json").write_text(json.dumps(squad), encoding="utf-8")
    flags = (f"--data {home} --init {home}/bert --out {home}/hybrid --method hybrid --block 4x4 "
             "--epochs 20 --score-lr 1 --final-lambda 9 --final-warmup 4 --log-every 1 "
             "--device cpu --precision fp32 --max-length 14 --max-question 4 --stride 2")
    assert ts.main(flags.split()) == 0
    return home / "hybrid"


def test_a_run_is_kept_with_its_moments(run, tmp_path):
    moments.watch(run, pause=0)
    keep.keep(run, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "run.json", "f1.json", "log.jsonl", "moments.json"}
    results = keep.read(tmp_path / "results.json")
    f1 = keep.read(tmp_path / "f1.json")
    assert 25 * sum(f1) == pytest.approx(results["f1"], abs=0.01)
    assert len(results["heads_authors_rule"]) == len(results["heads"]) == 2
    six = keep.read(tmp_path / "moments.json")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert [moment["step"] for moment in six] == [20] * 6 == [last["step"]] * 6
    assert six[0]["density"]["all"] == pytest.approx(last["density"]["all"], rel=1e-3)
    assert "<svg" in pictures.moments_picture(six, 3, "title")


def test_moments_are_the_nearest_to_six_of_the_schedule():
    taus = [0, 0, 0, 0.02, 0.04, 0.06, 0.08, 0.09, 0.1, 0.1, 0.1]
    log = [{"step": 10 * n, "threshold": tau} for n, tau in enumerate(taus)]
    found = moments.six([{"step": step} for step in range(4, 104, 9)], log)
    assert [moment["step"] for moment in found] == [4, 40, 49, 58, 67, 103]


def test_questions_of_one_seed_are_a_folder_of_their_own(run, tmp_path):
    def described(folder, *limit):
        squad = ts.read_squad(folder, "train-v1.1.json", *limit)
        return {q.id: (q.text, squad.passages[q.passage], q.answers) for q in squad.questions}

    write_questions(run.parent, tmp_path, 2, 18)
    assert described(tmp_path) == described(run.parent, 2, 18) != described(run.parent, 2, 17)
    assert ts.read_bytes(tmp_path / "dev-v1.1.json") == ts.read_bytes(run.parent / "dev-v1.1.json")


def test_the_benchmark_trains(run):
    config = ts.fill_in(ts.Config(init=str(run.parent / "bert"), max_length=14, max_question=4,
                                  stride=2, precision="fp32", method="hybrid", block="4x4"))
    squad = ts.read_squad(run.parent, "train-v1.1.json")
    features = ts.Features(squad, load_tokenizer(config.init), config, training=True)
    step = bench.a_step(config, features, "hybrid")
    assert [len(times) for times in bench.take_turns([step, step], 2)] == [2, 2]
