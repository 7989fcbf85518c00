"""Trains a spam or quality classifier from the user's positives and negatives, and reports on held-out documents."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.classifier.hashed_ngrams import LinearClassifier, hashed_counts
from data_tools.classifier.settings import TrainClassifierSettings
from data_tools.documents import plan_splits, read_split
from data_tools.engines import open_engine
from data_tools.engines.base import EngineSettings
from data_tools.flags import need
from data_tools.records import ReadLog, ReadSettings
from data_tools.settings import DataSettings
from data_tools.steps.filter import uniform
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import info, progress, table


@dataclass(frozen=True)
class Examples:
    """Sparse rows: `indptr` int64 [N+1], `numbers` int64, `values` float64; `labels` float64 [N], 1 = good."""

    indptr: np.ndarray
    numbers: np.ndarray
    values: np.ndarray
    labels: np.ndarray
    texts: list[str]

    def matrix(self, buckets: int) -> Any:
        from scipy.sparse import csr_matrix

        return csr_matrix((self.values, self.numbers, self.indptr), shape=(len(self.labels), buckets))


def read_examples(positives: list[str], negatives: list[str], read: ReadSettings,
                  settings: TrainClassifierSettings) -> tuple[Examples, Examples]:
    """(training, held-out) examples; equal texts fall on the same side, so none is judged by what it taught.

    Raises:
        UserError: a class has too few documents for either side.
    """
    sides: tuple[list, list] = ([], [])
    for label, inputs in ((1.0, positives), (0.0, negatives)):
        for split in progress(plan_splits(inputs, read), "positives" if label else "negatives"):
            for document in read_split(split, read, ReadLog()):
                held = uniform(settings.seed, document.text) < settings.held_out
                features = hashed_counts(document.text, settings.buckets, settings.longest)
                sides[held].append((label, *features, document.text if held else ""))
    for name, side in zip(("training", "held-out"), sides, strict=True):
        for label, inputs in ((1.0, positives), (0.0, negatives)):
            if not any(row[0] == label for row in side):
                raise UserError(f"no {name} document among the {'positives' if label else 'negatives'}", where=inputs,
                                hint="give more documents")
    return _pack(sides[0]), _pack(sides[1])


def _pack(rows: list[tuple]) -> Examples:
    lengths = [len(numbers) for _, numbers, _, _ in rows]
    return Examples(np.cumsum([0, *lengths]), np.concatenate([row[1] for row in rows]),
                    np.concatenate([row[2] for row in rows]), np.array([row[0] for row in rows]),
                    [row[3] for row in rows])


def _weights(labels: np.ndarray, balance: bool) -> np.ndarray:
    """Weight of each example; they add up to the number of examples."""
    if not balance:
        return np.ones(len(labels))
    positives = labels.sum()
    return np.where(labels == 1, len(labels) / (2 * positives), len(labels) / (2 * (len(labels) - positives)))


def train_local(examples: Examples, settings: TrainClassifierSettings) -> LinearClassifier:
    """Minimises mean weighted log loss + regularization / 2 * |weights|^2 (the intercept is free) by L-BFGS."""
    from scipy.optimize import minimize

    matrix = examples.matrix(settings.buckets)
    signs, weights = 2 * examples.labels - 1, _weights(examples.labels, settings.balance) / len(examples.labels)

    def loss_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (matrix @ point[:-1] + point[-1])
        loss = weights @ np.logaddexp(0.0, -margins) + 0.5 * settings.regularization * (point[:-1] @ point[:-1])
        pull = -weights * signs / (1.0 + np.exp(np.clip(margins, -500, 500)))
        return loss, np.append(matrix.T @ pull + settings.regularization * point[:-1], pull.sum())

    start = np.zeros(settings.buckets + 1)
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": settings.iterations})
    return LinearClassifier(found.x[:-1], float(found.x[-1]), settings.longest)


def train_spark(examples: Examples, settings: TrainClassifierSettings, session: Any) -> LinearClassifier:
    """The same objective by Spark ML's LogisticRegression."""
    from pyspark.ml.classification import LogisticRegression
    from pyspark.ml.linalg import SparseVector

    weights = _weights(examples.labels, settings.balance)
    rows = [(float(label), float(weight), SparseVector(settings.buckets, examples.numbers[start:end].tolist(),
                                                       examples.values[start:end].tolist()))
            for label, weight, start, end in zip(examples.labels, weights, examples.indptr[:-1], examples.indptr[1:],
                                                 strict=True)]
    frame = session.createDataFrame(rows, ["label", "weight", "features"])
    regression = LogisticRegression(maxIter=settings.iterations, regParam=settings.regularization, weightCol="weight",
                                    standardization=False, tol=1e-8)
    model = regression.fit(frame)
    return LinearClassifier(np.array(model.coefficients.toArray()), float(model.intercept), settings.longest)


