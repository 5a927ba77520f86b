"""Text for the audit's tests: sentences of a made-up field with Zipf words and phrases that all documents share."""

from __future__ import annotations

import random

PHRASES = (
    "this condition is inherited in an autosomal recessive pattern which means both copies of the gene have mutations",
    "talk to your doctor or health care provider before you start or stop taking any of these medicines",
    "the exact cause is not known but both genetic and environmental factors are thought to play a role",
    "the patient was treated with broad spectrum antibiotics and intravenous fluids and was discharged on day",
    "symptoms may include fever fatigue weight loss night sweats and pain in the muscles or joints",
)
CHINESE = (
    "本病的确切病因尚不清楚，可能与遗传和环境因素有关。",
    "患者应在医生指导下用药，不得自行停药或更改剂量。",
)


class Writer:
    """Writes documents, the same for the same seed: Zipf words in sentences, now and then a shared phrase."""

    def __init__(self, seed: int, vocabulary: int = 3000) -> None:
        self.rng = random.Random(seed)
        letters = random.Random("words")
        self.words = [
            "".join(letters.choices("etaoinsrhldcumfpgwyb", k=letters.randint(2, 10)))
            for _ in range(vocabulary)
        ]
        self.weights = [1 / rank for rank in range(2, vocabulary + 2)]
        self.characters = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]

    def english(self, least: int, most: int) -> str:
        """least to most words in sentences, a fifth of them followed by a phrase that other documents hold too."""
        length, out = self.rng.randint(least, most), list[str]()
        while len(out) < length:
            out += self.rng.choices(self.words, self.weights, k=self.rng.randint(6, 18))
            if self.rng.random() < 0.2:
                out[-1] += "."
                out += self.rng.choice(PHRASES).split()
            out[-1] += "."
        return " ".join(out[:length])

    def chinese(self, least: int, most: int) -> str:
        length, out = self.rng.randint(least, most), ""
        while len(out) < length:
            chosen = self.rng.choices(self.characters, self.weights[:1500], k=self.rng.randint(8, 20))
            out += "".join(chosen) + self.rng.choice("，。")
            if self.rng.random() < 0.1:
                out += self.rng.choice(CHINESE)
        return out[:length]

    def disguised(self, text: str) -> str:
        """The same words: other case, spacing, punctuation and Unicode form."""
        changed = text.upper() if self.rng.random() < 0.5 else text.title()
        changed = changed.replace(" ", self.rng.choice(["  ", " \n", "\t", " - "]))
        changed = changed.replace(".", self.rng.choice(["", " ;", "!"]))
        return "".join(chr(ord(c) + 0xFEE0) if "A" <= c <= "F" else c for c in changed)

    def edited(self, units: list[str], kind: str, share: float = 0.05) -> list[str]:
        """`share` of the words (or characters) substituted, deleted or inserted, at random places."""
        out = list(units)
        pool = self.characters if len(units[0]) == 1 and ord(units[0][0]) > 0x2E80 else self.words
        for place in sorted(self.rng.sample(range(len(out)), max(1, round(share * len(out)))), reverse=True):
            if kind == "substituted":
                out[place] = self.rng.choice(pool)
            elif kind == "deleted":
                del out[place]
            else:
                out.insert(place, self.rng.choice(pool))
        return out
