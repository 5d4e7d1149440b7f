"""The programs of results/: the benchmark, the sweep, the tables and the pictures.

Nothing is timed and nothing is trained here. The benchmark has a clock that the tests advance, the
sweep's commands are written down, and tables are made of runs that are made up in tmp_path.
"""
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "results"))
import bench            # noqa: E402
import figures          # noqa: E402
import pictures         # noqa: E402
import sweep            # noqa: E402
import train_squad as ts                                                                # noqa: E402
from bert import BertConfig, BertForQuestionAnswering, load_tokenizer, save_model    # noqa: E402


class Clock:
    """A clock for time.perf_counter() that stands still but for advance()."""

    def __init__(self):
        self.now = 50.0

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    return clock


# ------------------------------------------------------------------------- the benchmark: its rows


def test_works_take_turns_after_one_call_that_does_not_count(clock):
    calls = []

    def work(name, durations):
        def call(turn):
            calls.append((name, turn))
            clock.advance(durations.pop(0))
        return call

    times = bench.take_turns([work("a", [99, 1, 2, 6]), work("b", [88, 4, 3, 5])], turns=3)
    assert times == [pytest.approx([1, 2, 6]), pytest.approx([4, 3, 5])]
    warm_up = [("a", 0), ("b", 0)]
    assert calls == warm_up + [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_spread_is_a_share_of_the_median():
    assert bench.spread([1, 2, 6]) == 2.5       # (6 − 1) / 2


@pytest.mark.parametrize("ratio, wanted, at_most, met", [
    (3.5, 3.5, False, True),
    (3.49, 3.5, False, False),
    (1.08, 1.08, True, True),
    (1.09, 1.08, True, False),
    (None, 8, False, None),         # not measured
    (3.0, None, False, None),       # nothing is wanted of it
])
def test_a_goal_is_met_from_its_bound_on(ratio, wanted, at_most, met, capsys):
    row = bench.row("1", "what", 2.0, 7.0, "s", ratio, wanted, at_most=at_most)
    assert row["met"] is met
    missed = "MISSED" in capsys.readouterr().out
    assert missed == (met is False)


def test_a_row_is_printed_in_one_line(capsys):
    bench.row("4", "a step", 200.0, 215.0, "ms", 1.075, 1.08, at_most=True)
    bench.not_here("6", "a forward pass", "there is no bf16")
    assert capsys.readouterr().out.splitlines() == [
        "4   a step: 200 -> 215 ms, ratio 1.075 (wanted <= 1.08)",
        "6   a forward pass: not measured, there is no bf16",
    ]


def test_goals_for_a_cpu_are_not_held_against_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    assert bench.cpu_goal(8) == 8
    monkeypatch.setattr(bench, "DEVICE", "cuda")
    assert bench.cpu_goal(8) is None


def test_a_forward_row_is_a_ratio_of_medians_or_its_share_of_the_flops(monkeypatch):
    """One layer, E 8, D 1, T 4, no FFN: 2 (4 T E H + 2 T² H + 2 T E) operations for H heads."""
    full = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=8, heads=[8], ffn=[0])
    half = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=8, heads=[4], ffn=[0])
    assert bench.flops(full, 4) == 2688
    assert bench.flops(half, 4) == 1408
    monkeypatch.setattr(bench, "benchmark", lambda *arguments: [[30, 28, 90], [20, 21, 10]])

    row = bench.forward("6", "x", full, half, 2, 4, "fp32", wanted=1.4, turns=3)
    assert row["baseline"] == 30
    assert row["ours"] == 20
    assert row["ratio"] == 1.5
    assert row["spread"] == 0.55        # (21 − 10) / 20
    assert row["met"]
    assert row["what"] == "x, 2 x 4, fp32: 1.50 x, FLOPs 1.91 x"

    share = bench.forward("5", "x", full, half, 2, 4, "fp32", wanted=0.85, turns=3, of_flops=True)
    assert share["ratio"] == pytest.approx(1.5 * 1408 / 2688)
    assert not share["met"]


def test_the_headline_architecture_is_the_papers():
    weights = 0
    for heads, width in zip(bench.HEADLINE.heads, bench.HEADLINE.ffn):
        weights += 4 * 768 * 64 * heads     # query, key, value and out
        weights += 2 * 768 * width          # fc1 and fc2
    assert weights == 22_248_960            # 26.2 % of BERT-base's


