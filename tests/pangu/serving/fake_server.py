"""A server over the engine without a model in a process of its own: `python -m tests.pangu.serving.fake_server`.

Arguments: vocabulary file, seconds a token, then keys of `serve` as key=value.
"""

import sys

from pangu.data.tokenizer import Tokenizer
from pangu.serving.server import application
from pangu.serving.service import Service
from pangu.serving.settings import ServeSettings
from parallel.common.settings import load_settings
from parallel.serving.errors import openai_shape
from parallel.serving.run import address, bind, serve
from tests.pangu.serving.fake_engine import FakeEngine

if __name__ == "__main__":
    settings = load_settings(ServeSettings, None, ["port=0", "name=pangu-test", *sys.argv[3:]])
    tokenizer = Tokenizer(sys.argv[1])
    engine = FakeEngine(tokenizer.vocabulary_size, context=256, seconds_per_token=float(sys.argv[2]))
    listener = bind(settings)
    service = Service(engine, tokenizer, settings, settings.name)
    serve(application(service), listener, settings, openai_shape,
          lambda: print(address(listener), flush=True))
    print(engine.stats().finished_total, flush=True)
