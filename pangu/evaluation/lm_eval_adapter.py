"""PanGu-alpha as a model of EleutherAI's lm-evaluation-harness, whose tasks can then be run on a checkpoint.

    import pangu.evaluation.lm_eval_adapter
    pangu.evaluation.lm_eval_adapter.register()
    lm_eval.simple_evaluate(model="pangu", model_args="config=run.yaml,checkpoint=runs/x", tasks=[...])

The package `lm-eval` is not needed for anything else here and is imported only by `register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pangu.evaluation.instances import split_request
from pangu.evaluation.questions import common_prefix
from pangu.generation.settings import GenerateSettings
from parallel.common.errors import UserError

DEFAULT_TOKENS = 256


class HarnessModel:
    """The package's three methods on texts, over a `pangu.evaluation.language_model.LanguageModel`.

    Args:
        model: scores and continues ids.

    Requests are the package's: objects whose `args` are (context, continuation), (text,) or (context, options).
    """

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer = model, model.tokenizer

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is the greedy one).

        An empty context is `<eot>`, as the package asks; a context that does not fit loses its beginning.
        """
        return self.model.loglikelihood([self._pair(*r.args) for r in requests])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        front = [] if context else [self.model.config.eot_id]
        # Encoded together, since words are segmented differently at the joint.
        ids, prefix = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
        if not ids:
            raise UserError("a request without any text", where="loglikelihood")
        return split_request(front, ids, min(common_prefix([prefix, ids]), len(ids) - 1))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of whole texts, after `<eot>`."""
        return self.model.loglikelihood_rolling([self.tokenizer.encode(r.args[0]) for r in requests])

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continuations, ended by the options' `until`, `max_gen_toks`; greedy unless `do_sample`."""
        answers: list[str] = [""] * len(requests)
        kinds: dict[str, tuple[GenerateSettings, list[int]]] = {}
        for index, request in enumerate(requests):
            settings = _settings(dict(request.args[1]))
            kinds.setdefault(settings.model_dump_json(), (settings, []))[1].append(index)
        for settings, members in kinds.values():
            prompts = [self._prompt(requests[index].args[0], settings) for index in members]
            for index, text in zip(members, self.model.generate_until(prompts, settings), strict=True):
                answers[index] = text
        return answers

    def _prompt(self, text: str, settings: GenerateSettings) -> list[int]:
        return self.tokenizer.encode(text) or [self.model.config.eot_id]


def _settings(options: dict) -> GenerateSettings:
    until = options.get("until") or []
    sampled = bool(options.get("do_sample", False))
    return GenerateSettings(
        max_new_tokens=int(options.get("max_gen_toks", DEFAULT_TOKENS)), truncate=True,
        stop=[until] if isinstance(until, str) else list(until),
        temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
        top_p=float(options.get("top_p", 1.0)), top_k=int(options.get("top_k", 0)))


def register() -> type:
    """Registers the model `pangu` with lm-eval and returns its class; its arguments are `config`,
    `checkpoint` and `int8` (a float checkpoint is quantized while it is loaded).

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        # The harness fills its registry when it is first asked, if it is empty: its own models come first.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("this needs the package lm-eval", hint="pip install lm-eval") from None

    @register_model("pangu")
    class PanGuHarness(HarnessModel, LM):
        def __init__(self, config: str, checkpoint: str | None = None, batch_size: int | str | None = None,
                     int8: bool = False, **_: Any) -> None:
            LM.__init__(self)
            HarnessModel.__init__(self, _load(config, checkpoint, batch_size, int8))

    return PanGuHarness


def _load(config: str, checkpoint: str | None, batch_size: int | str | None, int8: bool) -> Any:
    from pangu.data.tokenizer import Tokenizer
    from pangu.evaluation.language_model import LanguageModel
    from pangu.generation.backend import load_model
    from pangu.settings import Run
    from parallel.common.settings import load_settings

    settings = load_settings(Run, config)
    size = int(batch_size) if str(batch_size).isdigit() else None
    return LanguageModel(load_model(settings, checkpoint or settings.output.directory, int8),
                         Tokenizer(settings.data.tokenizer), size)