# ------------------------------------------------------------ the benchmark: what the rows measure


def test_training_rates_are_windows_a_second(clock):
    """Ours takes a hundredth of a second for each token, the reference ten seconds a step."""
    lengths = np.arange(1, 51)
    seen = []

    def step(windows):
        seen.extend(windows.tolist())
        clock.advance(0.01 * len(windows) * lengths[windows].max())

    def reference_step(windows):
        assert len(windows) == 16
        clock.advance(10)

    # Sorted by length, 50 windows are batches of up to 16, 32, 48 and 50 tokens.
    features = SimpleNamespace(lengths=lengths)
    baseline, rates = bench.training_rates(step, reference_step, features, turns=2)
    assert baseline == pytest.approx(32 / 20)
    assert len(rates) == 2
    # The first turn has the first and third batch by length, the second turn the others.
    assert rates == pytest.approx([32 / 10.24, 18 / 6.12])
    # After a warm-up, which is the first turn's, each window is seen once.
    assert sorted(seen[32:]) == list(range(50))


@pytest.fixture
def tiny(tmp_path):
    """A model with random weights, five passages of other lengths in windows, and the settings."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "stone", "moon", "sun", "tree", "who"]
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(
        vocab_size=len(words), hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=17))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_model(model, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")

    passages = ["sun", "stone moon " * 7, "moon tree sun", "tree " * 12, "sun moon stone tree sun"]
    questions = [(f"q{n}", "who", n, []) for n in range(len(passages))]
    config = ts.Config(max_length=14, stride=2, max_question=4, precision="fp32", device="cpu")
    squad = ts.Squad(passages, questions, "")
    features = ts.Features(squad, load_tokenizer(tmp_path), config, training=False)
    return model, features, config


def test_padded_windows_are_the_same_with_more_padding(tiny):
    _, features, _ = tiny
    windows = np.array([0, 3])
    before = features.lengths.tolist()
    batch = features.batch(windows)
    T = batch["ids"].shape[1]
    assert T < 17
    padded = bench.all_padded(features, 17).batch(windows)
    assert features.lengths.tolist() == before      # these are not touched
    for name in ("ids", "types", "real", "context"):
        assert padded[name].shape == (2, 17)
        assert torch.equal(padded[name][:, :T], batch[name])
        assert not padded[name][:, T:].any()        # 0 is [PAD] here


def test_the_baseline_of_prediction_gives_the_same_answers(tiny):
    model, features, config = tiny
    # Several batches, and questions with several windows.
    assert len(features) > 2 * 3
    assert len(features) > len(features.squad.questions)
    wanted = ts.predict(model, features, config)
    found = bench.predict_in_order(model, bench.all_padded(features, 17), config, size=3)
    assert set(found) == set(wanted)
    for question_id, (text, score) in wanted.items():
        assert found[question_id] == (text, pytest.approx(score, abs=1e-4))


@pytest.mark.parametrize("platform, counted", [
    ("linux", 2_000_000),               # KiB
    ("darwin", 2_048_000_000),          # bytes
])
def test_peak_memory_is_in_megabytes(monkeypatch, platform, counted):
    usage = SimpleNamespace(ru_maxrss=counted)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    assert bench.peak_megabytes() == 2048


def test_a_system_without_peaks_has_rows_that_are_not_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)      # importing it fails, as on Windows
    assert bench.peak_megabytes() is None

    def in_a_process(job, config):
        if job == "features":
            return {"questions": 8, "seconds": 3.0, "peak": None}
        return {"peak": None}
    monkeypatch.setattr(bench, "in_a_process", in_a_process)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    features, of_step, of_features = bench.memory_rows(ts.Config())
    assert features["ours"] == 3.0
    assert features["met"]
    assert of_step["ratio"] is None
    assert of_features["ratio"] is None


def made_up_rows(config=None, amount=None):
    return [
        bench.not_here("1", "training", bench.NO_BF16),
        bench.row("2", "fp32", 5.0, 15.0, "examples/s", 3.0, 3.5, 0.1),
        bench.row("7", "all", None, 6.8, "s", 6.8, 60, at_most=True),
    ]


def test_the_benchmark_writes_what_the_table_is_made_of(tmp_path, monkeypatch):
    """From the command line to the file, and from the file to the table."""
    def tests_row():
        return bench.row("8", "make test", None, 95.0, "s", 95.0, 90, at_most=True)
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)         # where the built-in corpus is written
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "measure", made_up_rows)
    monkeypatch.setattr(bench, "tests_row", tests_row)

    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick"])
    assert bench.main() == 0
    assert not list((tmp_path / "results").iterdir())

    monkeypatch.setattr(sys, "argv", ["bench.py", "--data", "builtin"])
    assert bench.main() == 0
    lines = figures.speed(tmp_path / "results/bench-cpu.json").splitlines()
    assert lines[2:5] == [
        "| 2. fp32 | 5 examples/s | 15 examples/s | 3 ± 5 % | ≥ 3.5 (missed) |",
        "| 7. all | – | 6.8 s | 6.8 | ≤ 60 |",
        "| 8. make test | – | 95 s | 95 | ≤ 90 (missed) |",
    ]
    assert lines[6] == "1. training: not measured, this processor has no bf16 units"
    assert "`python results/bench.py --data builtin` on " in lines[7]


# -------------------------------------------------------------------------------------- the sweep


def write_run(out, script):
    """What a training or a compaction leaves, as far as the sweep looks at it.

    Each file says whose it is. The masks of single weights are too large to be kept.
    """
    out.mkdir(parents=True)
    for name in ("results.json", "f1.json", "run.json", "model.safetensors"):
        (out / name).write_text(out.name)
    if script == "train_squad.py":
        (out / "log.jsonl").write_text(out.name)
        return
    masks = "x" * 10
    if "1x1" in out.name:
        masks = "x" * 2_000_000
    (out / "masks.json").write_text(masks)


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A sweep of two points whose commands are only written down: (script, arguments) of each."""
    commands = []

    def run(script, arguments):
        words = [str(argument) for argument in arguments]
        commands.append((script, words))
        if "--out" in words:
            out = words[words.index("--out") + 1]
            write_run(Path(out), script)
    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "hybrid-32x32-80", "unstructured-1x1-160",
                                      "--data", "D", "--runs", f"{tmp_path}/R"])
    sweep.main()
    return commands


