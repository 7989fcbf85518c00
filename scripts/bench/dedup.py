"""Deduplication against datasketch: MinHash signatures, and the whole of finding near-duplicates, on one core.

Pages of about 1,000 characters are put together from sentences of the corpus in ../shared beside the checkout, else of
the generated world; a fifth of them are copies, edited copies or copies with their paragraphs moved. Both sides use the
same pages, n-gram (5 characters), number of hashes (128) and threshold (0.8), and take turns. datasketch gets its pages
from memory and does not verify; our dedup reads a file, verifies, and writes what stays and what goes. datasketch is
run with its default hash (SHA-1) and with the fastest one at hand; the ratio is against the better.
Speeds are MB of UTF-8 text per second of CPU time, so that other work on the machine counts little.

    python scripts/bench/dedup.py                        a minute: signatures and dedup against datasketch
    python scripts/bench/dedup.py --scale 250 500 1000   our steps from files to files, at these MB: speed, memory
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data" / "corpus" / "classics_modern_zh.jsonl.xz"
NGRAM, HASHES, THRESHOLD = 5, 128, 0.8


def sentences() -> tuple[str, list[str]]:
    """(name of the corpus, its lines of 10 to 300 characters)."""
    if SHARED.is_file():
        with lzma.open(SHARED, "rt", encoding="utf-8") as file:
            texts, name = [json.loads(line)["text"] for line in file], SHARED.name
    else:
        from data_tools.synthetic.generate import generate_corpus

        texts, name = [document["text"] for document in generate_corpus(20_000_000)], "generated world, 20 MB"
    return name, [line for text in texts for line in text.split("\n") if 10 <= len(line) <= 300]


def pages(lines: list[str], megabytes: float, seed: int = 1) -> Iterator[dict[str, str]]:
    """Documents of together `megabytes` MB; one in five is made out of one of the last hundred others."""
    rng, size, number, recent = random.Random(seed), 0, 0, []
    while size < megabytes * 1e6:
        if recent and number % 5 == 0:
            text = vary(rng, rng.choice(recent), number // 5 % 4)
        else:
            parts, length = [], 0
            while length < 1000:
                parts.append(rng.choice(lines))
                length += len(parts[-1])
            text = "\n".join(parts)
            recent = [*recent[-99:], text]
        size += len(text.encode())
        number += 1
        yield {"id": str(number), "text": text, "source": "bench"}


def vary(rng: random.Random, text: str, kind: int) -> str:
    """A copy (0), one with 1 % or 3 % of the characters replaced (1, 2), or with its paragraphs moved (3)."""
    if kind == 3:
        parts = text.split("\n")
        rng.shuffle(parts)
        return "\n".join(parts)
    letters = list(text)
    for place in rng.sample(range(len(letters)), len(letters) * (0, 1, 3)[kind] // 100):
        letters[place] = chr(rng.randrange(0x4E00, 0x9FA0))
    return "".join(letters)


class Peer:
    """datasketch with one hash function."""

    def __init__(self, name: str, hashfunc: object) -> None:
        from datasketch import MinHash

        self.name, self.hashfunc, self.minhash = name, hashfunc, MinHash

    def sign(self, texts: list[str]) -> list:
        """One MinHash a text; the n-grams of a text go in together, which is its fast way."""
        signed = []
        for text in texts:
            minhash = self.minhash(num_perm=HASHES, **({"hashfunc": self.hashfunc} if self.hashfunc else {}))
            minhash.update_batch([gram.encode() for gram in {text[n:n + NGRAM] for n in range(len(text) - NGRAM + 1)}])
            signed.append(minhash)
        return signed

    def dedup(self, texts: list[str]) -> int:
        """Documents left when each is dropped that the index says is like an earlier one (not verified)."""
        from datasketch import MinHashLSH

        index, kept = MinHashLSH(threshold=THRESHOLD, num_perm=HASHES), 0
        for number, minhash in enumerate(self.sign(texts)):
            if not index.query(minhash):
                index.insert(number, minhash)
                kept += 1
        return kept


def peers() -> list[Peer]:
    found = [Peer("datasketch, SHA-1", None)]
    try:
        import xxhash

        found.append(Peer("datasketch, xxh32", lambda data: xxhash.xxh32_intdigest(data)))
    except ImportError:
        import zlib

        found.append(Peer("datasketch, CRC-32", zlib.crc32))
    return found


def our_signatures(texts: list[str]) -> object:
    from data_tools.dedup.normalise import normalise
    from data_tools.dedup.signature import Signer

    signer = Signer(NGRAM, HASHES)
    return [signer.sign([normalise(text) for text in texts[start:start + 500]]) for start in range(0, len(texts), 500)]


def our_dedup(path: Path) -> int:
    """The whole step: read the file, sign, find, verify by real Jaccard, write both sides."""
    from data_tools.dedup.plan import DedupSettings
    from data_tools.dedup.step import run_dedup
    from data_tools.documents import plan_splits
    from data_tools.engines.local import LocalEngine
    from data_tools.parts import OutputLayout
    from data_tools.records import ReadSettings

    with tempfile.TemporaryDirectory() as folder:
        figures, _ = run_dedup(DedupSettings(threshold=THRESHOLD, ngram=NGRAM, hashes=HASHES), ReadSettings(),
                               plan_splits([str(path)], ReadSettings()), OutputLayout.under(folder, "dedup"),
                               Path(folder) / ".work", LocalEngine(1), "jsonl")
    return figures.documents_out


def cpu_seconds(function: object, *arguments: object) -> tuple[float, object]:
    began = time.process_time()
    result = function(*arguments)
    return time.process_time() - began, result


def compare(megabytes: float, rounds: int) -> dict[str, object]:
    name, lines = sentences()
    documents = list(pages(lines, megabytes))
    texts = [document["text"] for document in documents]
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pages.jsonl"
        path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
        sides = {("signatures", "ours"): (our_signatures, texts), ("dedup", "ours"): (our_dedup, path)}
        for peer in peers():
            sides |= {("signatures", peer.name): (peer.sign, texts), ("dedup", peer.name): (peer.dedup, texts)}
        our_signatures(texts[:10])  # builds the tables of characters
        best: dict[tuple[str, str], float] = {}
        left: dict[str, int] = {}
        for number in range(rounds):
            for key, (function, argument) in sides.items():
                seconds, result = cpu_seconds(function, argument)
                best[key] = min(seconds, best.get(key, seconds))
                if key[0] == "dedup":
                    left[key[1]] = result
                print(f"round {number + 1}  {key[0]:10}  {key[1]:20}  {size / seconds:8.2f} MB/s", flush=True)
    speed = {key: size / seconds for key, seconds in best.items()}
    peer_speed = {what: max(value for key, value in speed.items() if key[0] == what and key[1] != "ours")
                  for what in ("signatures", "dedup")}
    ours = {what: speed[what, "ours"] for what in ("signatures", "dedup")}
    return {"ratio": round(ours["signatures"] / peer_speed["signatures"], 2), "ours": round(ours["signatures"], 2),
            "peer": round(peer_speed["signatures"], 2), "unit": "MB per CPU second, signatures", "corpus": name,
            "dedup_ratio": round(ours["dedup"] / peer_speed["dedup"], 2), "dedup_ours": round(ours["dedup"], 2),
            "dedup_peer": round(peer_speed["dedup"], 2), "documents": len(texts), "documents_left": left,
            "megabytes": round(size, 1)}


def scale(sizes: list[float], verbs: list[str], engine: str) -> dict[str, object]:
    """Our verbs from files to files, each a process of its own: MB/s by the clock and per CPU second, peak memory."""
    name, lines = sentences()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in sizes:
            path = Path(folder) / "pages.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for document in pages(lines, megabytes):
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
            for verb in verbs:
                rows.append(run_verb(verb, path, Path(folder) / verb, engine, megabytes))
                print(json.dumps(rows[-1]), flush=True)
                subprocess.run(["rm", "-rf", str(Path(folder) / verb)], check=True)
    return {"unit": "MB/s", "corpus": name, "rows": rows}


def run_verb(verb: str, path: Path, output: Path, engine: str, megabytes: float) -> dict[str, object]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "data_tools", verb, "--input", str(path), "--output", str(output),
               "--engine", engine]
    if verb == "signatures":
        command = [sys.executable, __file__, "--sign", str(path), str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of_tree(process.pid))
        time.sleep(0.1)
    line = json.loads(process.stdout.read().strip().splitlines()[-1])
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = line["bytes_in"] / 1e6
    if verb == "signatures":  # counting the text afterwards is not part of it
        seconds, cpu = line["seconds"], line["cpu_seconds"]
    row = {"verb": verb, "engine": engine, "megabytes": round(size), "documents_in": line["documents_in"],
           "documents_out": line["documents_out"], "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
           "mb_per_second": round(size / seconds, 2), "mb_per_cpu_second": round(size / cpu, 2),
           "peak_mb_of_all_processes": round(peak / 1e6)}
    if engine == "spark" and verb != "signatures":  # the JVM's time is not that of a child that was waited for
        del row["cpu_seconds"], row["mb_per_cpu_second"]
    return row


def sign(path: str, folder: str) -> dict[str, object]:
    """Dedup's first pass alone, in this process: reads the file, writes the signature files."""
    from data_tools.dedup.plan import DedupPlan, DedupSettings
    from data_tools.dedup.sign_part import SignTask
    from data_tools.documents import plan_splits, read_split
    from data_tools.records import ReadLog, ReadSettings

    splits, read = plan_splits([path], ReadSettings()), ReadSettings()
    plan = DedupPlan(DedupSettings(threshold=THRESHOLD, ngram=NGRAM, hashes=HASHES), read, (), folder)
    (Path(folder) / "signatures").mkdir(parents=True)
    began, cpu = time.perf_counter(), time.process_time()
    for split in splits:
        SignTask(plan, split)()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    sizes = [len(document.text.encode()) for split in splits for document in read_split(split, read, ReadLog())]
    return {"bytes_in": sum(sizes), "documents_in": len(sizes), "documents_out": len(sizes), "seconds": seconds,
            "cpu_seconds": cpu}


def memory_of_tree(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total, waiting = 0, [pid]
    while waiting:
        here = waiting.pop()
        try:
            total += int(Path(f"/proc/{here}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            waiting += map(int, Path(f"/proc/{here}/task/{here}/children").read_text().split())
        except (OSError, ValueError, IndexError):
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=6.0, help="text of the comparison (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, nargs="+", metavar="MB", help="sizes for our verbs alone")
    parser.add_argument("--verbs", nargs="+", choices=("clean", "signatures", "dedup"),
                        default=["clean", "signatures", "dedup"], help="of --scale; signatures: in one process")
    parser.add_argument("--sign", nargs=2, metavar=("FILE", "DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=("local", "spark"), default="local", help="of --scale")
    arguments = parser.parse_args()
    if arguments.sign:
        print(json.dumps(sign(*arguments.sign)))
        return
    for variable in ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        print(f"{variable}={os.environ.get(variable, '(not set)')}")
    print("threads: 1 on both sides of the comparison")
    if arguments.scale:
        result = scale(arguments.scale, arguments.verbs, arguments.engine)
    else:
        result = compare(arguments.megabytes, arguments.rounds)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
