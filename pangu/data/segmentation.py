"""Chinese word segmentation whose words are jieba's on every text, ten and more times as fast.

The published vocabulary was trained on text segmented by jieba 0.42.1, so another segmentation gives other ids.
`kernels/segment.cpp` does jieba's algorithm over jieba's own dictionary and hidden Markov model, in jieba's order of
floating-point operations and with its rules for ties; it is compiled once and kept under `~/.cache`. Where no C++
compiler is found, jieba itself is used. The ready-made rjieba would not do: its model has probabilities of six
decimals, and where two cuts are closer than that it takes the other one (`常在他` is an example), and it keeps `a-b` in
one word.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import cache_folder
from parallel.common.progress import info

SPACE_MARK = "\u2582"
NEWLINE_MARK = "\u2583"

_SOURCE = Path(__file__).parents[1] / "kernels" / "segment.cpp"
# Contraction to fused operations would round otherwise than jieba does.
_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off")
_COMPILERS = ("c++", "g++", "clang++")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_HAN_FIRST, _HAN_LAST = 0x4E00, 0x9FD5

# Segmentations in which a wrong build, or a jieba with other rules, would be seen to differ.
_PROBES: dict[str, list[str]] = {
    "他来到了网易杭研大厦": ["他", "来到", "了", "网易", "杭研", "大厦"],
    "今天天气不错，张尧亭去南京市长江大桥。": ["今天天气", "不错", "，", "张尧亭", "去", "南京市", "长江大桥", "。"],
    "河间郡王常在他讲学时来听讲": ["河间", "郡王", "常", "在", "他", "讲学", "时来", "听讲"],
    "x-1.2.3%和a_b.c-d": ["x", "-", "1.2", ".", "3%", "和", "a", "_", "b", ".", "c", "-", "d"],
    "C++与AT&T的T恤\r\n 𠮷龦": ["C++", "与", "AT&T", "的", "T恤", "\r\n", " ", "𠮷", "龦"],
    "v2.0-rc.1，3.14.15": ["v2.0", "-", "rc.1", "，", "3.14", ".", "15"],
}

Cut = Callable[[str], list[str]]


class Segmenter:
    """Segments text into the words of jieba with its own dictionary and its hidden Markov model.

    Words added to jieba at run time are left out on purpose: they would change ids under a trained model.

    Args:
        engine: "auto" takes the compiled segmentation and falls back to jieba, saying so once, where it cannot be
            built; "compiled" or "jieba" insists on one.

    Raises:
        UserError: jieba is not installed, or the engine asked for is not known or cannot be had.
    """

    def __init__(self, engine: str = "auto") -> None:
        if engine not in ("auto", "compiled", "jieba"):
            raise UserError("no such segmentation engine", value=engine, hint="choose auto, compiled or jieba")
        self.engine = engine
        self._cut: Cut
        if engine != "jieba":
            try:
                self._take_compiled()
                return
            except _CannotCompile as error:
                if engine == "compiled":
                    raise UserError(f"fast segmentation cannot be used: {error}",
                                    hint="install a C++ compiler, or choose the engine jieba") from None
                _say_once(f"segmentation: {error}; using jieba, which gives the same words more slowly")
        self.engine = "jieba"
        self._cut, self._join = plain_cut(), self._join_words

    def cut(self, text: str) -> list[str]:
        """The words of `text` in order; joined, they are `text` again."""
        return self._cut(text)

    def join(self, text: str) -> bytes:
        """The words of `text` joined by single spaces, as UTF-8.

        A space within the text becomes U+2582 and a newline U+2583. A lone surrogate becomes U+FFFD.
        """
        return self._join(text)

    def _take_compiled(self) -> None:
        compiled = _compiled()
        if any(compiled.cut(text) != words for text, words in _PROBES.items()):
            raise _CannotCompile("the compiled segmentation differs from jieba 0.42.1")
        self.engine, self._cut, self._join = "compiled", compiled.cut, compiled.join

    def _join_words(self, text: str) -> bytes:
        words = [word.replace(" ", SPACE_MARK).replace("\n", NEWLINE_MARK) for word in self._cut(text)]
        return _LONE_SURROGATE.sub("\ufffd", " ".join(words)).encode()


class _CannotCompile(Exception):
    """Why the compiled segmentation cannot be had."""


class _Compiled:
    """The compiled segmentation with jieba's dictionary and model in it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, length = ctypes.c_void_p, ctypes.c_int64
        library.segment_create.restype = pointer
        library.segment_create.argtypes = [pointer, pointer, pointer, length, pointer, pointer, pointer]
        library.segment_cut.restype = library.segment_join.restype = length
        library.segment_cut.argtypes = [pointer, ctypes.c_char_p, length, pointer]
        library.segment_join.argtypes = [pointer, ctypes.c_char_p, length, pointer, pointer]
        words, frequencies = _dictionary()
        arrays = [np.frombuffer("".join(words).encode("utf-32-le"), np.uint32),
                  np.fromiter(map(len, words), np.int32), np.array(frequencies, np.int64)]
        model = _markov_model()
        self._jieba = library.segment_create(*(array.ctypes.data for array in arrays), len(words),
                                             *(array.ctypes.data for array in model))
        if not self._jieba:
            raise _CannotCompile("jieba's dictionary is larger than the compiled segmentation can hold")

    def cut(self, text: str) -> list[str]:
        ends = np.empty(len(text) + 1, np.uint32)
        ends[0] = 0
        content = text.encode("utf-32-le", "surrogatepass")
        count = self._library.segment_cut(self._jieba, content, len(text), ends.ctypes.data + 4)
        return [text[start:end] for start, end in pairwise(ends[: count + 1].tolist())]

    def join(self, text: str) -> bytes:
        ends, joined = np.empty(len(text), np.uint32), np.empty(5 * len(text), np.uint8)
        content = text.encode("utf-32-le", "surrogatepass")
        size = self._library.segment_join(self._jieba, content, len(text), ends.ctypes.data, joined.ctypes.data)
        return joined[:size].tobytes()