def test_the_sweep_trains_each_point_from_one_teacher(swept, tmp_path):
    R = f"{tmp_path}/R"
    teacher = dict(out=f"{R}/teacher", init="weights/minilm", teacher="", method="dense",
                   questions=8000, epochs=2)
    hybrid = dict(out=f"{R}/hybrid-32x32-80", init=f"{R}/teacher", teacher=f"{R}/teacher",
                  method="hybrid", block="32x32", final_lambda=80, questions=4000)
    filled = dict(out=f"{R}/hybrid-32x32-80-filled", init=f"{R}/hybrid-32x32-80-compact",
                  teacher=f"{R}/teacher", fill=True, questions=4000)
    unstructured = dict(out=f"{R}/unstructured-1x1-160", init=f"{R}/teacher",
                        teacher=f"{R}/teacher", method="unstructured", block="1x1",
                        final_lambda=160, questions=4000)
    wanted = []
    for settings in (teacher, hybrid, filled, unstructured):
        wanted.append(ts.Config(data="D", dev_questions=2000, max_length=256, **settings))

    found = []
    for script, words in swept:
        if script == "train_squad.py":
            settings = ts.parse(words)
            del settings["score"]       # two flags that are no settings
            del settings["ask"]
            found.append(ts.Config(**settings))
    assert found == wanted


def test_the_sweep_compacts_and_times_each_point(swept, tmp_path):
    R = f"{tmp_path}/R"
    hybrid = f"{R}/hybrid-32x32-80"
    unstructured = f"{R}/unstructured-1x1-160"
    compare = ["--data", "D", "--compare", f"{R}/teacher"]
    of_hybrid = [f"{hybrid}-compact", f"{hybrid}-filled"]
    of_unstructured = [f"{unstructured}-compact"]
    assert [words for script, words in swept if script == "compact.py"] == [
        [hybrid, "--data", "D", "--out", f"{hybrid}-compact"],
        compare + of_hybrid,
        [unstructured, "--data", "D", "--out", f"{unstructured}-compact"],
        compare + of_unstructured,
        compare + of_hybrid + of_unstructured,
    ]


