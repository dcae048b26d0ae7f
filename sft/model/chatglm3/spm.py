"""A SentencePiece BPE model, read without the sentencepiece and protobuf packages, as a `tokenizers` backend.

Source: sentencepiece_model.proto (the field numbers below) and the protobuf wire format.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from sft.errors import ModelError

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece.type; 4 is user-defined, 5 unused
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
SPACE = "\u2581"


class Piece(NamedTuple):
    text: str
    score: float
    type: int


def read_pieces(path: str | Path) -> list[Piece]:
    """The pieces of a SentencePiece model in the order of their ids.

    Raises: ModelError: not a SentencePiece model, or one that `bpe_backend` would not reproduce.
    """
    pieces, trainer, normalizer = [], {}, {}
    try:
        for field, value in _fields(Path(path).read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(Piece(piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a SentencePiece model ({error!r})") from None

    fields = {
        "model_type BPE": trainer.get(3) == 2,
        "byte_fallback": trainer.get(35) == 1,
        "treat_whitespace_as_suffix off": trainer.get(24, 0) == 0,
        "no normalisation (identity)": not normalizer.get(2),
        "add_dummy_prefix": normalizer.get(3, 1) == 1,
        "remove_extra_whitespaces off": normalizer.get(4, 1) == 0,
        "escape_whitespaces": normalizer.get(5, 1) == 1,
        "one unknown piece": [piece.type for piece in pieces].count(UNKNOWN) == 1,
        "no user-defined or unused pieces": {piece.type for piece in pieces} <= {NORMAL, UNKNOWN, CONTROL, BYTE},
    }
    if missing := [name for name, found in fields.items() if not found]:
        raise ModelError(f"{path}: not a ChatGLM3 tokenizer.model, which has {', '.join(missing)}")
    return pieces


def bpe_backend(pieces: list[Piece]) -> Tokenizer:
    """Equal ids and text to the SentencePiece processor's, without special tokens or a post-processor.

    SentencePiece merges any two neighbours whose text together is a piece, best score first; `tokenizers` wants these
    pairs listed. Byte and control pieces are never merged into.
    """
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    normal = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=normal.__getitem__, reverse=True)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    unknown = next(piece.text for piece in pieces if piece.type == UNKNOWN)
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for a varint, else bytes. The last of equal fields wins."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire = key & 7
        if wire == VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if wire == BYTES:
            size, position = _varint(message, position)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number that starts at `position`, seven bits a byte, lowest first, and the position after it."""
    number = shift = 0
    while True:
        byte = message[position]
        number |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return number, position
