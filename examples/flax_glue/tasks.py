"""The tasks: what their files have in which columns, and how they are scored. One table."""

import dataclasses
from collections.abc import Callable

from examples.flax_glue import scores
from examples.flax_glue.scores import Scores

NUMBERS = ("0", "1")
ENTAILED = ("entailment", "not_entailment")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      texts: the columns of its one or two texts, by the header; of CoLA, which has none, by number.
      label: the column of the label.
      labels: those that there are, in the order of their numbers; empty where they are as in the
        file to train on, or where the label is a number.
      span: the least and the largest label that is a number; None for classes.
      scores: of outputs and labels.
      dev: what precedes the scores of each file to choose by, or beside it, and the file's name.
      skips_short_rows: whether lines that lack a column are left out, as are those of QQP.
    """

    texts: tuple[str | int, ...] = ()
    label: str | int = "label"
    labels: tuple[str, ...] = NUMBERS
    span: tuple[float, float] | None = None
    scores: Callable[..., Scores] = scores.accuracy
    dev: tuple[tuple[str, str], ...] = (("", "dev"),)
    skips_short_rows: bool = False

    @property
    def is_regression(self) -> bool:
        return self.span is not None


PAIR = ("sentence1", "sentence2")
TASKS = {
    # Without a header: where it is from, the label, the author's mark, the sentence.
    "cola": Task((3,), 1, scores=scores.matthews),
    "mnli": Task(
        PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        dev=(("", "dev_matched"), ("mismatched_", "dev_mismatched")),
    ),
    "mrpc": Task(("#1 String", "#2 String"), "Quality", scores=scores.accuracy_and_f1),
    "qnli": Task(("question", "sentence"), labels=ENTAILED),
    "qqp": Task(
        ("question1", "question2"),
        "is_duplicate",
        scores=scores.accuracy_and_f1,
        skips_short_rows=True,
    ),
    "rte": Task(PAIR, labels=ENTAILED),
    "sst2": Task(("sentence",)),
    "stsb": Task(PAIR, "score", (), span=(0, 5), scores=scores.correlations),
    "wnli": Task(PAIR),
    # Lines of a label and a text, whatever labels there are.
    "text": Task(labels=()),
    # Of packages; see packaged.py.
    "vader": Task(labels=(), span=(-4, 4), scores=scores.correlations),
    "rotten_tomatoes": Task(labels=("rotten", "fresh")),
}