def test_the_sweep_keeps_small_files(swept, tmp_path):
    trained = {     # model → the run that trained it
        "teacher": "teacher",
        "hybrid-32x32-80-compact": "hybrid-32x32-80",
        "hybrid-32x32-80-filled": "hybrid-32x32-80-filled",
        "unstructured-1x1-160-compact": "unstructured-1x1-160",
    }
    wanted = {"hybrid-32x32-80-compact/masks.json": "x" * 10}
    for model, run in trained.items():
        wanted[f"{model}/results.json"] = model
        wanted[f"{model}/f1.json"] = model
        wanted[f"{model}/run.json"] = run
        wanted[f"{model}/log.jsonl"] = run

    found = {}
    kept = tmp_path / "results/sweep"
    for path in kept.glob("*/*"):
        found[path.relative_to(kept).as_posix()] = path.read_text()
    assert found == wanted


# -------------------------------------------------------------------------------- tables of a run


def write(folder, name, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def cells(table):
    """The cells of a table, a list for each row, the names of its columns first."""
    lines = table.splitlines()
    del lines[1]        # the ruler
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


@pytest.mark.parametrize("pruned, filled", [
    ("hybrid", "filled"),
    ("hybrid-6", "hybrid-6-filled"),
])
def test_the_headline_is_dense_pruned_and_refilled(tmp_path, monkeypatch, pruned, filled):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(figures, "HEADLINE", ("run", pruned))
    write(tmp_path / "run/teacher", "results.json", {
        "f1": 80.004, "exact_match": 70.5, "density": 1.0, "parameters": {"total": 22_566_146},
        "heads": [12, 12], "speedup": 1.0})
    write(tmp_path / f"run/{pruned}-compact", "results.json", {
        "f1": 76.126, "exact_match": 65.25, "density": 0.20349, "parameters": {"total": 14_449_000},
        "heads": [3, 0], "speedup": 3.996})
    write(tmp_path / f"run/{filled}", "results.json", {
        "f1": 79.5, "exact_match": 69.0, "density": 0.2404, "parameters": {"total": 14_449_000},
        "heads": [3, 0], "speedup": 3.9})
    compact_file = f"results/run/{pruned}-compact/results.json"
    filled_file = f"results/run/{filled}/results.json"
    assert cells(figures.headline()) == [
        ["MiniLM on SQuAD v1.1", "F1", "EM", "weights kept", "parameters", "heads", "speed"],
        ["[dense](results/run/teacher/results.json)", "80.00", "70.50", "100.0 %", "22.6 M", "24",
         "1.00 x"],
        [f"[pruned and compacted]({compact_file})", "76.13", "65.25", "20.3 %", "14.4 M", "3",
         "4.00 x"],
        [f"[refilled]({filled_file})", "79.50", "69.00", "24.0 %", "14.4 M", "3", "3.90 x"],
    ]


def test_the_papers_rows_stand_as_the_authors_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    write(tmp_path, "paper.json", {"headline": [
        {"model": "A", "exact_match": 80.8, "f1": 88.5, "density": 1, "heads": 144, "speedup": 1,
         "differs": "size"},
        {"model": "B", "exact_match": None, "f1": 86.67, "density": 0.198, "heads": 64,
         "speedup": 2.44, "differs": "length"}]})
    assert cells(figures.paper_table())[1:] == [
        ["A", "88.5", "80.8", "100.0 %", "144", "1.00 x", "size"],
        ["B", "86.67", "–", "19.8 %", "64", "2.44 x", "length"],
    ]


def write_pruned(run, epochs, settings, dense, masked, compacted, filled):
    """Write a dense model, a pruned one, its compaction and its refilled one.

    masked: what the compaction says of the model with its masks on.
    """
    write(run / "teacher", "results.json", dense)
    pruned = run / f"hybrid-{epochs}"
    write(pruned, "run.json", {"settings": settings})
    write(Path(f"{pruned}-compact"), "results.json", masked | compacted)
    write(Path(f"{pruned}-filled"), "results.json", filled)


def test_the_table_of_epochs_has_a_row_for_each_length(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(figures, "LENGTHS", (("A", 3), ("B", 20)))
    # An older run: the density with masks on stands with the masked model.
    write_pruned(tmp_path / "A", 3, {"final_lambda": 30.0, "score_lr": 0.033},
                 {"f1": 72.166},
                 {"f1_masked": 68.0, "exact_match_masked": 50.0},
                 {"f1": 67.994, "density": 0.3},
                 {"f1": 70.0, "density": 0.35, "heads": [4, 4], "speedup": 2.0})
    write(tmp_path / "A/hybrid-3", "results.json", {"density": 0.31})
    write(tmp_path / "A/teacher", "f1.json", {"a": 0.5, "b": 0.25})
    write(tmp_path / "A/hybrid-3-filled", "f1.json", {"a": 0.25, "b": 0.0})
    # A newer one, with a dense model of its own.
    write_pruned(tmp_path / "B", 20, {"final_lambda": 7.5, "score_lr": 0.01},
                 {"f1": 72.5},
                 {"f1_masked": 71.236, "exact_match_masked": 60.0, "density_masked": 0.2049},
                 {"f1": 71.0, "density": 0.2},
                 {"f1": 74.5, "density": 0.2396, "heads": [2, 5], "speedup": 2.756})
    # Both questions gain 0.25, in whatever order they stand: an interval of one point.
    write(tmp_path / "B/teacher", "f1.json", {"a": 0.25, "b": 0.0})
    write(tmp_path / "B/hybrid-20-filled", "f1.json", {"b": 0.25, "a": 0.5})

    columns, of_3, of_20 = cells(figures.epochs_table())
    assert columns == ["epochs", "λ", "score lr", "non-zero masked", "non-zero refilled",
                       "F1 dense", "F1 masked", "F1 compacted", "F1 refilled",
                       "F1 − dense (95 %)", "heads", "speed"]
    assert of_3 == ["3", "30", "0.033", "31.0 %", "35.0 %", "72.17", "68.00", "67.99",
                    "[70.00](results/A/hybrid-3-filled/results.json)",
                    "-25.00 (-25.00 to -25.00)", "8", "2.00 x"]
    assert of_20 == ["20", "7.5", "0.01", "20.5 %", "24.0 %", "72.50", "71.24", "71.00",
                     "[74.50](results/B/hybrid-20-filled/results.json)",
                     "+25.00 (+25.00 to +25.00)", "7", "2.76 x"]


def test_the_headline_is_held_against_a_dense_model_that_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(figures, "HEADLINE", ("run", "hybrid-6"))
    write(tmp_path / "run/teacher", "results.json", {"f1": 37.5})
    write(tmp_path / "run/teacher", "f1.json", {"a": 0.5, "b": 0.25})
    write(tmp_path / "run/teacher-longer", "results.json", {"f1": 100})
    write(tmp_path / "run/teacher-longer", "f1.json", {"b": 1, "a": 1})
    write(tmp_path / "run/hybrid-6-filled", "f1.json", {"a": 0.75, "b": 0.5})
    # Over the first, each question gains 0.25. Of the second, a lacks 0.25 and b lacks 0.5.
    _, first, second = cells(figures.longer_table())
    assert first == ["[2 epochs](results/run/teacher/results.json)", "37.50",
                     "+25.00 (+25.00 to +25.00)"]
    assert second == ["[2 + 4 epochs](results/run/teacher-longer/results.json)", "100.00",
                      "-37.50 (-50.00 to -25.00)"]


# ---------------------------------------------------------------------------- tables of the sweep


def points(*rows):
    """Points of a method, of (density, each question's F1)."""
    return [{"density": density, "questions": np.array(f1)} for density, f1 in rows]


def test_methods_are_compared_in_the_middle_of_what_both_span():
    first = points((0.2, [0, 0.5]), (0.6, [1, 0.5]))
    second = points((0.3, [0, 0]), (0.9, [0, 1]))
    middle, difference = figures.equal(first, second, "density")
    assert middle == pytest.approx(0.45)        # both span 0.3 to 0.6
    # There the first has (0.625, 0.5) and the second (0, 0.25).
    assert difference == pytest.approx([62.5, 25])
    # The order of the points does not matter.
    _, reversed_difference = figures.equal(first[::-1], second[::-1], "density")
    assert reversed_difference == pytest.approx(difference)


def test_of_three_points_the_two_around_the_middle_count():
    near = points((0.2, [0, 0.5]), (0.6, [1, 0.5]))
    three = points((0.1, [9, 9]), (0.6, [1, 0.5]), (0.2, [0, 0.5]))
    assert figures.at(three, "density", 0.45) == pytest.approx([0.625, 0.5])
    assert figures.at(near, "density", 0.45) == pytest.approx([0.625, 0.5])


def test_methods_that_do_not_overlap_are_not_compared():
    first = points((0.2, [0, 0.5]), (0.6, [1, 0.5]))
    beyond = points((0.7, [0, 0]), (0.9, [0, 1]))
    single = points((0.3, [0, 0]))
    assert figures.equal(first, beyond, "density") is None
    assert figures.equal(first, single, "density") is None


def write_point(folder, f1):
    write(folder, "f1.json", f1)
    write(folder, "results.json", {})


def test_a_point_has_its_lambda_and_its_f1_in_the_teachers_order(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    write_point(tmp_path / "sweep/teacher", {"a": 1, "b": 0})
    write_point(tmp_path / "sweep/block-16x16-80-compact", {"b": 1, "a": 0.5})
    (point,) = figures.sweep()["Block 16x16"]
    assert point["questions"].tolist() == [0.5, 1]
    assert point["weight"] == 80


def test_points_of_another_sweep_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    write_point(tmp_path / "sweep/teacher", {"a": 1, "b": 0})
    write_point(tmp_path / "sweep/struct-32x32-9-compact", {"a": 1})
    with pytest.raises(ValueError, match="struct-32x32-9-compact was scored on other questions"):
        figures.sweep()


def test_the_interval_of_a_mean_is_that_of_theory():
    low, high = figures.interval(np.full(50, 2.5))
    assert low == pytest.approx(2.5)
    assert high == pytest.approx(2.5)
    # Of 2,000 questions with mean 2 and standard deviation 1.
    low, high = figures.interval(np.tile([3.0, 1.0], 1000))
    standard_error = 1 / 2000 ** 0.5
    assert low == pytest.approx(2 - 1.96 * standard_error, abs=0.004)
    assert high == pytest.approx(2 + 1.96 * standard_error, abs=0.004)


@pytest.mark.parametrize("mean, shown", [
    (1.0, "yes"),
    (-1.0, "no: the opposite"),
    (0.01, "no"),
])
def test_a_difference_is_shown_when_its_interval_is_on_one_side_of_0(mean, shown):
    difference = np.tile([mean - 1, mean + 1], 500)
    assert figures.verdict(difference).endswith(f" | {shown}")


# ----------------------------------------------------------------------------------- the pictures


def test_logs_of_older_runs_are_read_under_todays_names(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    old = {"step": 20, "density": {"attention": 0.5, "all": 0.3, "dense": 0.25}}
    new = {"step": 40, "density": {"attention": 0.4, "all": 0.2, "ffn": 0.125}}
    unmasked = {"step": 60, "density": {}}
    folder = tmp_path / "run/hybrid"
    folder.mkdir(parents=True)
    lines = [json.dumps(line) for line in (old, new, unmasked)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert pictures.read_log("run", "hybrid") == [
        {"step": 20, "density": {"attention": 0.5, "all": 0.3, "ffn": 0.25}},
        new,
        unmasked,
    ]


@pytest.mark.parametrize("low, high, wanted", [
    (-3, 4.2, [-2, 0, 2, 4]),
    (0, 100, [0, 20, 40, 60, 80, 100]),
    (0.93, 1.01, [0.94, 0.96, 0.98, 1.0]),
])
def test_ticks_are_round_numbers(low, high, wanted):
    assert pictures.ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("low, high", [
    (0, 1),
    (0.93, 1.01),
    (-13.1, -0.2),
    (1, 7.4),
    (0, 1536),
])
def test_ticks_lie_on_the_axis_and_are_not_many(low, high):
    found = pictures.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert found[0] >= low - 1e-9
    assert found[-1] <= high + 1e-9


def test_a_chart_draws_every_point_inside_its_axes():
    series = [
        ("a", "red", [(1, -2), (3, 4)], "dots"),
        ("b", "blue", [(2, 0)], "hollow"),
        ("c", "green", [(1, 1), (2, 1)], "line"),
    ]
    drawn = pictures.chart(0, 0, "title", "x", "y", series)
    assert drawn.count("<path fill") == 3           # a curve for each series
    centres = []
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn):
        centres.append((float(x), float(y)))
    assert len(centres) == 3                        # and a dot for each point, but for the line's
    (left, lowest), (right, highest), (middle, between) = centres
    # In pixels the frame is from 45 to 355 and from 25 to 210, and y grows downwards.
    assert 45 < left < middle < right < 355
    assert 25 < highest < between < lowest < 210
    # (2, 0) is half the way from (1, −2) to (3, 4) across, and a third of it upwards.
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert between == pytest.approx(lowest + (highest - lowest) / 3, abs=0.1)
