"""Messages of a chat to one prompt, by a Jinja template: the form in which Hugging Face keeps chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.serving.errors import Refusal

BUILT_IN = Path(__file__).with_name("chat.jinja")
ROLES = ("system", "developer", "user", "assistant")
_MAX_BYTES = 1 << 16


class ChatTemplate:
    """A template; it sees `messages` (role, content), `add_generation_prompt` and `eos_token`.

    Args:
        path: the file; None = 问：/答： turns, which a base model that has read such text goes on with.

    Raises:
        UserError: missing, too large, or no template.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.path = Path(path) if path is not None else BUILT_IN
        if not self.path.is_file() or self.path.stat().st_size > _MAX_BYTES:
            raise UserError(f"no template file of at most {_MAX_BYTES} bytes", where="serve.chat_template",
                            value=str(self.path), hint="name a Jinja file")
        try:
            self.text = self.path.read_text(encoding="utf-8-sig").rstrip("\n")
            self._template = ImmutableSandboxedEnvironment(trim_blocks=False).from_string(self.text)
        except (UnicodeDecodeError, TemplateError) as error:
            raise UserError(f"not a template: {error}", where=self.path) from None

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True, eos_token: str = "") -> str:
        """The prompt.

        Raises:
            Refusal: 400, the template does not take these messages.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                         eos_token=eos_token)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise Refusal(400, f"the chat template does not take these messages: {error}", param="messages",
                          code="invalid_messages") from None


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages as a client sends them, to role and text.

    Raises:
        Refusal: 400, naming the message.
    """
    if not isinstance(value, list) or not value:
        raise _bad("messages", "must be a list of at least one message")
    return [_message(item, f"messages[{place}]") for place, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise _bad(where, "must be an object with role and content")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise _bad(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_text(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise _bad(f"{where}.content", "must be text")
    return {"role": role, "content": content}


def _text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _bad(where, 'this model reads text only: {"type": "text", "text": "..."}')
    return part["text"]


def _bad(where: str, what: str) -> Refusal:
    return Refusal(400, f"{where}: {what}", param=where.split("[")[0], code="invalid_value")
