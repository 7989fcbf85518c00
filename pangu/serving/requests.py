"""From the JSON of a completion or a chat to what the engine is asked, and how the answer is to look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pangu.serving.chat import ChatTemplate, read_messages
from pangu.serving.engine_api import SamplingParams
from pangu.serving.fields import Fields, bad
from pangu.serving.settings import ServeSettings
from parallel.serving.errors import Refusal

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat goes on to the end of the context
_MOST_STOPS, _LONGEST_STOP = 64, 1000
_CHARACTERS_A_TOKEN = 64  # text this much longer than the context is refused before it is segmented
# vLLM's, whose answers would not be what their senders take them for
_OUTPUT_FIELDS = ("prompt_logprobs", "truncate_prompt_tokens", "allowed_token_ids", "structured_outputs", "guided_json",
                  "guided_regex", "guided_choice", "guided_grammar")
_BIAS, _PENALTY, _TEMPERATURE = 100.0, 2.0, 2.0


@dataclass(frozen=True)
class Prompt:
    """Ids, and the text that was sent or corresponds to them."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Ask:
    """One request.

    Args:
        prompts: at least one.
        params: of every sequence; its `sample` and `max_tokens` are set for each.
        stops: strings that end a text, in the tokenizer's normal form.
        n: answers for each prompt.
        best_of: sequences for each prompt, of which the `n` with the highest mean log-probability are given.
        logprobs: alternatives a token to show; None = no log-probabilities.
        echo: whether the prompt precedes its answer.
        stream: whether the answer is streamed.
        include_usage: whether a stream ends with the counts of tokens.
        as_ids: whether tokens in log-probabilities are called "token_id:N".
        chat: whether it is a chat.
    """

    prompts: list[Prompt]
    params: SamplingParams
    stops: tuple[str, ...]
    n: int = 1
    best_of: int = 1
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    as_ids: bool = False
    chat: bool = False


