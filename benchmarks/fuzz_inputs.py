"""Random inputs of the search with data, what damages them, and other readings of them."""

import bz2
import gzip
import json
import lzma
import random
import struct
from collections.abc import Callable
from typing import Any

import zstandard

Random = random.Random
# Letters of one to four bytes, ends of lines of every kind, zeros, and marks of byte orders.
LETTERS = "abc xyz,.ßü€語😀\t\r\n\0\x1a\x85\u2028\ufeff\\\"'{}[]:"
PLAIN = "abc xyzßü€😀"
# What does not belong into a line of JSON, or into UTF-8.
ODD = [
    *(b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r", b"\n", b"\xed\xa0\x80"),
    *(b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"{", b"]", b'"', b"\\", b"\x1f\x8b"),
    *(b"NaN", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":' * 1200, b"\\ud83d", b"\x80" * 40),
]


def text_of(rng: Random, most: int) -> str:
    """A text of so many characters at most, the first of which is no mark of a byte order."""
    letters = rng.choices(LETTERS, k=rng.randrange(1, most))
    return ("x" if rng.random() < 0.9 else "\n") + "".join(letters)


def json_line(rng: Random, *, plain: bool = False) -> bytes:
    """A line of JSON; unless it is plain, one that may be no document."""
    text = "".join(rng.choices(PLAIN if plain else LETTERS, k=rng.randrange(40)))
    example = {"text": text, "id": rng.randrange(9)}
    if plain:
        return json.dumps(example, ensure_ascii=rng.random() < 0.5).encode() + b"\n"
    odd = [None, 1, [text], {"text": None}, {"text": [text]}, {"content": text}, text, {}]
    chosen = rng.choice(odd) if rng.random() < 0.1 else example
    line = json.dumps(chosen, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return line + rng.choice([b"\n", b"\n", b"\r\n", b"\n\n", b" \n", b"\n\t\n"])


def damaged(rng: Random, contents: bytes, how: str = "") -> bytes:
    """Other bytes: cut, with a bit flipped, with some put in, taken out, repeated or moved."""
    how = how or rng.choice(["cut", "flip", "put", "take", "repeat", "zeros", "append", "mark"])
    place = rng.randrange(len(contents) + 1)
    end = min(len(contents), place + rng.choice([1, 2, 7, 100]))
    match how:
        case "cut":
            return contents[:place]
        case "flip" if contents:
            changed = bytearray(contents)
            changed[place - 1] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case "put":
            return contents[:place] + rng.choice(ODD) + contents[place:]
        case "take":
            return contents[:place] + contents[end:]
        case "repeat":
            return contents[:end] + contents[place:]
        case "zeros":
            return contents[:place] + bytes(end - place) + contents[end:]
        case "append":
            return contents + rng.choice([*ODD, contents, rng.randbytes(20)])
        case _:
            return rng.choice(ODD[:5]) + contents


def zstd(rng: Random, contents: bytes) -> bytes:
    """A frame with a checksum, which may have a long window, and one to be skipped before it."""
    window = rng.choice([10, 20, 27, 31])
    level = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window, enable_ldm=window == 31, write_checksum=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=level).compressobj()
    skipped = struct.pack("<II", 0x184D2A50 + rng.randrange(16), 5) + b"skips"
    frame = compressor.compress(contents) + compressor.flush()
    return (skipped if rng.random() < 0.3 else b"") + frame


COMPRESS = {
    ".gz": lambda rng, contents: gzip.compress(contents, rng.randrange(1, 9)),
    ".xz": lambda rng, contents: lzma.compress(contents, preset=rng.randrange(3)),
    ".bz2": lambda rng, contents: bz2.compress(contents, rng.randrange(1, 9)),
    ".zst": zstd,
}


def reference_json(
    contents: bytes, take: Callable[[Any], Any] = lambda example: example["text"]
) -> list[tuple[int, str | None]]:
    """The numbers of all lines that are not blank, each with its text, None where it has none."""
    found: list[tuple[int, str | None]] = []
    for number, line in enumerate(contents.split(b"\n"), 1):
        if line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if not line.strip(b" \t\r\x0b\x0c"):
            continue
        try:
            text = take(json.loads(str(line, "utf-8")))
            is_text = type(text) is str and str(text.encode(), "utf-8") == text
            found.append((number, text if is_text else None))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found.append((number, None))
    return found


def reference_pair(example: Any) -> str | None:
    """A prompt and its response, one below the other."""
    prompt, response = example["prompt"] + "", example["response"] + ""
    return f"{prompt}\n{response}" if response.strip() else None


def reference_labelled(contents: bytes) -> tuple[list[tuple[str, ...]], int | None]:
    """Labels and texts, and the number of the first line that is none."""
    found: list[tuple[str, ...]] = []
    lines = contents.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            return found, number
        if text:
            parts = tuple(text.split(None, 1))
            if len(parts) < 2:
                return found, number
            found.append(parts)
    return found, None


def reference_text(contents: bytes) -> tuple[str, int | None]:
    """The text, and the number of the first line that is not UTF-8, if one is not."""
    contents = contents[3:] if contents.startswith(b"\xef\xbb\xbf") else contents
    for number, line in enumerate(contents.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return "", number
    return contents.decode(), None


def name_of_file(rng: Random) -> str:
    """The beginning of a name, with what has a meaning in globs, lists and shells."""
    letters = rng.choices("ab1[]*?,!-{}~ .#%ü€'\"$()&;=:", k=rng.randrange(1, 9))
    name = "".join(letters)
    return name if rng.random() < 0.9 else f"readme{name}"
