"""One shape of command: `python -m <package> <verb> --config file.yaml key.sub=value`.

People read stderr; the last line of stdout is one JSON object with the figures. Errors that a user can cause are one
line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError, shown
from parallel.common.json_text import dump_json
from parallel.common.ownership import end_with_launcher
from parallel.common.renamed import FLAGS, VERBS
from parallel.common.settings import Settings, load_settings, reference, to_yaml

_OVERRIDE = re.compile(r"^[A-Za-z_][\w.-]*=")

_EPILOG = (
    "Keys of the config file are overridden by key.sub=value, for example train.steps=100. "
    "--print-config shows what results, --print-reference explains every key. "
    "Progress and tables go to stderr; the last line of stdout is one JSON object."
)


@dataclass(frozen=True)
class Verb:
    """A verb of a package's command line.

    Args:
        name: what the user types.
        run: `run(settings, arguments) -> dict` or its name "module:function" (imported only when the verb runs);
            `settings` is None for a verb without settings; the dict is printed as the JSON line.
        help: one line for `--help`.
        settings: the settings class or its name "module:Class"; adds `--config`, overrides, `--print-config`. A class
            with `for_file(path, overrides) -> class` chooses a narrower one by what the file says.
        arguments: `arguments(parser)` adds the verb's own flags; or its name "module:function" (imported only when the
            user types this verb).
        run_file: for verbs that take a config file of any model: adds `--config` and lets overrides through as the list
            `arguments.overrides`; `builder.load_run(arguments.config, arguments.overrides)` reads them.
        overrides: lets key.sub=value through as `arguments.overrides`, for verbs whose settings are elsewhere.
        config: the config file taken when the user names none; None = the defaults of the settings class.
        passes: what follows `--` is the list `arguments.passed`, untouched.
    """

    name: str
    run: Callable[[Any, argparse.Namespace], dict] | str
    help: str
    settings: type[Settings] | str | None = None
    arguments: Callable[[argparse.ArgumentParser], None] | str | None = None
    run_file: bool = False
    overrides: bool = False
    config: str | None = None
    passes: bool = False


def main(package: str, verbs: list[Verb], argv: list[str] | None = None) -> int:
    """Parses `argv`, runs the verb and prints its figures; returns the exit code: 0, the error's (2), or
    figures["exit_code"]."""
    if argv is None:
        argv = sys.argv[1:]
    # Before MindSpore is imported: its warnings are for its developers and would drown the command's own.
    os.environ.setdefault("GLOG_v", "3")
    end_with_launcher()
    try:
        return _main(package, verbs, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS,
                               errno.ENAMETOOLONG, errno.ELOOP):
            raise
        hint = "check the path" if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else \
            "free some space or choose another folder"
        place = shown(error.filename).strip("'") if error.filename else "output"
        print(f"error: {place}: {error.strerror}; {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _main(package: str, verbs: list[Verb], argv: list[str]) -> int:
    _refuse_old_names(package, argv)
    passed: list[str] | None = None
    if "--" in argv and any(verb.passes for verb in verbs if verb.name == argv[0]):
        argv, passed = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    parser = _parser(package, verbs, argv[0] if argv else None)
    arguments, rest = parser.parse_known_args(argv)
    arguments.passed = passed or []
    verb = next(verb for verb in verbs if verb.name == arguments.verb)
    overrides = [word for word in rest if _OVERRIDE.match(word)]
    unknown = [word for word in rest if not _OVERRIDE.match(word)]
    if unknown or (overrides and verb.settings is None and not verb.run_file and not verb.overrides):
        raise _unknown_word(parser, verb, (unknown or overrides)[0])
    arguments.overrides = overrides
    settings = None
    if verb.settings is not None:
        cls = _resolve(verb.settings)
        if hasattr(cls, "for_file"):
            cls = cls.for_file(arguments.config or own_file(verb.config), overrides)
        if arguments.print_reference:
            print(reference(cls))
            return 0
        settings = load_settings(cls, arguments.config or own_file(verb.config), overrides)
        if arguments.print_config:
            print(to_yaml(settings), end="")
            return 0
    figures = _resolve(verb.run)(settings, arguments)
    exit_code = figures.pop("exit_code", 0)
    sys.stderr.flush()
    _print_line(figures)
    return exit_code


def _print_line(figures: dict) -> None:
    """The figures as one JSON object, in ASCII where stdout has no UTF-8."""
    line = dump_json(figures)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = dump_json(figures, ascii_only=True)
    print(line, flush=True)


def _parser(package: str, verbs: list[Verb], typed: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {package}", epilog=_EPILOG, allow_abbrev=False)
    choices = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in verbs:
        sub = choices.add_parser(verb.name, help=verb.help, description=verb.help, epilog=_EPILOG, allow_abbrev=False)
        if verb.settings is not None:
            default = verb.config or "built-in defaults"
            sub.add_argument("--config", metavar="FILE", help=f"YAML file with the settings (default: {default})")
            sub.add_argument("--print-config", action="store_true", help="print the resulting settings and stop")
            sub.add_argument("--print-reference", action="store_true", help="explain every key and stop")
        if verb.run_file:
            sub.add_argument("--config", metavar="FILE", required=True, help="config file of any model")
        if verb.arguments is not None and verb.name == typed:
            _resolve(verb.arguments)(sub)
    return parser


def _refuse_old_names(package: str, argv: list[str]) -> None:
    if argv and (package, argv[0]) in VERBS:
        new = VERBS[package, argv[0]]
        raise UserError(f"the verb '{argv[0]}' is called '{new}'", where=f"python -m {package}", hint=f"type {new}")
    for word in argv[1:]:
        flag = word.partition("=")[0]
        if (package, argv[0], flag) in FLAGS:
            new = FLAGS[package, argv[0], flag]
            raise UserError(f"the flag '{flag}' is called '{new}'", where=argv[0], hint=f"type {new}")


def _unknown_word(parser: argparse.ArgumentParser, verb: Verb, word: str) -> UserError:
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sub = subparsers.choices[verb.name]
    near = difflib.get_close_matches(word.split("=")[0], list(sub._option_string_actions), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"see python -m ... {verb.name} --help"
    return UserError(f"unknown argument '{word}'", where=verb.name, hint=hint)


def own_file(name: str | None) -> str | None:
    """A file of this repository that nobody named, from whatever folder the command is typed in."""
    if name is None or Path(name).exists():
        return name
    path = Path(__file__).resolve().parents[2] / name
    return str(path) if path.exists() else name


def _resolve(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