@dataclass(frozen=True)
class HeldOutReport:
    """Quality of a classifier on documents it did not learn from."""

    recall: np.ndarray
    precision: np.ndarray
    threshold: np.ndarray
    average_precision: float
    roc_auc: float
    accuracy: float


def judge(scores: np.ndarray, labels: np.ndarray) -> HeldOutReport:
    """Precision-recall curve, average precision (a sum of steps), area under the ROC curve, accuracy at 0.5."""
    order = np.argsort(-scores, kind="stable")
    ranked, ordered = labels[order], scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # equal scores share a point
    hits = np.cumsum(ranked)[last]
    precision, recall = hits / (last + 1), hits / labels.sum()
    average = float(np.sum(np.diff(np.concatenate([[0.0], recall])) * precision))
    positives, negatives = labels.sum(), len(labels) - labels.sum()
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2.0)[group]  # equal scores share their mean rank
    auc = float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))
    return HeldOutReport(recall, precision, ordered[last], average, auc, float(np.mean((scores >= 0.5) == labels)))


def run_train_classifier(settings: DataSettings, arguments: Any) -> dict[str, Any]:
    """`train-classifier`: the model file and, beside it, an HTML report with the precision-recall curve."""
    need(arguments, "positives", "negatives", "output")
    output = Path(arguments.output)
    if output.suffix != ".npz":
        raise UserError("a classifier file ends in .npz", where="--output", value=arguments.output)
    training, held_out = read_examples(arguments.positives, arguments.negatives, settings.read, settings.classifier)
    if arguments.engine:
        settings.engine.name = arguments.engine
    model = _train(training, settings.classifier, settings.engine)
    matrix = held_out.matrix(settings.classifier.buckets)
    margins = matrix @ model.weights + model.intercept
    scores = 1.0 / (1.0 + np.exp(-np.clip(margins, -500, 500)))
    report = judge(scores, held_out.labels)
    model.save(output)
    page = output.with_suffix(".html")
    with atomic_write(page) as file:
        file.write(_page(report, scores, held_out))
    figures = {"training_documents": len(training.labels), "held_out_documents": len(held_out.labels),
               "average_precision": round(report.average_precision, 6), "roc_auc": round(report.roc_auc, 6),
               "accuracy": round(report.accuracy, 6)}
    table("held-out documents", list(figures), [list(figures.values())])
    info(f"classifier {output}, report {page}")
    return {**figures, "model": str(output), "report": str(page), "engine": settings.engine.name}


def _train(training: Examples, settings: TrainClassifierSettings, engine: EngineSettings) -> LinearClassifier:
    if engine.name == "local":
        return train_local(training, settings)
    with open_engine(engine) as spark:
        return train_spark(training, settings, spark.session)


def _page(report: HeldOutReport, scores: np.ndarray, held_out: Examples) -> str:
    """HTML with the curve, a table of thresholds and the documents that were judged most wrongly."""
    rows = []
    for threshold in np.arange(0.1, 1.0, 0.1):
        kept = scores >= threshold
        hits = float(held_out.labels[kept].sum())
        precision = hits / kept.sum() if kept.any() else float("nan")
        rows.append(f"<tr><td>{threshold:.1f}</td><td>{precision:.4f}</td>"
                    f"<td>{hits / held_out.labels.sum():.4f}</td><td>{kept.mean():.4f}</td></tr>")
    wrong = np.argsort(-np.abs(scores - held_out.labels), kind="stable")[:10]
    examples = "".join(f"<tr><td>{scores[index]:.4f}</td><td>{'good' if held_out.labels[index] else 'bad'}</td>"
                       f"<td>{html.escape(held_out.texts[index][:160])}</td></tr>" for index in wrong)
    return (
        "<!doctype html><meta charset=utf-8><title>Classifier on held-out documents</title>"
        "<style>body{font-family:sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:.3em .6em}"
        "table{border-collapse:collapse}</style><h1>Classifier on held-out documents</h1>"
        f"<p>{len(scores)} documents; average precision {report.average_precision:.4f}, area under the ROC curve "
        f"{report.roc_auc:.4f}, accuracy at 0.5 {report.accuracy:.4f}.</p>"
        f"<img alt='precision-recall curve' src='data:image/png;base64,{_curve(report)}'>"
        "<h2>Thresholds</h2><table><tr><th>score at least</th><th>precision</th><th>recall</th><th>kept</th></tr>"
        f"{''.join(rows)}</table><h2>Judged most wrongly</h2><table><tr><th>score</th><th>is</th><th>text</th></tr>"
        f"{examples}</table>"
    )


def _curve(report: HeldOutReport) -> str:
    """Base64 PNG of the precision-recall curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.step(report.recall, report.precision, where="pre")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01),
             title=f"precision-recall, average precision {report.average_precision:.4f}")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
