"""Generated messages, where the Banking77 files are not at hand.

Every intent is a problem with a thing ("card", "lost"). Both have several words with endings and sometimes a typing
error; some words belong to two things or two problems, so that no reader gets all messages right; and many messages
mention another thing in passing, so that it matters which one the problem follows. Single words are not enough, and a
net that was cut too far gets worse.
"""

from dataclasses import dataclass

import numpy as np

from banking77 import Messages

__all__ = ["generate_messages"]

THINGS, PROBLEMS = 4, 4
OWN_WORDS = 4
AMBIGUOUS = 0.1
FILLERS = 60
ENDINGS = ("", "", "", "s", "ing")
MENTIONS_ANOTHER = 0.4
TYPING_ERROR = 0.01
CONSONANTS, VOWELS = "bcdfghklmnprstvz", "aeiou"


def generate_messages(*, train: int = 80, test: int = 30, seed: int = 0) -> tuple[Messages, Messages]:
    """Return messages to train on and to test with.

    Args:
        train: Number of messages of every intent to train on.
        test: The same to test with.
        seed: Of the generator.
    """
    language = _Language.invent(np.random.default_rng(seed))
    intents = [(thing, problem) for thing in range(THINGS) for problem in range(PROBLEMS)]
    names = [f"thing {thing}, problem {problem}" for thing, problem in intents]

    def messages(count: int) -> Messages:
        labels = np.repeat(np.arange(len(intents)), count)
        return Messages([language.message(*intents[label]) for label in labels], labels, names)

    return messages(train), messages(test)


@dataclass(frozen=True)
class _Language:
    """Invented words: of every thing and problem, those between one and the next, and those that say nothing."""

    rng: np.random.Generator
    things: list[list[str]]
    problems: list[list[str]]
    fillers: list[str]

    @classmethod
    def invent(cls, rng: np.random.Generator) -> "_Language":
        things, problems = ([_words(rng, OWN_WORDS + 1) for _ in range(count)] for count in (THINGS, PROBLEMS))
        return cls(rng, things, problems, _words(rng, FILLERS))

    def message(self, thing: int, problem: int) -> str:
        text = [*self._some_fillers(), self._word(self.things, thing), self._word(self.problems, problem)]
        text += self._some_fillers()
        if self.rng.random() < MENTIONS_ANOTHER:
            other = [self._word(self.things, int(self.rng.integers(THINGS))), *self._some_fillers()]
            text = [*other, *text] if self.rng.random() < 0.5 else [*text, *other]
        return " ".join(text)

    def _word(self, kinds: list[list[str]], kind: int) -> str:
        """Return a word of this kind: its own, or now and then one shared with the next kind or the one before."""
        *own, shared_with_next = kinds[kind]
        if self.rng.random() < AMBIGUOUS:
            own = [shared_with_next, kinds[kind - 1][-1]]
        return self._typed(str(self.rng.choice(own)) + str(self.rng.choice(ENDINGS)))

    def _typed(self, word: str) -> str:
        """Change each letter with a small probability."""
        wrong = self.rng.random(len(word)) < TYPING_ERROR
        return "".join(
            str(self.rng.choice(list(VOWELS))) if bad else letter for letter, bad in zip(word, wrong, strict=True)
        )

    def _some_fillers(self) -> list[str]:
        return self.rng.choice(self.fillers, self.rng.integers(1, 4)).tolist()


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [
        "".join(rng.choice(list(CONSONANTS)) + rng.choice(list(VOWELS)) for _ in range(rng.integers(2, 4)))
        for _ in range(count)
    ]
