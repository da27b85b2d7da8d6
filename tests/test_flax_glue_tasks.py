"""The files of tasks, and scores against other ways to compute them."""

import bz2
import csv

import numpy as np
import pytest
import scipy.stats
from flax_glue_runs import DATA

from examples.flax_glue import packaged, scores
from examples.flax_glue.readers import open_task
from examples.flax_glue.tasks import TASKS
from examples.flax_llama.usage import UsageError

pytestmark = pytest.mark.plain

GLUE = DATA / "glue"
# The first text or texts to train on, and the labels of all.
READ = {
    "cola": ("CoLA", ("The cat sleeps on the mat.",), [1, 0, 1]),
    "sst2": ("SST-2", ("a warm and funny film ",), [1, 0, 1]),
    "mrpc": ("MRPC", ("Rain fell on Monday.", "On Monday it rained."), [1, 0]),
    "stsb": ("STS-B", ("A dog runs.", "A dog is running."), [5.0, 0.25]),
    "qqp": ("QQP", ("How do I cook rice?", "What is the way to cook rice?"), [1, 0]),
    "mnli": ("MNLI", ("A boy eats an apple.", "A boy eats."), [0, 1, 2]),
    "qnli": ("QNLI", ("When was the bridge built?", "The bridge was built in 1901."), [0, 1]),
    "rte": ("RTE", ("The cup broke when it fell.", "The cup fell."), [0, 1]),
    "wnli": ("WNLI", ("The cup broke when it fell.", "The cup fell."), [1, 0]),
}


@pytest.mark.parametrize("task", READ)
def test_each_format_of_glue(task):
    directory, text, labels = READ[task]
    data = open_task(task, GLUE / directory, None)
    assert data.train.texts[0] == text
    np.testing.assert_array_equal(data.train.labels, labels)
    assert data.train.labels.dtype == (np.float32 if task == "stsb" else np.int32)
    assert data.outputs == {"stsb": 1, "mnli": 3}.get(task, 2)
    assert all(len(examples) for examples in data.dev.values())
    assert data.test is None
    if task != "mnli":
        said = f"{GLUE / directory / 'test.tsv'} has no labels: nothing is reported of it"
        assert said in data.notes


def test_both_files_to_choose_by_of_mnli():
    dev = open_task("mnli", GLUE / "MNLI", None).dev
    assert {prefix: list(examples.labels) for prefix, examples in dev.items()} == {
        "": [2],
        "mismatched_": [0, 1],
    }


def test_quotes_stand_for_themselves():
    assert open_task("cola", GLUE / "CoLA", None).train.texts[2] == ('She said "no" twice.',)
    assert open_task("mrpc", GLUE / "MRPC", None).dev[""].texts[0][0] == 'He said "yes.'


def test_rows_of_qqp_that_lack_columns_are_left_out_and_counted():
    data = open_task("qqp", GLUE / "QQP", None)
    assert len(data.train) == 2
    assert f"{GLUE / 'QQP' / 'train.tsv'}: left out 1 line that lacks columns" in data.notes


@pytest.mark.parametrize(("task", "named"), [("sst2", "SST-2"), ("cola", "CoLA")])
def test_a_test_of_glue_is_refused_where_it_is_named(task, named):
    with pytest.raises(UsageError, match=r"test.tsv has no labels.*cannot be trained or scored on"):
        open_task(task, GLUE / named, GLUE / named / "test.tsv")


def test_a_test_with_labels_is_reported_on():
    data = open_task("mrpc", GLUE / "MRPC", GLUE / "MRPC" / "train.tsv")
    assert list(data.test.labels) == [1, 0]


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.txt").write_bytes(text.encode())
    return directory


def test_lines_of_a_label_a_tab_or_a_space_and_a_text(tmp_path):
    lines = {"train": "1 a b\n0\tc  d\n\n1 e\u2028f\n", "dev": "0 g\n", "test": "1\th\r\n"}
    data = open_task("sst2", write(tmp_path, **lines), None)
    assert data.train.texts == [("a b",), ("c  d",), ("e\u2028f",)]
    assert [list(x.labels) for x in (data.train, data.dev[""], data.test)] == [[1, 0, 1], [0], [1]]


