"""Writes the built-in corpus: made-up questions, for where SQuAD cannot be had.

    python tests/builtin.py FOLDER      writes train-v1.1.json and dev-v1.1.json there

It is not SQuAD, and far easier. The "version" in both files is "builtin". The standard library is
enough, and the same bytes are written every time.
"""
import json
import random
import sys
from pathlib import Path

FIRST_NAMES = ("Anna Ben Carl Dora Emma Frank Grace Henry Ida Jack "
               "Karen Leo Mary Nora Oscar Paul Rose Sam Tina Victor")
LAST_NAMES = ("Adams Baker Carter Davis Evans Fisher Grant Hill Jones King "
              "Lewis Moore Parker Reed Scott Stone Turner Wood")
FACTS = {   # a fact → the question for it, its values
    "works as a {}": ("What does {} work as?",
                      "teacher nurse farmer painter lawyer singer driver dentist writer"),
    "was born in {}": ("Where was {} born?",
                       "London Paris Rome Berlin Vienna Madrid Dublin Boston Cairo Tokyo"),
    "owns a {}": ("Which animal does {} own?",
                  "cat dog horse goat rabbit parrot snake duck pig turtle"),
    "plays the {}": ("Which instrument does {} play?",
                     "piano violin guitar flute drums harp cello trumpet organ"),
}


def builtin_corpus(passages: int, seed: int, relations: int = 2) -> dict:
    """Passages about two people: a question needs both the name and the relation to be answered.

    relations: how many kinds of fact a passage tells of both people, 2 to 4. The more, the longer
    it takes to learn.
    """
    rng = random.Random(seed)
    paragraphs = []
    for p in range(passages):
        # Two people who share no name.
        first_names = rng.sample(FIRST_NAMES.split(), 2)
        last_names = rng.sample(LAST_NAMES.split(), 2)
        people = [f"{first} {last}" for first, last in zip(first_names, last_names)]

        # The same facts about both of them, with different values.
        told = []
        for fact in rng.sample(list(FACTS), relations):
            values = rng.sample(FACTS[fact][1].split(), 2)      # one per person
            told.append((fact, values))

        # One sentence per person and fact, and one question about it.
        context = ""
        qas = []
        for i, person in enumerate(people):
            for fact, values in rng.sample(told, relations):
                start = len(f"{context}{person} ") + fact.index("{")
                qas.append({"id": f"builtin-{seed}-{p}-{len(qas)}",
                            "question": FACTS[fact][0].format(person),
                            "answers": [{"text": values[i], "answer_start": start}]})
                context += f"{person} {fact.format(values[i])}. "

        # A random half of the questions is kept, so that the place of a sentence tells nothing.
        paragraphs.append({"context": context.strip(), "qas": rng.sample(qas, relations)})
    return {"version": "builtin", "data": [{"title": "Townspeople", "paragraphs": paragraphs}]}


def main() -> None:
    """Write 2,100 questions to train on and 450 to be scored on."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/builtin.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, passages, seed in (("train", 1050, 1), ("dev", 225, 2)):
        text = json.dumps(builtin_corpus(passages, seed), indent=1) + "\n"
        path = folder / f"{name}-v1.1.json"
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
