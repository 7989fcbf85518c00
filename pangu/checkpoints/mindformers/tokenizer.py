"""PanGu-alpha's tokenizer with MindFormers' interface."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mindformers.models.tokenization_utils import PreTrainedTokenizer

from pangu.data.tokenizer import Tokenizer


class PanGuAlphaTokenizer(PreTrainedTokenizer):
    """`pangu.data.tokenizer.Tokenizer` with MindFormers' interface; nothing is added before or after a text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    FILE_LIST = ["tokenizer_config.json"]
    _support_list: list[str] = []

    def __init__(self, vocab_file: str, unk_token: str = "<unk>", eos_token: str = "<eot>",
                 pad_token: str = "<pad>", **kwargs: Any) -> None:
        self.vocab_file, self.pangu = vocab_file, Tokenizer(vocab_file)
        super().__init__(unk_token=unk_token, eos_token=eos_token, pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces of the SentencePiece model."""
        return self.pangu.vocabulary_size

    def get_vocab(self) -> dict[str, int]:
        """Piece to id."""
        pieces = {self.pangu.id_piece(number): number for number in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.pangu.id_piece(number) for number in self.pangu.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        number = self.pangu.piece_id(token)
        return self.pangu.unknown_id if number is None else number

    def _convert_id_to_token(self, index: int) -> str:
        return self.pangu.id_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self.pangu.decode(self._convert_token_to_id(token) for token in tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the SentencePiece model."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model"
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