_shared: list[_Compiled] = []


def _compiled() -> _Compiled:
    """The one compiled segmentation of this process: the dictionary takes half a second and 60 MB."""
    if not _shared:
        try:
            _shared.append(_Compiled(ctypes.CDLL(str(_library()))))
        except OSError as error:
            raise _CannotCompile(f"the compiled segmentation does not load ({error})") from None
    return _shared[0]


def _library() -> Path:
    """The shared object, built at the first use."""
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, platform.machine())).encode()).hexdigest()[:16]
    try:
        folder = cache_folder()
    except RuntimeError:
        raise _CannotCompile("no home folder to keep the compiled segmentation in") from None
    except OSError as error:
        raise _CannotCompile(f"no place for the compiled segmentation in {error.filename}: {error.strerror}") from None
    library = folder / f"segment-{key}.so"
    if library.is_file():
        return library
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise _CannotCompile("no C++ compiler found")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / library.name
            done = subprocess.run([compiler, *_FLAGS, "-o", str(built), str(_SOURCE)],
                                  capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise _CannotCompile(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
            built.replace(library)
    except OSError as error:
        raise _CannotCompile(f"no place for the compiled segmentation in {folder}: {error.strerror}") from None
    return library


def _dictionary() -> tuple[list[str], list[int]]:
    """jieba's words and frequencies in the order of its file."""
    with _jieba().get_dict_file() as file:
        entries = [line.split(" ", 2)[:2] for line in file.read().decode("utf-8").splitlines() if line]
    return [entry[0] for entry in entries], [int(entry[1]) for entry in entries]


def _markov_model() -> list[np.ndarray]:
    """jieba's log probabilities: start [4], transition [4, 4], emission [characters, 4]; states B, E, M, S."""
    from jieba import finalseg

    start = np.array([finalseg.start_P[state] for state in "BEMS"])
    transition = np.array([[finalseg.trans_P[one].get(other, finalseg.MIN_FLOAT) for other in "BEMS"]
                           for one in "BEMS"])
    emission = np.full((_HAN_LAST - _HAN_FIRST + 1, 4), finalseg.MIN_FLOAT)
    for column, state in enumerate("BEMS"):
        for character, value in finalseg.emit_P[state].items():
            if _HAN_FIRST <= ord(character) <= _HAN_LAST:
                emission[ord(character) - _HAN_FIRST, column] = value
    return [start, transition, emission]


def plain_cut() -> Cut:
    """jieba itself: a tokenizer of its own with jieba's dictionary, loaded at the first use.

    The dictionary is read from jieba's own file rather than from the cache that jieba leaves in the folder for
    temporary files: anybody may have written there.

    Raises:
        UserError: jieba is not installed.
    """
    tokenizer = _jieba().Tokenizer()

    def cut(text: str) -> list[str]:
        if not tokenizer.initialized:
            tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
            tokenizer.initialized = True
        return tokenizer.lcut(text)

    return cut


def _jieba() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import jieba
    except ImportError:
        raise UserError("the package jieba is not installed", hint="pip install jieba==0.42.1") from None
    jieba.setLogLevel(logging.WARNING)
    return jieba


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        info(text)