def test_any_labels_of_a_text_count_from_0_in_their_order(tmp_path):
    lines = {"train": "10 a\n9 b\n11 c\n", "dev": "11 d\n"}
    data = open_task("text", write(tmp_path, **lines), None)
    assert data.labels == ("9", "10", "11")
    assert list(data.train.labels) == [1, 0, 2]
    assert list(data.dev[""].labels) == [2]
    assert data.outputs == 3


@pytest.mark.parametrize(
    ("task", "files", "said"),
    [
        ("sst2", {"train": "2 a\n", "dev": "1 b\n"}, "train.txt, line 1: label '2'; expected one"),
        ("sst2", {"train": "1 a\n", "dev": "0 b\nno c\n"}, "dev.txt, line 2: label 'no'"),
        ("text", {"train": "x a\nz b\n", "dev": "y b\n"}, "label 'y'; expected one of x, z."),
        ("text", {"train": "x a\nx b\n", "dev": "x c\n"}, "each label is 'x'; expected two or"),
        ("sst2", {"train": "1\n", "dev": "1 b\n"}, "train.txt, line 1: '1'; expected a label, a"),
        ("sst2", {"train": "", "dev": "1 b\n"}, "train.txt is empty."),
        ("sst2", {"train": "\n", "dev": "1 b\n"}, "train.txt has no examples."),
        ("sst2", {"train": "1 a\n"}, "has no dev.tsv or dev.txt: expected one."),
        ("mrpc", {"train": "1 a\n"}, "has no train.tsv: expected one."),
        ("sst3", {}, "task='sst3': expected one of cola, mnli,"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, task, files, said):
    with pytest.raises(UsageError) as error:
        open_task(task, write(tmp_path, **files), None)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("STS-B", "\t".join(["x"] * 9 + ["5.5"]), "label '5.5'; expected a number from 0 to 5."),
        ("STS-B", "\t".join(["x"] * 9 + ["nan"]), "label 'nan'; expected a number from 0 to 5."),
        ("STS-B", "a\tb", "2 columns, expected 10 or more"),
        ("RTE", "0\ta\tb\tmaybe", "label 'maybe'; expected one of entailment, not_entailment."),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path, name, line, said):
    header = (GLUE / name / "train.tsv").read_text().splitlines()[0]
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text(f"{header}\n{line}\n")
    with pytest.raises(UsageError) as error:
        open_task({"STS-B": "stsb", "RTE": "rte"}[name], tmp_path, None)
    assert f"train.tsv, line 2: {said}" in str(error.value)


def test_a_file_of_another_task_is_known_by_its_header():
    with pytest.raises(UsageError, match="expected columns question, sentence, label"):
        open_task("qnli", GLUE / "RTE", None)


def test_bytes_that_are_no_text_are_named(tmp_path):
    write(tmp_path, dev="1 b\n")
    (tmp_path / "train.txt").write_bytes(b"1 a\n0 \xff\n")
    with pytest.raises(UsageError, match=r"train.txt, line 2: not UTF-8"):
        open_task("sst2", tmp_path, None)


def test_ratings_are_divided_the_same_in_any_order(tmp_path):
    path = tmp_path / "ratings.txt"
    rows = [f"{i}\t{(i % 17) / 2 - 4}\tsentence {i}\r\n" for i in range(400)]
    found = []
    for order in (rows, rows[::-1]):
        path.write_text("".join(order), newline="")
        data = open_task("vader", path, None)
        found.append(
            {
                part: dict(zip(examples.texts, examples.labels.tolist(), strict=True))
                for part, examples in (
                    ("train", data.train),
                    ("", data.dev[""]),
                    ("test", data.test),
                )
            }
        )
    assert found[0] == found[1]
    sizes = [len(part) for part in found[0].values()]
    assert sum(sizes) == 400
    assert sizes[0] > 280
    assert min(sizes) > 20
    assert found[0]["train"][("sentence 3",)] == -2.5


def test_reviews_of_a_film_stay_together_and_plots_are_left_out(tmp_path):
    path = tmp_path / "corpus.csv.bz2"
    with bz2.open(path, "wt", newline="") as file:
        rows = csv.DictWriter(file, ["category", "text", "movie_name", "has_plot_and_reviews"])
        rows.writeheader()
        for film in range(60):
            for i, category in enumerate(("fresh", "rotten", "plot", "fresh")):
                text = f'film {film}, "{i}"\nmore'
                rows.writerow({"category": category, "text": text, "movie_name": f"f{film}"})
    data = open_task("rotten_tomatoes", path, None)
    assert data.labels == ("rotten", "fresh")
    films = []
    for examples in (data.train, data.dev[""], data.test):
        films.append({texts[0].split(",")[0] for texts in examples.texts})
        assert len(examples) == 3 * len(films[-1])
        assert examples.labels.mean() == pytest.approx(2 / 3)
    assert len(set.union(*films)) == sum(map(len, films)) == 60


def test_of_two_formats_neither_is_chosen(tmp_path):
    (write(tmp_path, train="1 a\n") / "train.tsv").touch()
    with pytest.raises(UsageError, match=r"has both train\.tsv and train\.txt: expected one"):
        open_task("sst2", tmp_path, None)


def test_a_row_that_is_cut_is_named(tmp_path):
    path = tmp_path / "corpus.csv.bz2"
    path.write_bytes(bz2.compress(b"category,text,movie_name\nfresh,good,film\nfresh,good\n"))
    with pytest.raises(UsageError, match="row 2: it has fewer columns than the header"):
        open_task("rotten_tomatoes", path, None)


@pytest.mark.parametrize("task", packaged.READERS)
def test_another_file_than_the_packages_is_refused(tmp_path, task):
    path = tmp_path / "other"
    path.write_text("a\tb\n")
    with pytest.raises(UsageError, match=r"line 1: 2 columns|is cut or damaged|cannot be read"):
        open_task(task, path, None)
    with pytest.raises(UsageError, match="is no file: expected"):
        open_task(task, tmp_path, None)


RNG = np.random.default_rng(0)
OUTPUTS, LABELS = RNG.normal(size=(300, 2)).astype(np.float32), RNG.integers(2, size=300)


def test_scores_of_classes_are_those_of_their_formulas():
    predicted = OUTPUTS[:, 1] > OUTPUTS[:, 0]
    tp, fp = np.sum(predicted & (LABELS == 1)), np.sum(predicted & (LABELS == 0))
    fn, tn = np.sum(~predicted & (LABELS == 1)), np.sum(~predicted & (LABELS == 0))
    right = (tp + tn) / 300
    assert scores.accuracy(OUTPUTS, LABELS) == {"score": right, "accuracy": right}
    found = scores.accuracy_and_f1(OUTPUTS, LABELS)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert found["f1"] == pytest.approx(2 / (1 / precision + 1 / recall))
    assert found["score"] == pytest.approx((found["f1"] + right) / 2)
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    expected = (tp * tn - fp * fn) / root
    assert scores.matthews(OUTPUTS, LABELS)["matthews"] == pytest.approx(expected)


def test_correlations_are_those_of_scipy():
    # With ties.
    numbers = np.round(LABELS + OUTPUTS[:, :1], 1)
    labels = np.round(OUTPUTS[:, 1] + LABELS).astype(np.float32)
    found = scores.correlations(numbers, labels)
    of_values = scipy.stats.pearsonr(numbers[:, 0], labels).statistic
    of_ranks = scipy.stats.spearmanr(numbers[:, 0], labels).statistic
    assert found["pearson"] == pytest.approx(of_values, abs=1e-6)
    assert found["spearman"] == pytest.approx(of_ranks, abs=1e-6)
    assert found["score"] == pytest.approx((of_values + of_ranks) / 2, abs=1e-6)


@pytest.mark.parametrize("score", [scores.matthews, scores.correlations, scores.accuracy_and_f1])
def test_what_is_undefined_is_0(score):
    found = score(np.zeros((5, 2), np.float32), np.zeros(5, np.int32))
    assert found.keys() - {"score", "accuracy"}
    assert all(found[name] == 0 for name in found.keys() - {"score", "accuracy"})


def test_every_task_has_the_scores_that_glue_has():
    named = {name: task.scores.__name__ for name, task in TASKS.items()}
    assert {name for name, score in named.items() if score == "accuracy_and_f1"} == {"mrpc", "qqp"}
    assert {name for name, score in named.items() if score == "correlations"} == {"stsb", "vader"}
    assert [name for name, score in named.items() if score == "matthews"] == ["cola"]
