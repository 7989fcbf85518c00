"""Prompts from the command line, from files, and from recipes (a template, example inputs and how to decode)."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from pydantic import field_validator

from pangu.generation.settings import GenerateSettings
from parallel.common.command import own_file
from parallel.common.errors import UserError
from parallel.common.json_text import dump_json
from parallel.common.lines import text_lines
from parallel.common.settings import Settings, load_settings
from parallel.common.structured import BadText, parse_json

RECIPES = Path(__file__).parents[1] / "prompts"
_MAX_BYTES = 64 << 20


class Recipe(Settings):
    """A task written as a prompt (PanGu-alpha, section 6: generation with recipes, none of them trained for)."""

    about: str
    """What the recipe makes, in one line."""
    title: str = ""
    """Its name where people choose."""
    template: str
    """The prompt, with {names} where the inputs go; {{ and }} are braces."""
    inputs: list[dict[str, str]] = []
    """Example inputs, used when no --prompt is given."""
    generate: GenerateSettings = GenerateSettings()
    """Decoding; keys that the run's own settings name take precedence."""

    @field_validator("template")
    @classmethod
    def _readable(cls, template: str) -> str:
        if any(name is not None and not name.isidentifier() for _, name, _, _ in string.Formatter().parse(template)):
            raise ValueError("a placeholder is a plain name in braces")
        return template

    @property
    def names(self) -> list[str]:
        """Names of the inputs, in order of appearance."""
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    def fill(self, inputs: dict[str, str]) -> str:
        """The prompt for `inputs`.

        Raises:
            UserError: an input is missing or unknown.
        """
        if set(inputs) != set(self.names):
            raise UserError("the recipe's inputs are others", where="--prompt", value=", ".join(inputs) or "nothing",
                            hint=f"give {', '.join(self.names)}")
        return self.template.format(**inputs)

    def prompt(self, text: str) -> str:
        """The prompt for an input as typed: the text itself where there is one input, else a JSON object."""
        if len(self.names) == 1:
            return self.fill({self.names[0]: text})
        try:
            inputs = parse_json(text)
        except BadText:
            inputs = None
        if not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
            example = json.dumps(dict.fromkeys(self.names, "..."), ensure_ascii=False)
            raise UserError("this recipe has several inputs", where="--prompt", value=text[:40],
                            hint=f"give them as JSON: {example}")
        return self.fill(inputs)


def read_prompts(file: str | None, typed: list[str] | None, settings: GenerateSettings) -> tuple[list[str],
                                                                                                 GenerateSettings]:
    """The prompts that a command line asks for and how to decode them.

    Args:
        file: the name of a recipe (summary, question_answering, dialogue, couplet, poem) or of a file: `.yaml` recipe,
            `.jsonl` with a string or an object with `prompt` on each line, anything else one prompt per line.
        typed: prompts; together with a recipe, its inputs.
        settings: of the run.

    Raises:
        UserError: nothing to generate from, a file missing, empty, not UTF-8 or not in its format.
    """
    recipe = find_recipe(file)
    if recipe is not None:
        recipe = load_settings(Recipe, recipe)
        texts = [recipe.prompt(text) for text in typed] if typed else [recipe.fill(inputs) for inputs in recipe.inputs]
        own = {name: getattr(settings, name) for name in settings.model_fields_set}
        settings = recipe.generate.model_copy(update=own)
    else:
        texts = list(typed or []) + (_read_file(Path(file)) if file else [])
    if not texts:
        raise UserError("nothing to generate from", where="command line", hint="give --prompt TEXT or --prompts FILE")
    return texts, settings


def find_recipe(name: str | None) -> Path | None:
    """The file of a recipe given by name or path; None if `name` means something else."""
    if name is None:
        return None
    if name.endswith((".yaml", ".yml")):
        return Path(own_file(name))
    built_in = RECIPES / f"{name}.yaml"
    return built_in if name.isidentifier() and built_in.is_file() and not Path(name).exists() else None


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise UserError("no such file of prompts", where=path, hint=f"name a file or a recipe ({known})")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError("the file of prompts is too large", where=path, value=path.stat().st_size)
    lines = [(number, line) for number, line in text_lines(path, _MAX_BYTES) if line.strip()]
    if not lines:
        raise UserError("no prompt in this file", where=path)
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if ".json" in suffixes and (values := _one_value([line for _, line in lines])) is not None:
        return [_prompt_of(value, f"{path}, item {number}") for number, value in enumerate(values, 1)]
    if not suffixes & {".json", ".jsonl", ".ndjson"}:
        return [line for _, line in lines]
    return [_prompt_of(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines]


def _one_value(lines: list[str]) -> list | None:
    """The items of a file that is one JSON value, an array or a single item; None for a value a line."""
    try:
        value = parse_json("\n".join(lines))
    except BadText:
        return None
    return value if isinstance(value, list) else [value]


def _parsed(line: str, where: str) -> Any:
    try:
        return parse_json(line)
    except BadText as error:
        raise UserError(str(error), where=where, value=line[:40]) from None


def _prompt_of(value: Any, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError("neither a string nor an object with a string 'prompt'", where=where,
                        value=dump_json(value)[:40])
    return prompt
