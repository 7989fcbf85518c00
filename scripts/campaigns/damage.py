"""Damaged files of every kind that is read: what carries a digest must never load as something else, and nothing may
end in a traceback."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.base import Campaign
from campaigns.mutations import flipped, mutated_bytes

SHORT = 2
_MIND_RECORDS = 60


@dataclass
class Kind:
    """One kind of artefact.

    Args:
        name: for the counts.
        files: of which one is damaged at a time.
        read: reads all of it; the result stands for the content.
        sealed: carries digests, so a changed byte must be reported or change nothing.
    """

    name: str
    files: list[Path]
    read: Callable[[], Any]
    sealed: bool = True


class Plain:
    """A tensor of NumPy, as checkpoints take it."""

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values, self.dtype, self.shape = name, values, "F32", values.shape

    def read(self) -> np.ndarray:
        return self.values

    def assign(self, value: np.ndarray) -> None:
        self.values = value


def run(campaign: Campaign) -> None:
    """Makes every kind once and damages it over and over."""
    folder = campaign.folder / "damage"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()):
        # What takes a command to make is left out of the suite.
        slow = () if campaign.short else (tokenizers, reports)
        kinds = [kind for make in (checkpoints, strategies, logs, records, vocabularies, texts, *slow)
                 for kind in make(folder)]
        wanted = {kind.name: content(kind.read()) for kind in kinds}
        mind_records(campaign, folder, campaign.part("mind records"))
        rng, done = campaign.part("damage"), 0
        while campaign.more(done, SHORT * len(kinds)):
            kind = kinds[done % len(kinds)]
            damage(campaign, kind, wanted[kind.name], rng)
            done += 1


def damage(campaign: Campaign, kind: Kind, wanted: str, rng: random.Random) -> None:
    """One trial: a file is changed, read, and put back."""
    path = rng.choice(kind.files)
    before = path.read_bytes()
    after = flipped(before, rng) if rng.random() < 0.6 else mutated_bytes(before, rng)
    if after == before:
        return
    try:
        path.write_bytes(after)
        found = campaign.attempt(f"damage {kind.name}", lambda _: kind.read(), after)
        if not isinstance(found, Exception) and kind.sealed and content(found) != wanted:
            campaign.fail(f"silent {kind.name}", f"{path.name}: read as something else", after)
    finally:
        path.write_bytes(before)


def content(value: Any) -> str:
    """A digest of anything that is read."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, np.ndarray):
            digest.update(f"{item.dtype}{item.shape}".encode() + np.ascontiguousarray(item).tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                digest.update(str(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for one in item:
                add(one)
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """Of the names and bytes of all files below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b"/"))
    return found.hexdigest()


def checkpoints(folder: Path) -> list[Kind]:
    """A full checkpoint and one of two ranks."""
    from parallel.checkpoint.full import save_checkpoint
    from parallel.checkpoint.sharded import Slices
    from parallel.checkpoint.writing import write_checkpoint, write_index, write_rank

    tensors = [Plain(f"layer.{i}.weight", np.arange(i, 60 + i, dtype=np.float32).reshape(6, 10)) for i in range(3)]
    path = save_checkpoint(folder / "checkpoints", 3, tensors, [Plain("adam_m.layer.0.weight", tensors[0].values)],
                           {"iteration": 100, "run": {"model": {"name": "x"}}})

    def read(place: Path) -> Any:
        slices = Slices(place)
        return [slices.state, {name: slices.read(name) for name in sorted(slices.tensors)}]

    made = [Kind("checkpoint", sorted(path.iterdir()), lambda: read(path))]
    sharded = folder / "sharded" / "step_00000003"
    if not sharded.exists():
        def write(place: Path) -> None:
            written = []
            for rank in range(2):
                written += write_rank(place, rank, 2, [("w", "parameters.safetensors", "F32", (6, 10),
                                                        ((3 * rank, 3 * rank + 3), (0, 10)))],
                                      lambda name, box: tensors[0].values[tuple(slice(*pair) for pair in box)])
            write_index(place, written, 2)
        write_checkpoint(sharded, 1000, write, {"format": "parallel.checkpoint", "version": 2, "iteration": 7})
    return [*made, Kind("sharded checkpoint", sorted(sharded.iterdir()), lambda: read(sharded))]


def strategies(folder: Path) -> list[Kind]:
    """A strategy file of ours and the published one, which carries no digest."""
    from parallel.checkpoint.strategy_file import SliceLayout, read_strategy, write_strategy

    path = folder / "strategy.ckpt"
    write_strategy(path, {f"layers.{i}.weight": SliceLayout((2, 4), (1, -1), 4, 2, (0,), (8, 16)) for i in range(4)})
    return [Kind("strategy", [path], lambda: {name: repr(one) for name, one in read_strategy(path).items()})]


def logs(folder: Path) -> list[Kind]:
    """A click log as it is encoded, and the log itself."""
    from recsys.data.log import prepare
    from recsys.settings import DataSettings

    path = folder / "log.csv"
    path.write_text("user,item,price,click\n" + "".join(
        f"u{i % 5},{i % 7},{i / 3:.2f},{i % 2}\n" for i in range(300)))
    settings = DataSettings.model_validate({
        "reader": "csv", "path": str(path), "labels": ["click"], "cache": str(folder / "cache"), "user": "user",
        "features": [{"name": "user", "side": "user"}, {"name": "item", "side": "item"},
                     {"name": "price", "side": "item", "type": "numeric", "transform": "value"}]})

    def read() -> Any:
        log = prepare(settings, 4)
        return [{part: [np.asarray(getattr(rows, name)) for name in ("ids", "numbers", "labels", "users")]
                 for part, rows in log.parts.items()}, log.vocabulary.values, log.vocabulary.moments, log.labels]

    read()
    made = next(entry for entry in (folder / "cache").iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [Kind("encoded log", sorted(file for file in made.iterdir() if file.stat().st_size), read)]


class _Letters:
    """A tokenizer of characters."""

    eot_id, pad_id, vocabulary_size, fingerprint = 9, 6, 512, "letters"

    def encode(self, text: str) -> list[int]:
        return [10 + ord(letter) % 500 for letter in text]


def records(folder: Path) -> list[Kind]:
    """Packed records, read from their flat files."""
    from pangu.data.dataset import PackedDataset
    from pangu.data.packing import PackOptions, pack

    output = folder / "records"
    if not output.exists():
        pack((f"{i} " + "一些文字" * (i % 9 + 3) for i in range(200)), _Letters,
             PackOptions(validation_fraction=0.1, workers=1, shards=2), output=output, sequence_length=32)

    def read() -> Any:
        found = []
        for split in ("train", "validation"):
            data = PackedDataset(output, batch_size=4, seed=1, sequence_length=32, vocabulary_size=512, shuffle=False,
                                 repeat=False, split=split)
            found += [np.asarray(batch[0]) for batch in data.batches(0)]
        return found

    return [Kind("flat records", [output / "index.json", *output.glob("*.ids")], read)]


def vocabularies(folder: Path) -> list[Kind]:
    """A ranker's vocabulary, a classifier of documents."""
    from data_tools.classifier.hashed_ngrams import LinearClassifier
    from recsys.data.vocabulary import Vocabulary

    path = folder / "vocabulary.json"
    Vocabulary({"user": ["a", "b"]}, {"user": [3.0, 2.0]}, {"price": [1.0, 2.0]}, {"price": (0.5, 1.5)}).save(path)
    classifier = folder / "classifier.npz"
    LinearClassifier(np.linspace(-1, 1, 256), 0.5, 3).save(classifier)
    return [Kind("vocabulary", [path], lambda: vars(Vocabulary.load(path))),
            Kind("classifier", [classifier], lambda: vars(LinearClassifier.load(classifier)))]


def tokenizers(folder: Path) -> list[Kind]:
    """A SentencePiece model."""
    from pangu.data.tokenizer import Tokenizer

    model = folder / "vocabulary.model"
    if not model.exists():
        train_vocabulary(folder, model)
    return [Kind("tokenizer", [model], lambda: Tokenizer(model).encode("一些文字 and words\n第二行"))]


def train_vocabulary(folder: Path, model: Path) -> None:
    """A small SentencePiece model of the generated world."""
    corpus = folder / "world.jsonl"
    subprocess.run([sys.executable, "-m", "data_tools", "generate-corpus", "--output", str(corpus), "--bytes", "150KB"],
                   check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "pangu", "train-vocabulary", f"data.corpus={corpus}",
                    f"data.tokenizer={model}", "model.vocabulary_size=950"], check=True, capture_output=True)


def texts(folder: Path) -> list[Kind]:
    """Documents in every format and compression: files of users, without digests."""
    import pyarrow as pa
    import zstandard
    from pyarrow import parquet

    from data_tools.documents import plan_splits, read_split
    from data_tools.records import ReadLog, ReadSettings

    lines = b"".join(json.dumps({"id": str(i), "text": "文字" * 50}).encode() + b"\n" for i in range(50))
    body = ("<html><meta charset=gbk><body><p>" + "网页内容" * 20 + "</p></body></html>").encode("gbk")
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body
    head = (b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://x.cn/%d\r\nWARC-Record-ID: <urn:%d>\r\n"
            b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n")
    warc = b"".join(head % (i, i, len(http)) + http + b"\r\n\r\n" for i in range(4))
    made = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.xz": lzma.compress(lines),
            "a.jsonl.zst": zstandard.ZstdCompressor().compress(lines), "a.txt": "第一行\n\n第二段\n".encode() * 50,
            "a.warc": warc, "a.warc.gz": gzip.compress(warc), "a.txt.zst": zstandard.ZstdCompressor().compress(lines)}
    for name, data in made.items():
        (folder / name).write_bytes(data)
    parquet.write_table(pa.table({"id": [str(i) for i in range(50)], "text": ["文字" * 50] * 50}), folder / "a.parquet")

    def read(path: Path) -> Any:
        log, settings = ReadLog(), ReadSettings()
        return [document.record() for split in plan_splits([str(path)], settings)
                for document in read_split(split, settings, log)]

    return [Kind(f"document {name}", [folder / name], lambda name=name: read(folder / name), sealed=False)
            for name in [*made, "a.parquet"]]


def reports(folder: Path) -> list[Kind]:
    """The state of a clean: its markers and figures."""
    from data_tools.report import load_results

    output = folder / "cleaned"
    if not output.exists():
        (folder / "in.jsonl").write_text("".join(
            json.dumps({"id": str(i), "text": "一些足够长的文字，用来测试。" * 20}) + "\n" for i in range(20)))
        subprocess.run([sys.executable, "-m", "data_tools", "clean", "--input", str(folder / "in.jsonl"), "--output",
                        str(output), "engine.workers=1"], check=True, capture_output=True)
    files = sorted((output / ".state").glob("*.json"))
    return [Kind("figures of a step", files, lambda: [one.to_json() for one in load_results(output)])] if files else []


_READ = """
import sys
from pathlib import Path
import numpy as np
sys.path[:0] = [{root!r}, {scripts!r}]
from campaigns.damage import content
from pangu.data.dataset import PackedDataset
from parallel.common.errors import UserError
for line in sys.stdin:
    try:
        data = PackedDataset(line.strip(), batch_size=4, seed=1, sequence_length=32, vocabulary_size=512,
                             shuffle=False, repeat=False, reader="mindrecord")
        print("read", content([np.asarray(batch[0]) for batch in data.batches(0)]), flush=True)
    except UserError as error:
        print("refused", str(error)[:200], flush=True)
"""


def mind_records(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """MindRecord files, read in a process of its own: damage once ended it with a segmentation fault."""
    output = folder / "records"
    files = [file for pattern in ("train*.mindrecord", "train*.db", "train*.crc32", "index.json")
             for file in output.glob(pattern)]
    here = Path(__file__).resolve()
    script = _READ.format(root=str(here.parents[2]), scripts=str(here.parents[1]))
    reader, wanted, done = None, None, 0
    try:
        while not campaign.short and campaign.more(done, 0) and done < _MIND_RECORDS:
            if reader is None:
                reader = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                wanted = _ask(reader, output)
            path = rng.choice(files)
            before = path.read_bytes()
            after = flipped(before, rng)
            path.write_bytes(after)
            try:
                told = _ask(reader, output)
            finally:
                path.write_bytes(before)
            campaign.count("damage mind records")
            done += 1
            if not told:
                campaign.fail("mind records", f"{path.name}: the reader died\n{reader.stderr.read()[-2000:]}", after)
                reader = None
            elif told.startswith("read") and told != wanted:
                campaign.fail("silent mind records", f"{path.name}: read as something else", after)
    finally:
        if reader is not None:
            reader.kill()
            reader.wait()


def _ask(reader: subprocess.Popen, folder: Path) -> str:
    try:
        reader.stdin.write(f"{folder}\n")
        reader.stdin.flush()
    except BrokenPipeError:
        return ""
    return reader.stdout.readline().strip()
