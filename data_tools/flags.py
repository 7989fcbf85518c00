"""Flags of the verbs; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse

from parallel.common.errors import UserError


def need(arguments: argparse.Namespace, *names: str) -> None:
    """Checks flags that a verb cannot do without; argparse would ask for them under --print-reference too.

    Raises:
        UserError: one of them was not given.
    """
    for name in names:
        if not getattr(arguments, name):
            raise UserError("this flag is needed", where=f"--{name.replace('_', '-')}", hint="see --help")


def add_input_output(parser: argparse.ArgumentParser) -> None:
    """The flags that every verb over documents has."""
    parser.add_argument("--input", nargs="+", metavar="PATH",
                        help="files, folders or patterns: .jsonl .parquet .txt .warc .wet, also .gz .xz .zst .bz2")
    parser.add_argument("--output", metavar="DIR", help="folder for the documents and for removed/")
    parser.add_argument("--engine", choices=("local", "spark"), help="where the work runs (engine.name)")
    parser.add_argument("--master", help="Spark master: local[*], spark://host:7077, yarn (engine.master);"
                        " means --engine spark")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of the local engine (engine.workers)")
    parser.add_argument("--format", choices=("jsonl", "jsonl.gz", "jsonl.zst", "parquet"),
                        help="of the documents written")


def add_dedup_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `dedup`."""
    add_input_output(parser)
    parser.add_argument("--threshold", type=float, metavar="T",
                        help="Jaccard similarity from which two documents are near duplicates (dedup.threshold)")


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `train-classifier`."""
    parser.add_argument("--positives", nargs="+", metavar="PATH", help="good documents")
    parser.add_argument("--negatives", nargs="+", metavar="PATH", help="bad documents, such as spam")
    parser.add_argument("--output", metavar="FILE.npz", help="classifier; its report goes beside it")
    parser.add_argument("--engine", choices=("local", "spark"), help="local: L-BFGS here; spark: Spark ML")


def add_decontaminate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `decontaminate`."""
    add_input_output(parser)
    parser.add_argument("--evaluation", nargs="+", metavar="PATH",
                        help="files and folders of the evaluation sets (decontaminate.evaluation)")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `report`."""
    parser.add_argument("--input", required=True, metavar="DIR", help="output folder of another verb")
    parser.add_argument("--output", metavar="FILE.html", help="page to write (default: report.html in that folder)")


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `compare-versions`."""
    parser.add_argument("--versions", nargs="+", metavar="DIR", help="folders of cleaned documents")
    parser.add_argument("--development", nargs="+", metavar="PATH", help="documents of high quality")
    parser.add_argument("--output", metavar="DIR", help="folder for samples, records and models")
