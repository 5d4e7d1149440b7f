"""Writes the built-in corpus: made-up questions, for where SQuAD cannot be had.

    python tests/builtin.py FOLDER      writes train-v1.1.json and dev-v1.1.json there

It is not SQuAD, and far easier. The "version" in both files is "builtin". The standard library is
enough, and the same bytes are written every time.
"""
import json
import random
import sys
from pathlib import Path

# The pronoun of a person → first names.
FIRST_NAMES = {"She": "Anna Dora Emma Grace Ida Karen Mary Nora Rose Tina",
               "He": "Ben Carl Frank Henry Jack Leo Oscar Paul Sam Victor"}
LAST_NAMES = ("Adams Baker Carter Davis Evans Fisher Grant Hill Jones King "
              "Lewis Moore Parker Reed Scott Stone Turner Wood")
ANIMALS = "cat dog horse goat rabbit parrot snake duck pig turtle"
CITIES = "London Paris Rome Berlin Vienna Madrid Dublin Boston Cairo Tokyo"
INSTRUMENTS = "piano violin guitar flute drum harp cello trumpet banjo"
JOBS = "teacher nurse farmer painter lawyer singer driver dentist writer"
FACTS = {   # a fact → the question for it, its values
    "owns a {}": ("Which animal does {} own?", ANIMALS),
    "fears the {}": ("Which animal does {} fear?", ANIMALS),
    "was born in {}": ("In which city was {} born?", CITIES),
    "lives in {}": ("In which city does {} live?", CITIES),
    "plays the {}": ("Which instrument does {} play?", INSTRUMENTS),
    "sold a {}": ("Which instrument did {} sell?", INSTRUMENTS),
    "works as a {}": ("What does {} work as?", JOBS),
    "is married to a {}": ("What does the partner of {} work as?", JOBS),
}


def builtin_corpus(passages: int, seed: int, relations: int = 2) -> dict:
    """Passages about two people: a question needs both the person and the relation to be answered.

    relations: how many kinds of fact a passage tells of both people, 2 to 8. The more, the longer
    it takes to learn.
    """
    rng = random.Random(seed)
    paragraphs = []
    for p in range(passages):
        # Two people, and the same facts about each, with different values.
        told = rng.sample(list(FACTS), relations)
        last_names = rng.sample(LAST_NAMES.split(), 2)
        used = set()
        context = ""
        qas = []
        for last_name in last_names:
            pronoun = rng.choice(list(FIRST_NAMES))
            person = f"{rng.choice(FIRST_NAMES[pronoun].split())} {last_name}"
            subject = person        # in the first sentence; then the pronoun
            for fact in rng.sample(told, relations):
                question, values = FACTS[fact]
                value = rng.choice([value for value in values.split() if value not in used])
                used.add(value)
                start = len(f"{context}{subject} ") + fact.index("{")
                qas.append({"id": f"builtin-{seed}-{p}-{len(qas)}",
                            "question": question.format(person),
                            "answers": [{"text": value, "answer_start": start}]})
                context += f"{subject} {fact.format(value)}. "
                subject = pronoun

        # A random half of the questions is kept, so that the place of a sentence tells nothing.
        paragraphs.append({"context": context.strip(), "qas": rng.sample(qas, relations)})
    return {"version": "builtin", "data": [{"title": "Townspeople", "paragraphs": paragraphs}]}


def main() -> None:
    """Write 2,800 questions to train on and 450 to be scored on."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/builtin.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, passages, seed in (("train", 1400, 1), ("dev", 225, 2)):
        text = json.dumps(builtin_corpus(passages, seed), indent=1) + "\n"
        path = folder / f"{name}-v1.1.json"
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
