"""What travels to a GPU machine without a network: a folder of wheels and of a tokenized corpus.

The folder holds `wheels/`; `corpus/`, the files of the directory that the application's tokenize
command made, each compressed; and `manifest.json`, which says what they are. `pack.sh` fills and
unpacks it. Unpacking needs the standard library alone.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[2]
MANIFEST, CORPUS, WHEELS = "manifest.json", "corpus", "wheels"
MIB = 1 << 20
CHUNK = 1 << 20
# Positions of a token's bytes: the next byte is guessed from where in a token it is. Of uint16 that
# saves a tenth.
ALIGNMENT = {"uint16": 1, "uint32": 2}


class PackError(Exception):
    """What cannot be packed or unpacked."""


def read_manifest(pack: Path) -> dict:
    """What the folder holds; nothing where it says nothing."""
    path = pack / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {}


def write_manifest(pack: Path, manifest: dict) -> None:
    partial = pack / f".{MANIFEST}"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(pack / MANIFEST)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source(data: str, vocab_size: int) -> dict:
    """What the corpus is made of, by which two are the same.

    Args:
      data: files of text or JSON lines, as the application reads them.
      vocab_size: of the tokenizer that is trained on them.

    Raises:
      PackError: there is no such file.
    """
    # Not where the folder is unpacked: what these import is in the wheels.
    from examples.flax_llama.config import UsageError
    from examples.flax_llama.paths import expand

    try:
        paths = expand(data)
    except UsageError as error:
        raise PackError(str(error)) from error
    files = [{"name": p.name, "bytes": p.stat().st_size, "sha256": digest(p)} for p in paths]
    return {"files": files, "vocab_size": vocab_size}


def is_current(pack: Path, made_of: dict) -> bool:
    """Whether the folder holds the corpus of this source, whole."""
    corpus = read_manifest(pack).get("corpus", {"source": None})
    return corpus["source"] == made_of and all(
        packed_file(pack, file).is_file()
        and packed_file(pack, file).stat().st_size == file["packed_bytes"]
        for file in corpus["files"]
    )


def packed_file(pack: Path, file: dict) -> Path:
    return pack / CORPUS / f"{file['name']}.xz"


def add_corpus(pack: Path, tokens: Path, made_of: dict) -> None:
    """Compresses a directory of the tokenize command into the folder, instead of what is there."""
    meta = json.loads((tokens / "meta.json").read_text())
    manifest = read_manifest(pack)
    if manifest.pop("corpus", None) is not None:
        write_manifest(pack, manifest)
    shutil.rmtree(pack / CORPUS, ignore_errors=True)
    (pack / CORPUS).mkdir(parents=True)
    files = []
    for path in sorted(tokens.iterdir()):
        align = ALIGNMENT[meta["dtype"]] if path.name == "tokens.bin" else 0
        file = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}
        packed = packed_file(pack, file)
        compress(path, packed, align)
        files.append(file | {"packed_bytes": packed.stat().st_size})
    about = {name: meta[name] for name in ("tokens", "documents")} | {"text_bytes": meta["bytes"]}
    write_manifest(pack, manifest | {"corpus": {"source": made_of} | about | {"files": files}})


def compress(path: Path, to: Path, align: int = 0) -> None:
    """Compresses a file of items of 2 ** `align` bytes."""
    # As far back as xz looks at its highest level, but no farther than there is something.
    window = min(1 << 26, max(1 << 12, path.stat().st_size))
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9,
            "dict_size": window,
            "lc": 0 if align else 3,
            "lp": align,
            "pb": align if align else 2,
        }
    ]
    with open(path, "rb") as file, lzma.open(to, "wb", filters=filters) as out:
        shutil.copyfileobj(file, out, CHUNK)


def unpack_corpus(pack: Path, to: Path) -> None:
    """Makes the directory that the application's `--data` reads, instead of what is there.

    Raises:
      PackError: a file is missing or is not what was packed.
    """
    corpus = read_manifest(pack).get("corpus")
    if corpus is None:
        raise PackError(f"{pack / MANIFEST} names no corpus: run benchmarks/gpu/pack.sh first.")
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in corpus["files"]:
        packed, written = packed_file(pack, file), hashlib.sha256()
        try:
            with lzma.open(packed) as compressed, open(partial / file["name"], "wb") as out:
                copy(compressed, out.write, written.update)
        except (lzma.LZMAError, EOFError, OSError) as error:
            raise PackError(f"{packed} cannot be unpacked: {error}") from error
        if written.hexdigest() != file["sha256"]:
            raise PackError(
                f"{packed} holds other bytes than {MANIFEST} says: expected the SHA-256 "
                f"{file['sha256']}, got {written.hexdigest()}."
            )
    shutil.rmtree(to, ignore_errors=True)
    partial.rename(to)


def copy(file: BinaryIO | lzma.LZMAFile, *into: Callable[[bytes], object]) -> None:
    while chunk := file.read(CHUNK):
        for write in into:
            write(chunk)


def add_wheels(pack: Path) -> None:
    """Writes into the manifest what wheels there are."""
    wheels = []
    for path in sorted((pack / WHEELS).glob("*.whl")):
        name, version, *_ = path.name.split("-")
        about = {"name": name, "version": version, "bytes": path.stat().st_size}
        wheels.append(about | {"file": path.name, "sha256": digest(path)})
    write_manifest(pack, read_manifest(pack) | {"wheels": wheels})


def repository_files() -> list[Path]:
    """The files of the repository that are not ignored, committed or not.

    Raises:
      PackError: Git does not tell.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.check_output(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise PackError(
            f"{ROOT} must be a Git repository, by which the size of what travels is known: "
            f"{reason.strip()}"
        ) from error
    return [ROOT / name for name in sorted(set(listed.split("\0"))) if name]


def size(files: Iterable[Path]) -> int:
    """Bytes of the files that there are."""
    return sum(path.lstat().st_size for path in files if path.is_file())


def check_size(pack: Path, limit: float) -> str:
    """A table of what travels.

    Args:
      pack: the folder.
      limit: MiB that may travel.

    Raises:
      PackError: it is more.
    """
    manifest = read_manifest(pack)
    packed = {path.resolve() for path in pack.rglob("*") if path.is_file()}
    own = {path.resolve() for path in repository_files()} - packed
    lines = [f"{w['bytes'] / MIB:8.2f} MiB  {w['name']} {w['version']}" for w in manifest["wheels"]]
    corpus = manifest["corpus"]
    about = f"{corpus['tokens']:,} tokens of {corpus['documents']:,} documents"
    corpus_bytes = sum(file["packed_bytes"] for file in corpus["files"])
    lines.append(f"{corpus_bytes / MIB:8.2f} MiB  {about}")
    lines.append(f"{size(own) / MIB:8.2f} MiB  the repository, {len(own)} files")
    total = size(packed | own)
    lines.append(f"{total / MIB:8.2f} MiB  in all, of {limit:g}")
    if total > limit * MIB:
        raise PackError(
            f"{total / MIB:.2f} MiB would travel, and at most {limit:g} may: "
            f"{size(packed) / MIB:.2f} in {pack}, {size(own) / MIB:.2f} in the repository. "
            "Name less text with --data, or delete or ignore what is not committed."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["is-current", "add-corpus", "finish", "unpack-corpus"])
    parser.add_argument("--pack", type=Path, required=True, help="the folder")
    parser.add_argument("--data", help="files that the corpus is made of")
    parser.add_argument("--vocab-size", type=int, help="of its tokenizer")
    parser.add_argument("--tokens", type=Path, help="directory of the tokenize command")
    parser.add_argument("--limit", type=float, help="MiB that may travel")
    args = parser.parse_args()
    try:
        if args.action == "is-current":
            print(is_current(args.pack, source(args.data, args.vocab_size)))
        elif args.action == "add-corpus":
            add_corpus(args.pack, args.tokens, source(args.data, args.vocab_size))
        elif args.action == "unpack-corpus":
            unpack_corpus(args.pack, args.tokens)
        else:
            add_wheels(args.pack)
            print(check_size(args.pack, args.limit))
    except PackError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
