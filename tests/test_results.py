"""The arithmetic of results/: the benchmark on a clock that is ours (no timing), equal density, intervals, axes."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "results"))
import bench                                                                                        # noqa: E402
import figures                                                                                      # noqa: E402
import sweep                                                                                        # noqa: E402
from bert import BertConfig                                                                         # noqa: E402


def test_works_take_turns_after_one_call_that_does_not_count(monkeypatch):
    now, calls = [50.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(name, durations):
        def call(turn):
            calls.append((name, turn))
            now[0] += durations.pop(0)
        return call
    times = bench.take_turns([work("a", [99, 1, 2, 6]), work("b", [88, 4, 3, 5])], turns=3)
    assert times == [pytest.approx([1, 2, 6]), pytest.approx([4, 3, 5])]
    assert calls == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert bench.spread([1, 2, 6]) == 2.5       # (6 − 1) / 2


@pytest.mark.parametrize("ratio, wanted, at_most, met", [
    (3.5, 3.5, False, True), (3.49, 3.5, False, False), (1.08, 1.08, True, True), (1.09, 1.08, True, False),
    (None, 8, False, None), (3.0, None, False, None)])
def test_a_goal_is_met_from_its_bound_on(ratio, wanted, at_most, met, capsys):
    assert bench.row("1", "what", 2.0, 7.0, "s", ratio, wanted, at_most=at_most)["met"] is met
    assert ("MISSED" in capsys.readouterr().out) == (met is False)


def test_a_forward_row_is_a_ratio_of_medians_or_its_share_of_the_flops(monkeypatch):
    """One layer, E 8, D 1, T 4, no FFN: 2 (4 T E H + 2 T² H + 2 T E) operations, 2,688 for 8 heads and 1,408 for 4."""
    full = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=8, heads=[8], ffn=[0])
    half = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=8, heads=[4], ffn=[0])
    assert [bench.flops(c, 4) for c in (full, half)] == [2688, 1408]
    monkeypatch.setattr(bench, "benchmark", lambda *_: [[30, 28, 90], [20, 21, 10]])
    whole = bench.forward("6", "x", full, half, 2, 4, "fp32", 1.4, 3)
    share = bench.forward("5", "x", full, half, 2, 4, "fp32", 0.85, 3, of_flops=True)
    assert (whole["baseline"], whole["ours"], whole["ratio"], whole["spread"]) == (30, 20, 1.5, 0.55) and whole["met"]
    assert share["ratio"] == pytest.approx(1.5 / (2688 / 1408)) and not share["met"]


def test_the_headline_is_the_papers_model_and_the_table_says_what_was_not_measured(tmp_path):
    linear = sum(4 * 768 * 64 * heads + 2 * 768 * width for heads, width in zip(bench.HEADLINE.heads, bench.HEADLINE.ffn))
    assert linear == 22_248_960
    rows = [bench.row("7", "all", None, 6.8, "s", 6.8, 60, at_most=True), bench.not_here("1", "training", bench.NO_BF16),
            bench.row("2", "fp32", 5.0, 15.0, "examples/s", 3.0, 3.5, 0.1)]
    bench.ts.write_json(tmp_path / "bench-x.json", dict(rows=rows, command="c", device="d", threads=2, torch="t", data="squad"))
    lines = figures.speed(tmp_path / "bench-x.json").splitlines()
    assert lines[2:4] == ["| 7. all | – | 6.8 s | 6.8 | ≤ 60 |", "| 2. fp32 | 5 examples/s | 15 examples/s | 3 ± 5 % | ≥ 3.5 (missed) |"]
    assert lines[5] == "1. training: not measured, this processor has no bf16 units"


# ------------------------------------------------------------------------------------- the sweep's


def test_the_sweep_runs_each_point_from_one_teacher_and_keeps_its_small_files(tmp_path, monkeypatch):
    """The commands are only written down; each --out gets files as the real one would."""
    calls = []

    def run(script, arguments):
        calls.append((script, *map(str, arguments)))
        if "--out" in calls[-1]:
            out = Path(calls[-1][calls[-1].index("--out") + 1])
            out.mkdir(parents=True)
            for name in ("results.json", "f1.json", "run.json", "model.safetensors"):
                (out / name).write_text(out.name)
            if script == "train_squad.py":
                (out / "log.jsonl").write_text(out.name)
            else:
                (out / "masks.json").write_text("x" * (2_000_000 if "1x1" in out.name else 10))
    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "hybrid-32x32-80", "unstructured-1x1-160", "--data", "D", "--runs", f"{tmp_path}/R"])
    sweep.main()
    trained = [ts_parse(call) for call in calls if call[0] == "train_squad.py"]
    R = f"{tmp_path}/R"
    assert [(t["out"], t["init"], t["teacher"], t["method"], t["block"], t["final_lambda"], t["fill"], t["questions"]) for t in trained] == [
        (f"{R}/teacher", "weights/minilm", "", "dense", "32x32", None, False, 8000),
        (f"{R}/hybrid-32x32-80", f"{R}/teacher", f"{R}/teacher", "hybrid", "32x32", 80, False, 4000),
        (f"{R}/hybrid-32x32-80-filled", f"{R}/hybrid-32x32-80-compact", f"{R}/teacher", "dense", "32x32", None, True, 4000),
        (f"{R}/unstructured-1x1-160", f"{R}/teacher", f"{R}/teacher", "unstructured", "1x1", 160, False, 4000)]
    assert all((t["data"], t["dev_questions"], t["max_length"]) == ("D", 2000, 256) for t in trained)
    kept = {path.relative_to(tmp_path / "results/sweep").as_posix(): path.read_text() for path in tmp_path.glob("results/sweep/*/*")}
    of_run = {f"{name}/{file}": run for name, run in (("teacher", "teacher"), ("hybrid-32x32-80-compact", "hybrid-32x32-80"), (
        "hybrid-32x32-80-filled", "hybrid-32x32-80-filled"), ("unstructured-1x1-160-compact", "unstructured-1x1-160"))
        for file in ("run.json", "log.jsonl")}
    of_model = {f"{name.split('/')[0]}/{file}": name.split("/")[0] for name in of_run for file in ("results.json", "f1.json")}
    assert kept == of_run | of_model | {"hybrid-32x32-80-compact/masks.json": "x" * 10}     # single weights' masks are too large


def ts_parse(call):
    return bench.ts.parse(call[1:])



def points(*rows):
    """Of (density, each question's F1)."""
    return [dict(density=d, questions=np.array(f1)) for d, f1 in rows]


def test_methods_are_compared_in_the_middle_of_what_both_span():
    a, b = points((0.2, [0, 0.5]), (0.6, [1, 0.5])), points((0.3, [0, 0]), (0.9, [0, 1]))
    middle, difference = figures.equal(a, b, "density")        # both span 0.3 to 0.6
    assert middle == pytest.approx(0.45) and difference == pytest.approx([100 * 0.625, 100 * (0.5 - 0.25)])
    assert figures.equal(a[::-1], b[::-1], "density")[1] == pytest.approx(difference)
    three = points((0.1, [9, 9]), (0.6, [1, 0.5]), (0.2, [0, 0.5]))      # the two around the middle count
    assert figures.at(three, "density", 0.45) == pytest.approx(figures.at(a, "density", 0.45))
    assert figures.equal(a, points((0.7, [0, 0]), (0.9, [0, 1])), "density") is None and figures.equal(a, b[:1], "density") is None


def test_points_of_another_sweep_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)
    for name, f1 in (("teacher", {"a": 1, "b": 0}), ("block-16x16-80-compact", {"b": 1, "a": 0.5}), ("struct-32x32-9-compact", {"a": 1})):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        bench.ts.write_json(tmp_path / "sweep" / name / "f1.json", f1)
        (tmp_path / "sweep" / name / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="struct-32x32-9-compact was scored on other questions"):
        figures.sweep()
    (tmp_path / "sweep/struct-32x32-9-compact/results.json").unlink()
    point, = figures.sweep()["Block 16x16"]
    assert point["questions"].tolist() == [0.5, 1] and point["weight"] == 80