class Reader:
    """Reads requests for one model.

    Args:
        tokenizer: a `pangu.data.tokenizer.Tokenizer`.
        settings: bounds.
        name: what clients call the model.
        context: its positions.
    """

    def __init__(self, tokenizer: Any, settings: ServeSettings, name: str, context: int) -> None:
        self.tokenizer, self.settings, self.name, self.context = tokenizer, settings, name, context
        self.template = ChatTemplate(settings.chat_template)
        self.eos_token = "<eot>"

    def completion(self, body: Any) -> Ask:
        """The request of /v1/completions.

        Raises:
            Refusal: 400 or 404, naming the field.
        """
        fields = self._model(body)
        fields.neutral("suffix", "")
        prompts = self._prompts(fields.get("prompt"))
        n = fields.integer("n", 1, self.settings.max_sequences, 1)
        best_of = fields.integer("best_of", 1, self.settings.max_sequences, n)
        logprobs = fields.integer("logprobs", 0, self.settings.max_logprobs)
        ask = self._ask(fields, prompts, n, best_of, logprobs, fields.get("stop"))
        if ask.stream and best_of > n:
            raise bad("best_of", "cannot be streamed", best_of)
        echo = fields.flag("echo")
        params = replace(ask.params, max_tokens=self._max_tokens(fields, ("max_tokens",), prompts, DEFAULT_TOKENS),
                         prompt_logprobs=logprobs if echo else None)
        return replace(ask, echo=echo, params=params)

    def chat(self, body: Any) -> Ask:
        """The request of /v1/chat/completions.

        Raises:
            Refusal: 400 or 404, naming the field.
        """
        fields = self._model(body)
        for name in ("tools", "functions"):
            fields.neutral(name, [])
        text = self.template.render(read_messages(fields.get("messages")),
                                    fields.flag("add_generation_prompt", True), self.eos_token)
        prompts = [self._text_prompt(text, "messages")]
        alternatives = fields.integer("top_logprobs", 0, self.settings.max_logprobs)
        if alternatives is not None and not fields.flag("logprobs"):
            raise bad("top_logprobs", "needs logprobs: true", alternatives)
        n = fields.integer("n", 1, self.settings.max_sequences, 1)
        logprobs = (alternatives or 0) if fields.flag("logprobs") else None
        ask = self._ask(fields, prompts, n, n, logprobs, [*_listed(fields.get("stop")), *self.settings.chat_stop])
        params = replace(ask.params, max_tokens=self._max_tokens(
            fields, ("max_completion_tokens", "max_tokens"), prompts, self.context))
        return replace(ask, chat=True, params=params)

    def tokenize(self, body: Any) -> list[int]:
        """The ids that /tokenize answers with: of `prompt`, or of `messages` under the chat template.

        The name of the end of a document, sent alone, is its one id; inside a text it is ordinary text.
        """
        fields = Fields(body)
        if fields.get("messages") is not None:
            text = self.template.render(read_messages(fields.get("messages")),
                                        fields.flag("add_generation_prompt", True), self.eos_token)
        else:
            text = fields.text("prompt")
        if text is None:
            raise bad("prompt", "is missing", code="missing_required_parameter")
        return [self.tokenizer.eot_id] if text == self.eos_token else self.tokenizer.encode(text)

    def detokenize(self, body: Any) -> str:
        """The text of `tokens`."""
        return self.tokenizer.decode(self._ids(Fields(body).get("tokens"), "tokens", may_be_empty=True))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _model(self, body: Any) -> Fields:
        fields = Fields(body)
        name = fields.text("model")
        if name is not None and name != self.name:
            raise unknown_model(name)
        fields.text("user")
        return fields

    def _prompts(self, value: Any) -> list[Prompt]:
        if value is None:
            raise bad("prompt", "is missing", code="missing_required_parameter")
        if isinstance(value, str):
            return [self._text_prompt(value, "prompt")]
        if not isinstance(value, list) or not value:
            raise bad("prompt", "must be text, a list of texts, a list of ids or a list of lists of ids", value)
        if all(isinstance(item, str) for item in value):
            self._not_too_many(len(value), "prompt")
            return [self._text_prompt(item, f"prompt[{place}]") for place, item in enumerate(value)]
        if all(isinstance(item, list) for item in value):
            self._not_too_many(len(value), "prompt")
            return [self._id_prompt(item, f"prompt[{place}]") for place, item in enumerate(value)]
        return [self._id_prompt(value, "prompt")]

    def _not_too_many(self, sequences: int, name: str) -> None:
        if sequences > self.settings.max_sequences:
            raise bad(name, f"{sequences} sequences where a request may have {self.settings.max_sequences}",
                      code="too_many_sequences")

    def _text_prompt(self, text: str, where: str) -> Prompt:
        if len(text) > _CHARACTERS_A_TOKEN * self.context:
            raise self._too_long(where, f"{len(text)} characters")
        ids = self.tokenizer.encode(text) if text else [self.tokenizer.eot_id]  # no text: the beginning of a document
        if not ids:
            raise bad(where, "the tokenizer writes nothing of this text", text)
        return Prompt(self._fits(ids, where), text)

    def _id_prompt(self, value: list, where: str) -> Prompt:
        ids = self._fits(self._ids(value, where), where)
        return Prompt(ids, self.tokenizer.decode(ids))

    def _ids(self, value: Any, where: str, may_be_empty: bool = False) -> list[int]:
        if not isinstance(value, list) or not (value or may_be_empty):
            raise bad(where, "must be a list of ids", value)
        size = self.tokenizer.vocabulary_size
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < size:
                raise bad(where, f"ids are whole numbers from 0 to {size - 1}", item)
        return value

    def _fits(self, ids: list[int], where: str) -> list[int]:
        if len(ids) > self.context:
            raise self._too_long(where, f"{len(ids)} tokens")
        return ids

    def _too_long(self, where: str, size: str) -> Refusal:
        return Refusal(400, f"this model's maximum context length is {self.context} tokens, and the prompt has {size}; "
                       "shorten it", param=where.split("[")[0], code="context_length_exceeded")

    def _max_tokens(self, fields: Fields, names: Sequence[str], prompts: list[Prompt], default: int) -> int:
        longest = max(len(prompt.ids) for prompt in prompts)
        for name in names:
            asked = fields.integer(name, 0, 1 << 31)
            if asked is not None:
                if longest + asked > self.context:
                    raise Refusal(400, f"this model's maximum context length is {self.context} tokens; the prompt has "
                                  f"{longest} and {asked} more were asked for", param=name,
                                  code="context_length_exceeded")
                return asked
        if longest >= self.context:
            raise self._too_long("prompt" if fields.get("messages") is None else "messages", f"{longest} tokens")
        return min(default, self.context - longest)

    def _ask(self, fields: Fields, prompts: list[Prompt], n: int, best_of: int, logprobs: int | None,
             stop: Any) -> Ask:
        """What completions and chats share."""
        if best_of < n:
            raise bad("best_of", f"must be at least n, {n}", best_of)
        self._not_too_many(len(prompts) * best_of, "best_of" if best_of > n else "n" if n > 1 else "prompt")
        for name, value in (("min_p", 0), ("repetition_penalty", 1), ("min_tokens", 0), ("length_penalty", 1)):
            fields.neutral(name, value)
        for name in ("use_beam_search", "include_stop_str_in_output"):
            fields.neutral(name, False)
        fields.neutral("response_format", {"type": "text"})
        fields.neutral("bad_words", [])
        for name in _OUTPUT_FIELDS:
            fields.neutral(name)
        stream, options = fields.flag("stream"), fields.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise bad("stream_options", "must be an object", options, "invalid_type")
        if options is not None and not stream:
            raise bad("stream_options", "is for stream: true only")
        stops, stop_ids = self._stops(stop, fields.get("stop_token_ids"))
        return Ask(prompts, self._params(fields, stop_ids, logprobs), stops, n, best_of, logprobs, stream=stream,
                   include_usage=Fields(options or {}).flag("include_usage"),
                   as_ids=fields.flag("return_tokens_as_token_ids"))

    def _params(self, fields: Fields, stop_ids: tuple[int, ...], logprobs: int | None) -> SamplingParams:
        top_p, top_k = fields.number("top_p", 0.0, 1.0, 1.0), max(0, fields.integer("top_k", -1, 1 << 31, 0))
        if top_p == 0.0:  # only the likeliest is left
            top_p, top_k = 1.0, 1
        seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
        ends = () if fields.flag("ignore_eos") else (self.tokenizer.eot_id,)
        return SamplingParams(
            temperature=fields.number("temperature", 0.0, _TEMPERATURE, 1.0), top_p=top_p, top_k=top_k,
            stop_ids=(*ends, *stop_ids), seed=None if seed is None else seed % (1 << 64),
            logit_bias=self._bias(fields.get("logit_bias")),
            presence_penalty=fields.number("presence_penalty", -_PENALTY, _PENALTY, 0.0),
            frequency_penalty=fields.number("frequency_penalty", -_PENALTY, _PENALTY, 0.0), logprobs=logprobs)

    def _stops(self, stop: Any, stop_ids: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Texts in the tokenizer's normal form, and ids."""
        stop, texts = _listed(stop), []
        ids = [] if stop_ids is None else self._ids(stop_ids, "stop_token_ids", may_be_empty=True)
        if len(stop) + len(ids) > _MOST_STOPS:
            raise bad("stop", f"there may be {_MOST_STOPS} at most", stop)
        for place, item in enumerate(stop):
            if isinstance(item, str):
                if not 0 < len(item) <= _LONGEST_STOP:
                    raise bad("stop", f"a text has 1 to {_LONGEST_STOP} characters", item)
                texts += [item, self.tokenizer.normal_form(item)]
            else:
                ids = [*ids, *self._ids([item], f"stop[{place}]")]
        return tuple(dict.fromkeys(text for text in texts if text)), tuple(ids)

    def _bias(self, value: Any) -> dict[int, float]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise bad("logit_bias", "must be an object of ids and numbers", value, "invalid_type")
        if len(value) > 1024:
            raise bad("logit_bias", "has more than 1024 ids", value)
        biases = {}
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit()) or len(key) > 9 or int(key) >= self.tokenizer.vocabulary_size:
                raise bad("logit_bias", f"keys are ids from 0 to {self.tokenizer.vocabulary_size - 1}", key)
            biases[int(key)] = Fields({"logit_bias": bias}).number("logit_bias", -_BIAS, _BIAS, 0.0)
        return biases


def _listed(stop: Any) -> list:
    """`stop` as a list of texts and ids."""
    if stop is None:
        return []
    if isinstance(stop, (str, int)):
        return [stop]
    if not isinstance(stop, list):
        raise bad("stop", "must be a text, an id or a list of these", stop, "invalid_type")
    return stop


def unknown_model(name: str) -> Refusal:
    """404."""
    return Refusal(404, f"The model `{name[:200]}` does not exist", param="model", code="model_not_found")
