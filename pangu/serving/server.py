"""Verb `serve`: an OpenAI-compatible server of one PanGu-alpha, and a page to try it.

    POST /v1/completions, /v1/chat/completions    GET /v1/models, /v1/models/NAME
    POST /tokenize, /detokenize                   GET /tokenizer_info
    GET  /health   200 once it can answer         GET /metrics   Prometheus
    GET  /         the page; GET /recipes what it offers
    POST /reload   the newest checkpoint of the folder that is served; SIGHUP does the same
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.serving.requests import unknown_model
from pangu.serving.service import Service
from pangu.serving.settings import ServeSettings
from parallel.common.progress import info
from parallel.serving.application import require, unless_gone
from parallel.serving.errors import openai_shape
from parallel.serving.events import EventStream
from parallel.serving.run import address, bind, serve

if TYPE_CHECKING:
    from pangu.settings import Run

PAGE = Path(__file__).with_name("page")
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE_HEADERS = {
    "cache-control": "no-cache", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def application(service: Service) -> Any:
    """The FastAPI application."""
    front = service.front
    app = front.application("PanGu-alpha", service.reload.on_hangup, service.engine.close)
    _add_model(app, service)
    _add_tokenizer(app, service)
    _add_page(app, service)
    _add_operation(app, service)
    return app


def _add_model(app: Any, service: Service) -> None:
    from starlette.responses import JSONResponse

    def completions(read: Any) -> Any:
        async def run(request: Any) -> Any:
            ask = await service.read(request, read)
            answer = service.begin(ask)
            if ask.stream:
                return EventStream(answer.stream(), openai_shape, answer.cancel)
            try:
                return JSONResponse(await unless_gone(request, answer.complete()))
            finally:
                answer.cancel()
        return run

    async def models(_: Any) -> Any:
        return JSONResponse({"object": "list", "data": service.models()})

    async def model(request: Any) -> Any:
        found = next((one for one in service.models() if one["id"] == request.path_params["name"]), None)
        if found is None:
            raise unknown_model(request.path_params["name"])
        return JSONResponse(found)

    for path, read in (("/v1/completions", service.reader.completion), ("/v1/chat/completions", service.reader.chat)):
        service.front.route(app, path, "POST", completions(read), counted=True)
    service.front.route(app, "/v1/models", "GET", models)
    service.front.route(app, "/v1/models/{name:path}", "GET", model)


def _add_tokenizer(app: Any, service: Service) -> None:
    from starlette.responses import JSONResponse

    async def tokenize(request: Any) -> Any:
        def read(body: Any) -> dict:
            ids = service.reader.tokenize(body)
            strings = [service.texts(number) for number in ids] if body.get("return_token_strs") is True else None
            return {"count": len(ids), "max_model_len": service.engine.context, "tokens": ids, "token_strs": strings}
        return JSONResponse(await service.read(request, read))

    async def detokenize(request: Any) -> Any:
        return JSONResponse({"prompt": await service.read(request, service.reader.detokenize)})

    async def info(_: Any) -> Any:
        return JSONResponse(service.tokenizer_info())

    service.front.route(app, "/tokenize", "POST", tokenize)
    service.front.route(app, "/detokenize", "POST", detokenize)
    service.front.route(app, "/tokenizer_info", "GET", info)


def _add_page(app: Any, service: Service) -> None:
    from starlette.responses import JSONResponse, Response

    files = {path.name: (path.read_bytes(), _MEDIA_TYPES[path.suffix]) for path in sorted(PAGE.iterdir())}
    offered = {"model": service.name, "context": service.engine.context,
               "needs_key": service.front.key is not None, "recipes": recipes()}

    def page(name: str) -> Any:
        async def run(_: Any) -> Any:
            content, media_type = files[name]
            return Response(content, media_type=media_type, headers=_PAGE_HEADERS)
        return run

    async def offer(_: Any) -> Any:
        return JSONResponse(offered)

    for name in files:
        service.front.route(app, "/" if name == "index.html" else f"/page/{name}", "GET", page(name), is_open=True)
    service.front.route(app, "/recipes", "GET", offer, is_open=True)


def _add_operation(app: Any, service: Service) -> None:
    from starlette.responses import JSONResponse, Response

    async def health(_: Any) -> Any:
        return JSONResponse(service.health())

    async def metrics(_: Any) -> Any:
        text, media_type = service.metrics.text()
        return Response(text, media_type=media_type)

    async def reload(_: Any) -> Any:
        return JSONResponse(await service.reload())

    service.front.route(app, "/health", "GET", health, is_open=True)
    service.front.route(app, "/metrics", "GET", metrics)
    service.front.route(app, "/reload", "POST", reload)


def recipes() -> list[dict[str, Any]]:
    """The recipes under pangu/prompts, as the page offers them: name, title, about, template, inputs, decoding."""
    from pangu.generation.prompts import RECIPES, Recipe
    from parallel.common.settings import load_settings

    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load_settings(Recipe, path)
        found.append({"name": path.stem, "title": recipe.title or path.stem, "about": recipe.about,
                      "template": recipe.template, "names": recipe.names, "inputs": recipe.inputs,
                      "generate": recipe.generate.model_dump(mode="json", exclude_unset=True)})
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `serve`."""
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to serve (default: the newest of the run)")
    parser.add_argument("--int8", action="store_true", help="quantize float weights to int8 when they are loaded")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `serve`: until SIGTERM or SIGINT; then what was accepted is finished.

    Raises:
        UserError: a package is missing, the port is taken, or the checkpoint cannot be served.
    """
    require("serve", ("fastapi", "uvicorn", "httptools", "prometheus_client", "jinja2"))
    from pangu.data.tokenizer import Tokenizer
    from pangu.generation.generate import check_vocabulary
    from pangu.generation.sharded.model import open_sharded
    from pangu.serving.engine import start_engine

    serving: ServeSettings = settings.serve
    sharded = open_sharded(settings, arguments.checkpoint or settings.output.directory, arguments.int8,
                           serving.engine.cache_bytes)
    if sharded is not None:
        sharded.check_one_group()
        if sharded.backend is None:
            return sharded.follow()
    listener = bind(serving)
    tokenizer = Tokenizer(settings.data.tokenizer)
    check_vocabulary(tokenizer, settings.model.vocabulary_size)
    engine = start_engine(settings, arguments.checkpoint, serving.engine, arguments.int8, sharded)
    service = Service(engine, tokenizer, serving, serving.name or settings.model.name)
    line = f"serving {service.name} of {engine.stats().checkpoint} on {address(listener)}"
    serve(application(service), listener, serving, openai_shape, lambda: info(line))
    stats = engine.stats()
    if sharded is not None:
        sharded.close()
    return {"version": stats.version, "requests": stats.requests_total, "prompt_tokens": stats.prompt_tokens_total,
            "generated_tokens": stats.generation_tokens_total}
