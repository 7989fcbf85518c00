"""Verb `flatten`: adds flat files, which need no MindSpore, to packed records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.data.flat import ROWS, FlatFile, FlatWriter
from pangu.data.mind_records import MindRecords
from pangu.data.packing import INDEX_FILE, SPLITS, read_index
from parallel.common.files import explain_os_error, write_json

if TYPE_CHECKING:
    from pangu.settings import Run


def flatten(directory: str | Path) -> dict[str, Any]:
    """Writes the flat form of every file of records of a folder, and an index that names them.

    Returns:
        figures: directory, records, documents (their ends), bytes.
    Raises:
        UserError: no records, damaged ones, no space on the disk.
    """
    directory, index = Path(directory), read_index(directory)
    figures = {"directory": str(directory), "records": 0, "documents": 0, "bytes": 0}
    try:
        for split in SPLITS:
            for entry in getattr(index, split).files:
                writer = FlatWriter(directory / entry.file, index.sequence_length + 1, index.vocabulary_size,
                                    index.eot_id)
                records = MindRecords(directory, [entry], index.sequence_length + 1)
                for ids_NR in records.read(np.arange(len(records)), ROWS):
                    writer.add(ids_NR)
                entry.flat = FlatFile(**writer.finish())
                figures["records"] += entry.records
                figures["documents"] += entry.flat.documents
                figures["bytes"] += (directory / entry.flat.ids).stat().st_size
        write_json(directory / INDEX_FILE, index.model_dump())
    except OSError as error:
        raise explain_os_error(error, directory) from error
    return figures


def run(settings: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verb `flatten`: adds flat files to packed records that have none."""
    return flatten(settings.data.directory)
