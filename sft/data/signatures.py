"""Signatures of texts: of two that are nearly the same, most bytes are.

A signature has 64 bytes: the lowest byte of each of 64 MinHashes of the text's 5-grams of characters (b-bit minwise
hashing, Li and König 2010). The share of bytes that two of them have alike, less what chance gives, estimates the
Jaccard similarity of the texts' 5-grams, with a standard deviation of 0.05 where that is 0.8.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from rensa import RMinHash

from sft.data.conversation import Message

SIGNATURE_BYTES = 64
NGRAM = 5  # characters
SEED = 0
CHARACTERS = 2**18  # of texts that are hashed at once, if more than one; each takes 24 bytes meanwhile


def text_of(messages: Sequence[Message]) -> str:
    """What is said in a conversation; system prompts apart, which all rows of a file may share."""
    return "\n".join(message.get("content") or "" for message in messages if message["role"] != "system")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint8, (texts, SIGNATURE_BYTES)."""
    parts = [np.zeros((0, SIGNATURE_BYTES), np.uint8)]
    for some in _slices(texts):
        hashes, offsets = _ngram_hashes(some)
        digests = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SIGNATURE_BYTES, SEED).to_rows()
        parts.append(np.array(digests, np.uint32).astype(np.uint8))  # the lowest byte
    return np.concatenate(parts)


def similarity(equal_bytes: np.ndarray) -> np.ndarray:
    """The Jaccard similarity estimated from how many bytes two signatures have alike: one in 256 is so by chance."""
    return np.maximum(0, (equal_bytes / SIGNATURE_BYTES - 1 / 256) / (1 - 1 / 256))


def _slices(texts: Sequence[str]) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for text in texts:
        if some and size + len(text) > CHARACTERS:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def _ngram_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all 5-grams, uint64, one text after another; where each text's begin, and the end of all.

    "abcdef", "ghijk" -> of abcde, bcdef, ghijk; 0, 2, 3. A shorter text is filled up with zeros to one 5-gram.
    """
    padded = [text.ljust(NGRAM, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32)
    ends = np.cumsum([len(text) for text in padded])
    hashes = np.zeros(len(codes) - NGRAM + 1, np.uint64)
    for k in range(NGRAM):
        hashes *= np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing, modulo 2**64
        hashes += codes[k : k + len(hashes)]
    hashes ^= hashes >> np.uint64(32)
    within = np.ones(len(codes), bool)  # an n-gram that begins in the last four characters runs into the next text
    for k in range(1, NGRAM):
        within[ends - k] = False
    counts = np.array([len(text) - NGRAM + 1 for text in padded])
    return hashes[within[: len(hashes)]], np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
