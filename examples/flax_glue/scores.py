"""How well outputs fit labels: the scores of GLUE's tasks.

Each function takes outputs, float (N, classes) or (N, 1), and labels, (N,), and returns its scores
by name; "score" is the one that counts, 1 at best. What is undefined, since all of something are
alike, is 0.
"""

import numpy as np
from scipy.stats import rankdata

Scores = dict[str, float]


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> Scores:
    """The share of texts whose largest output is that of their class."""
    right = float(np.mean(outputs.argmax(axis=1) == labels))
    return {"score": right, "accuracy": right}


def accuracy_and_f1(outputs: np.ndarray, labels: np.ndarray) -> Scores:
    """The same, and the harmonic mean of precision and recall of class 1; what counts is the mean.

    That is what GLUE takes for MRPC and QQP.
    """
    predicted, right = outputs.argmax(axis=1) == 1, accuracy(outputs, labels)["accuracy"]
    hits = np.sum(predicted & (labels == 1))
    all_of_both = np.sum(predicted) + np.sum(labels == 1)
    f1 = float(2 * hits / all_of_both) if all_of_both else 0.0
    return {"score": (right + f1) / 2, "accuracy": right, "f1": f1}


def matthews(outputs: np.ndarray, labels: np.ndarray) -> Scores:
    """The correlation of two classes, predicted and true."""
    found = pearson(outputs.argmax(axis=1), labels)
    return {"score": found, "matthews": found}


def correlations(outputs: np.ndarray, labels: np.ndarray) -> Scores:
    """Pearson's and Spearman's correlation of numbers; what counts is the mean."""
    numbers = outputs[:, 0]
    of_values, of_ranks = pearson(numbers, labels), pearson(rankdata(numbers), rankdata(labels))
    return {"score": (of_values + of_ranks) / 2, "pearson": of_values, "spearman": of_ranks}


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of two arrays."""
    x, y = (values - np.mean(values, dtype=np.float64) for values in (x, y))
    size = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / size) if size else 0.0