def test_intervals_of_the_mean_by_theory():
    assert figures.interval(np.full(50, 2.5)) == pytest.approx((2.5, 2.5))
    low, high = figures.interval(np.tile([3.0, 1.0], 1000))    # standard error 1/√2000
    assert (low, high) == pytest.approx((2 - 1.96 / 2000 ** 0.5, 2 + 1.96 / 2000 ** 0.5), abs=0.004)
    cases = {"yes": 1.0, "no: the opposite": -1.0, "no": 0.01}
    assert all(figures.verdict(np.tile([shift - 1, shift + 1], 500)).endswith(f"| {word}") for word, shift in cases.items())


def test_axes_have_round_ticks():
    assert figures.ticks(-3, 4.2) == [-2, 0, 2, 4] and figures.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    for low, high in [(0, 1), (0.93, 1.01), (-13.1, -0.2), (1, 7.4), (0, 1536)]:
        found = figures.ticks(low, high)
        assert 3 <= len(found) <= 8 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9


def test_a_chart_draws_every_point_inside_its_axes():
    series = [("a", "red", [(1, -2), (3, 4)], "dots"), ("b", "blue", [(2, 0)], "hollow"), ("c", "green", [(1, 1), (2, 1)], "line")]
    text = figures.chart(0, 0, "title", "x", "y", series)
    centres = [tuple(map(float, pair)) for pair in figures.re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert len(centres) == 3 and text.count("<path fill") == 3
    (ax, ay), (bx, by), (cx, cy) = centres
    assert 45 < ax < cx < bx < 355 and 25 < by < cy < ay < 210      # up is smaller
    assert (cx, cy) == pytest.approx(((ax + bx) / 2, ay + (by - ay) / 3), abs=0.1)
