"""Wrong configs, overrides, texts, requests and log rows: each is taken, or refused in one line; no tracebacks."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaigns.base import Campaign
from campaigns.mutations import NASTY_TEXT, mutated_bytes, mutated_text, mutated_tree

ROOT = Path(__file__).resolve().parents[2]
SHORT = 60


def run(campaign: Campaign) -> None:
    """All kinds in turn."""
    folder = campaign.folder / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    kinds: list[Callable[[Campaign, Path, random.Random], None]] = [
        configs, overrides, json_texts, jsonl_files, prompts, corpora, log_rows, requests]
    rng, done = campaign.part("inputs"), 0
    while campaign.more(done, len(kinds)):
        kind = kinds[done % len(kinds)]
        for _ in range(3 if campaign.short else 40):
            with contextlib.redirect_stderr(io.StringIO()):
                kind(campaign, folder, rng)
        done += 1


def _loaders() -> dict[str, Callable[[Path], Any]]:
    from data_tools.settings import DataSettings
    from pangu.evaluation.task import TaskSettings
    from pangu.generation.prompts import Recipe
    from parallel.common.settings import load_settings
    from parallel.planning.cluster import ClusterSettings
    from parallel.task import load_run
    from recsys.serving.settings import ServeSettings

    run_ = lambda path: load_run(str(path), [])  # noqa: E731
    found = {str(path): run_ for folder in ("pangu", "recsys", "recsys/movielens")
             for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))}
    for path, cls in ((ROOT / "configs/data/pangu_alpha.yaml", DataSettings),
                      (ROOT / "configs/cluster/ascend910.yaml", ClusterSettings),
                      (ROOT / "pangu/prompts/dialogue.yaml", Recipe), (ROOT / "pangu/tasks/ocnli.yaml", TaskSettings)):
        found[str(path)] = lambda path, cls=cls: load_settings(cls, path)
    found["serve"] = lambda path: load_settings(ServeSettings, path)
    return found


_KEPT: dict[str, Any] = {}


def _kept(name: str, make: Callable[[], Any]) -> Any:
    if name not in _KEPT:
        _KEPT[name] = make()
    return _KEPT[name]


def configs(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """A config file with something wrong in it."""
    loaders = _kept("loaders", _loaders)
    name = rng.choice(list(loaders))
    text = Path(name).read_text(encoding="utf-8") if name != "serve" else "port: 8000\nengine: {requests: 8}\n"
    path = folder / "config.yaml"

    def load(mutant: str | bytes) -> Any:
        path.write_bytes(mutant if isinstance(mutant, bytes) else mutant.encode("utf-8", "surrogatepass"))
        return loaders[name](path)

    text = text.replace("base: ", f"base: {Path(name).parent}/") if name != "serve" else text
    mutant = mutated_bytes(text.encode(), rng) if rng.random() < 0.2 else mutated_text(text, rng)
    campaign.attempt("input config", load, mutant)


def overrides(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """A key of a real config set to something that it is not."""
    from parallel.task import load_run

    name = rng.choice(("pangu/tiny", "recsys/tokenmixer_large", "recsys/rankmixer", "recsys/longer", "recsys/dhen",
                       "recsys/tokenmixer_large_ug_sep", "recsys/tokenmixer_large_moe"))
    config = str(ROOT / f"configs/{name}.yaml")

    def keys() -> list[str]:
        tree = load_run(config, [])[1].model_dump(mode="json")
        return [".".join(map(str, path)) for path in _paths(tree)]

    known = _kept(f"keys {name}", keys)
    word = f"{rng.choice(known)}={rng.choice(NASTY_TEXT)}"
    if rng.random() < 0.1:
        word = mutated_text(word, rng)

    def load(override: str) -> Any:
        settings = load_run(config, [override])[1]
        parallel = settings.parallel.resolve()
        return settings, parallel

    campaign.attempt("input override", load, word)


def _paths(tree: Any, path: tuple = ()) -> Any:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths(value, (*path, key))


def json_texts(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """JSON texts through the door, and whatever comes out is written again and read as it was."""
    from parallel.common.json_text import dump_json
    from parallel.common.structured import BadText, parse_json

    text = json.dumps({"a": [1, 2.5, None, True], "文": {"x": "\ud83d\ude00", "y": [[["z"]]]}, "n": 10**18})

    def there_and_back(mutant: str | bytes) -> Any:
        value = parse_json(mutant)
        again = parse_json(dump_json(value))
        if again != value:
            raise AssertionError(f"{value!r} became {again!r}")
        return value

    mutant = mutated_bytes(text.encode(), rng) if rng.random() < 0.4 else mutated_text(text, rng)
    campaign.attempt("input json", there_and_back, mutant, (BadText,))


def jsonl_files(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """Records of an evaluation task, and questions."""
    from pangu.evaluation.questions import read_questions
    from pangu.evaluation.task import Source, load_task

    name, file, row = rng.choice((
        ("ocnli", "OCNLI/dev_few_all.json", {"id": 1, "sentence1": "a", "sentence2": "b", "label": "neutral"}),
        ("chid", "CHID/dev_few_all.json", {"id": 1, "content": "他#idiom1#了", "candidates": ["a", "b"], "answer": 1}),
        ("csl", "CSL/dev_few_all.json", {"id": 1, "abst": "x", "keyword": ["a", "b"], "label": "1"}),
        ("cluewsc2020", "CLUEWSC2020/dev_few_all.json", {"target": {
            "span1_text": "甲", "span2_text": "他", "span2_index": 0}, "text": "他来了", "label": "true", "idx": 1}),
        ("questions", "q.jsonl", {"skill": "s", "prompt": "p", "choices": ["a", "b"], "answer": 0})))
    mutant = copy.deepcopy(row)
    text = json.dumps(mutated_tree(mutant, rng), default=str) if rng.random() < 0.6 else mutated_text(
        json.dumps(row, ensure_ascii=False), rng)

    def read(content: str) -> Any:
        if name == "questions":
            path = folder / file
            path.write_bytes(content.encode("utf-8", "surrogatepass"))
            return list(read_questions(path))
        task = _kept(f"task {name}", lambda: load_task(name))
        path = folder / "tasks" / task.folders[0] / task.files[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        return list(Source(task, folder / "tasks").records())

    campaign.attempt("input record", read, text)


def prompts(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """Files of prompts."""
    from pangu.generation.prompts import read_prompts
    from pangu.generation.settings import GenerateSettings

    suffix = rng.choice((".jsonl", ".txt", ".yaml"))
    text = {".jsonl": '{"prompt": "第一"}\n"二"\n', ".txt": "一\n二\n",
            ".yaml": (ROOT / "pangu/prompts/couplet.yaml").read_text(encoding="utf-8")}[suffix]
    path = folder / f"prompts{suffix}"

    def read(mutant: str | bytes) -> Any:
        path.write_bytes(mutant if isinstance(mutant, bytes) else mutant.encode("utf-8", "surrogatepass"))
        return read_prompts(str(path), None, GenerateSettings())

    campaign.attempt("input prompts", read, mutated_text(text, rng) if rng.random() < 0.7
                     else mutated_bytes(text.encode(), rng))


def corpora(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """Documents through the readers of the language model and of the data tools, which drop and count what is wrong."""
    from data_tools.documents import plan_splits, read_split
    from data_tools.records import ReadLog, ReadSettings
    from pangu.data.corpus import documents

    text = '{"id": "a", "text": "一些文字", "n": 1.5}\n{"id": "b", "text": "更多文字", "k": {"x": ["y"]}}\n'
    mutant = mutated_bytes(text.encode(), rng) if rng.random() < 0.5 else mutated_text(text, rng).encode(
        "utf-8", "surrogatepass")
    path = folder / "corpus.jsonl"

    def read(content: bytes) -> Any:
        path.write_bytes(content)
        log, settings = ReadLog(), ReadSettings()
        made = [document.record() for split in plan_splits([str(path)], settings)
                for document in read_split(split, settings, log)]
        for record in made:
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        return made

    campaign.attempt("input document", read, mutant)
    path.write_bytes(mutant)
    campaign.attempt("input corpus", lambda _: list(documents(path, text_key="text", whole_file=False)), mutant)


def log_rows(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """A click log with something wrong in it: refused with its row, or read, and then no row is lost."""
    from recsys.data.log import prepare
    from recsys.settings import DataSettings

    base = "user,item,price,tags,click,at\n" + "".join(
        f"u{i % 5},{i % 7},{i / 3:.2f},a|b{i % 3},{i % 2},2024-01-{1 + i % 28:02} 05:00\n" for i in range(40))
    mutant = mutated_text(base, rng) if rng.random() < 0.7 else mutated_bytes(base.encode(), rng)
    data = mutant if isinstance(mutant, bytes) else mutant.encode("utf-8", "surrogatepass")
    path = folder / "log.csv"
    features = [{"name": "user", "side": "user"},
                {"name": "item", "side": "item", "values": "integer", "rows": 1000},
                {"name": "price", "side": "item", "type": "numeric", "transform": rng.choice(("value", "bucket"))},
                {"name": "tags", "side": "item", "type": "multi", "length": 4, "separator": "|"}]
    settings = {"reader": "csv", "path": str(path), "features": features, "labels": ["click"],
                "split": {"by": rng.choice(("random", "order", "time"))}, "time": "at", "cache": str(folder / "cache"),
                "on_bad_row": rng.choice(("error", "skip"))}

    def read(content: bytes) -> Any:
        import shutil

        path.write_bytes(content)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return prepare(DataSettings.model_validate(settings), 4)

    campaign.attempt("input log", read, data)


def requests(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """Bodies of a ranker's requests."""
    from parallel.common.structured import BadText, parse_json
    from recsys.serving.requests import read_request

    trained = _kept("trained", lambda: _trained(folder))
    body = {"user": {"user": "u1"}, "candidates": [{"item": 3, "price": 1.5, "tags": ["a"]},
                                                   {"item": 4, "price": 2, "tags": []}], "top_k": 1}
    mutant = json.dumps(mutated_tree(body, rng), default=str) if rng.random() < 0.7 else mutated_text(
        json.dumps(body), rng)

    def read(text: str) -> Any:
        import numpy as np

        ask = read_request(parse_json(text.encode("utf-8", "surrogatepass")), trained, 100)
        if not np.isfinite(ask.numbers).all():
            raise AssertionError("numbers that are not finite would reach the model")
        return ask

    campaign.attempt("input request", read, mutant, (BadText,))


def _trained(folder: Path) -> Any:
    """What `read_request` needs of a ranker: features, columns and vocabulary, without a network."""
    from types import SimpleNamespace

    from recsys.data.columns import columns_of, features_of
    from recsys.data.log import prepare
    from recsys.data.readers import reader
    from recsys.settings import DataSettings

    path = folder / "requests.csv"
    path.write_text("user,item,price,tags,click\n" + "".join(
        f"u{i % 5},{i % 7},{i / 3:.2f},a|b{i % 3},{i % 2}\n" for i in range(60)))
    data = DataSettings.model_validate({"reader": "csv", "path": str(path), "labels": ["click"],
                                        "cache": str(folder / "request_cache"), "features": [
        {"name": "user", "side": "user"}, {"name": "item", "side": "item", "values": "integer", "rows": 1000},
        {"name": "price", "side": "item", "type": "numeric", "transform": "value"},
        {"name": "tags", "side": "item", "type": "multi", "length": 4, "separator": "|"}]})
    log = prepare(data, 4)
    return SimpleNamespace(features=features_of(data), spec=log.spec, vocabulary=log.vocabulary,
                           columns=columns_of(data, reader("csv")))
