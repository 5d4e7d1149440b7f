"""Keeps the masks of a fine-pruning while it runs.

    python results/moments.py RUN       beside the training, from the top of the tree

Each time RUN/checkpoint.pt is replaced, RUN-moments/STEP.json gets its step, τ, density, heads and
masks. It ends when the run has ended.
"""
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import blockprune                                                   # noqa: E402
import compact                                                      # noqa: E402
import train_squad as ts                                            # noqa: E402
from bert import load_model, replacing                              # noqa: E402


def moment(run: Path) -> dict:
    """What is kept of the checkpoint of a run."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    settings = json.loads((run / "run.json").read_text(encoding="utf-8"))["settings"]
    # The model as the run made it, and then as it is now.
    model = load_model(settings["init"], fresh_head=True)
    ts.add_masks(model, settings["method"], settings["block"])
    model.load_state_dict(state["model"])
    mask = next(blockprune.masks(model))
    small = compact.compact(model).config
    return {"step": state["step"], "threshold": mask.threshold.item(),
            "density": blockprune.density(model), "heads": small.heads, "ffn": small.ffn,
            "masks": compact.mask_rows(model)}


def watch(run: Path, pause: float = 5) -> None:
    kept = run.parent / f"{run.name}-moments"
    kept.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.pt"
    last = None
    ended = False
    while not ended:
        time.sleep(pause)
        # Looked at before the checkpoint, so that the last one is not missed.
        ended = (run / "results.json").exists()
        if not checkpoint.exists() or checkpoint.stat().st_mtime_ns == last:
            continue
        last = checkpoint.stat().st_mtime_ns
        found = moment(run)
        # Written whole, or not at all: a stop may come at any time.
        with replacing(kept / f"{found['step']}.json") as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")


def six(moments: list[dict], log: list[dict]) -> list[dict]:
    """The moments nearest to the start, the quarters of the rise of τ, its end, and the run's end.

    log: the lines of log.jsonl, which say when τ rose.
    """
    final = log[-1]["threshold"]
    rising = [line["step"] for line in log if 0 < line["threshold"] < final]
    wanted = [0]
    for quarter in (1, 2, 3, 4):
        wanted.append(rising[0] + (rising[-1] - rising[0]) * quarter / 4)
    wanted.append(log[-1]["step"])

    nearest = []
    for step in wanted:
        distances = [abs(candidate["step"] - step) for candidate in moments]
        nearest.append(moments[distances.index(min(distances))])
    return nearest


if __name__ == "__main__":
    torch.set_num_threads(1)        # the training needs the others
    watch(Path(sys.argv[1]))
