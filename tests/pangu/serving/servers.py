"""A vocabulary and live servers on free ports of the loopback, for tests of serving."""

from __future__ import annotations

import contextlib
import io
import subprocess
import threading
from pathlib import Path

from pangu.data.tokenizer import SPECIAL_PIECES, Tokenizer
from pangu.serving.server import application
from pangu.serving.service import Service
from pangu.serving.settings import ServeSettings
from parallel.serving.errors import openai_shape
from parallel.serving.run import address, bind, make_server
from tests.servers import says_where

TEXT = ("问：王芳的工作是什么？答：教师。 上联：春风吹绿江南岸，下联：明月照我还。 李娜：好久不见！张伟：你好， "
        "今天天气很好，我们去公园看花。 摘要是：图书馆开放了。 hello world, stop here. 𠮷 is one character. "
        "3加4等于7。 ") * 20


def write_vocabulary(path: Path, bytes_too: bool = False) -> Path:
    """A small SentencePiece model with PanGu-alpha's special pieces; `bytes_too`: what it lacks becomes bytes."""
    import sentencepiece

    from pangu.data.segmentation import Segmenter

    model, words = io.BytesIO(), Segmenter().cut(TEXT)
    lines = [" ".join(words[place:place + 7]) for place in range(0, len(words), 7)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=420 if bytes_too else 160, model_type="unigram",
        character_coverage=1.0, normalization_rule_name="nmt_nfkc", user_defined_symbols=list(SPECIAL_PIECES[3:]),
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=bytes_too, hard_vocab_limit=False, minloglevel=3)
    path.write_bytes(model.getvalue())
    return path


@contextlib.contextmanager
def serving(engine, tokenizer: Tokenizer, **settings):
    """(address, service) of a server in a thread of this process."""
    made = ServeSettings(**{"port": 0, "name": "pangu-test", "drain_seconds": 10.0, **settings})
    service, listener = Service(engine, tokenizer, made, made.name), bind(made)
    server = make_server(application(service), listener, made, openai_shape)
    where = address(listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield where, service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def started(run, *words) -> tuple[subprocess.Popen, str]:
    """(process, address) of `python -m pangu serve`, once it says that it serves."""
    return says_where("pangu", "serve", "--config", str(run[0] / "run.yaml"), "port=0", "engine.running=4", *words)
