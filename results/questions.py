"""Writes the questions that a run is trained on as a data folder of its own.

    python results/questions.py DATA OUT NUMBER SEED

So another --seed changes everything random in a training, but not the questions.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_squad as ts            # noqa: E402
from bert import write_json         # noqa: E402


def write_questions(data: Path, out: Path, number: int, seed: int) -> None:
    """What `--questions number --seed seed` takes of DATA, and DATA's dev file."""
    squad = ts.read_squad(data, "train-v1.1.json", number, seed)
    paragraphs = [{"context": context, "qas": []} for context in squad.passages]
    for question in squad.questions:
        answers = [{"text": text, "answer_start": start} for text, start in question.answers]
        paragraphs[question.passage]["qas"].append(
            {"id": question.id, "question": question.text, "answers": answers})
    asked = [paragraph for paragraph in paragraphs if paragraph["qas"]]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "train-v1.1.json", {"version": "1.1", "data": [{"paragraphs": asked}]})
    (out / "dev-v1.1.json").write_bytes(ts.read_bytes(data / "dev-v1.1.json"))


if __name__ == "__main__":
    write_questions(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
