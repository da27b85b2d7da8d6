"""The cases of the search with data: each makes an input, damages it or not, and reads it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.fuzz_inputs import (
    COMPRESS,
    damaged,
    json_line,
    name_of_file,
    reference_json,
    reference_labelled,
    reference_pair,
    reference_text,
    text_of,
)
from benchmarks.fuzz_search import Wrong
from examples.flax_glue import readers
from examples.flax_llama import document_end, files, paths, tokens
from examples.flax_llama.documents import open_shards, texts
from examples.flax_llama.reading import Reading
from examples.flax_llama.tokenizer import JsonTokenizer, load_tokenizer, train_tokenizer
from examples.flax_llama.usage import UsageError
from examples.hf.tensors import open_tensors

Random = random.Random


def check_words(error: UsageError, *names: str) -> None:
    """Raises Wrong unless an error is one line that has all of these in it."""
    said = str(error)
    if "\n" in said or not said.strip():
        raise Wrong(f"an error of several lines, or none: {said!r}")
    for name in names:
        if name not in said:
            raise Wrong(f"an error without {name!r}: {said!r}")


def read_shards(data: str, reading: Reading | None = None) -> list[str]:
    return [document for document in texts(open_shards(data, reading=reading))]


def json_lines(rng: Random, directory: Path) -> None:
    """JSON lines, whole or damaged, whose bad lines are an error or are left out."""
    contents = b"".join(json_line(rng) for _ in range(rng.randrange(1, 12)))
    contents = damaged(rng, contents) if rng.random() < 0.7 else contents
    path = directory / f"a{rng.choice(['.jsonl', '.json', '.NDJSON'])}"
    path.write_bytes(contents)
    lines = reference_json(contents)
    good = [text for _, text in lines if text is not None]
    bad = [number for number, text in lines if text is None]
    skips = rng.random() < 0.5
    most = rng.randrange(4)
    reading = Reading(on_bad_line="skip", max_bad_lines=most) if skips else Reading()
    enough = len(bad) <= (most if skips else 0)
    try:
        found = read_shards(str(path), reading)
    except UsageError as error:
        if not contents:
            return check_words(error, str(path))
        if contents.startswith(tuple(files.OTHER_MARKS) + tuple(files.MAGIC)):
            return check_words(error, f"{path}, line 1:")
        if enough:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, f"{path}, line {bad[most if skips else 0]}:")
    if not enough or found != good:
        raise Wrong(f"read {found!r}, where {good!r} is right, and bad lines are {bad}")
    if skips and len(reading.bad_lines) != len(bad):
        raise Wrong(f"{len(reading.bad_lines)} lines left out, of {bad}")
    return check_positions(path, good, Reading(on_bad_line="skip", max_bad_lines=99))


def text(rng: Random, directory: Path) -> None:
    """Text in pieces, whole or damaged."""
    contents = text_of(rng, 3 * files.PIECE if rng.random() < 0.2 else 400).encode()
    contents = damaged(rng, contents) if rng.random() < 0.6 else contents
    path = directory / f"a{rng.choice(['.txt', '.text', '.MD'])}"
    path.write_bytes(contents)
    right, bad = reference_text(contents)
    try:
        found = read_shards(str(path))
    except UsageError as error:
        if not contents:
            return check_words(error, str(path))
        if contents.startswith(tuple(files.OTHER_MARKS) + tuple(files.MAGIC)):
            return check_words(error, f"{path}, line 1:")
        if bad is None:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, f"{path}, line {bad}:")
    if bad is not None or "".join(found) != right:
        raise Wrong(f"read {len(''.join(found))} characters of {len(right)}; bad is line {bad}")
    return check_positions(path, found, Reading())


def check_positions(path: Path, right: list[str], reading: Reading) -> None:
    """Reading goes on after any document."""
    places = [position for _, position in files.File(path, reading).documents()]
    for count, position in list(enumerate(places, 1))[:: max(1, len(places) // 4)]:
        rest = [each for each, _ in files.File(path, reading).documents(position)]
        if rest != right[count:]:
            raise Wrong(f"from {position} on, {rest!r}, where {right[count:]!r} is right")


def compressed(rng: Random, directory: Path) -> None:
    """A compressed file in one part or several, whole, cut, or with other bytes in it."""
    lines = [json_line(rng, plain=True) for _ in range(rng.randrange(1, 60))]
    contents = b"".join(lines)
    suffix = rng.choice(list(COMPRESS))
    cuts = sorted({0, *(rng.randrange(len(contents)) for _ in range(rng.choice([0, 0, 1, 3])))})
    parts = [contents[a:b] for a, b in zip(cuts, [*cuts[1:], len(contents)], strict=True)]
    packed = [COMPRESS[suffix](rng, part) for part in parts]
    whole = b"".join(packed)
    written = damaged(rng, whole) if rng.random() < 0.7 else whole
    path = directory / f"a.jsonl{suffix if rng.random() < 0.8 else suffix.upper()}"
    path.write_bytes(written)
    right = [text for _, text in reference_json(contents) if text is not None]
    # What is cut between two parts is whole.
    ends = np.cumsum([len(each) for each in packed]).tolist()
    cut = ends.index(len(written)) + 1 if len(written) in ends and whole.startswith(written) else 0
    try:
        found = read_shards(str(path))
    except UsageError as error:
        if written == whole:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, str(path))
    if written == whole + whole:
        right = right + right
    if cut:
        prefix = b"".join(parts[:cut])
        right = [text for _, text in reference_json(prefix) if text is not None]
    if found != right:
        raise Wrong(f"read {len(found)} documents, where {len(right)} are right")
    return None


def encodings(rng: Random, directory: Path) -> None:
    """Files of several encodings and compressions, of which one or none can be read."""
    line = json_line(rng, plain=True).decode()
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
    suffix = rng.choice(["", *COMPRESS])
    contents = (line * rng.randrange(1, 4)).encode(encoding, "replace")
    path = directory / f"a.{rng.choice(['jsonl', 'txt'])}{suffix}"
    path.write_bytes(COMPRESS[suffix](rng, contents) if suffix else contents)
    is_json = paths.is_json(path)
    lines = reference_json(contents) if is_json else []
    right, bad = reference_text(contents) if not is_json else ("", None)
    bad = next((number for number, each in lines if each is None), bad)
    if contents.startswith(tuple(files.OTHER_MARKS)):
        bad = 1
    try:
        found = read_shards(str(path))
    except UsageError as error:
        if bad is None:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, f"{path}, line {bad}:")
    if bad is not None or found != ([each for _, each in lines] if is_json else [right]):
        raise Wrong(f"read {found!r} of {encoding}")
    return None


def names(rng: Random, directory: Path) -> None:
    """Files of odd names, by themselves, in lists, through links and in directories."""
    folder = directory / f"{name_of_file(rng)}x"
    folder.mkdir()
    there = {}
    for _ in range(rng.randrange(1, 6)):
        suffix = rng.choice(["", *COMPRESS])
        name = f"{name_of_file(rng)}.{rng.choice(['jsonl', 'JSONL'])}{suffix}"
        contents = json.dumps({"text": name}).encode()
        (folder / name).write_bytes(COMPRESS[suffix](rng, contents) if suffix else contents)
        there[str(folder / name)] = name
    chosen = rng.choices(list(there), k=rng.randrange(1, 5))
    data = ",".join(chosen)
    found = read_shards(data)
    if found != [there[name] for name in chosen]:
        raise Wrong(f"{data!r} is read as {found!r}")
    visible = [there[name] for name in sorted(there, key=Path) if files_of_data(name)]
    some = [each for each in visible if each[:1] in "ab1"]
    for pattern, right in {str(folder): visible, f"{folder}/[ab1]*": some}.items():
        try:
            found = read_shards(pattern)
        except UsageError as error:
            if right:
                raise Wrong(f"refused: {error}") from error
            check_words(
                error, repr(pattern)[1:-1] if repr(pattern)[1:-1] in str(error) else pattern
            )
        else:
            if found != right:
                raise Wrong(f"{pattern} is read as {found!r}, where {right!r} is right")
    check_held_out(rng, folder, chosen)


def files_of_data(name: str) -> bool:
    return not Path(name).name.lower().startswith(paths.NO_DATA)


def check_held_out(rng: Random, folder: Path, chosen: list[str]) -> None:
    """Of a file that is named several times, no document is on both sides."""
    many = folder / "many.jsonl"
    lines = [json.dumps({"text": f"{number}"}) + "\n" for number in range(40)]
    many.write_text("".join(lines))
    link = folder / "link.jsonl"
    link.symlink_to(many)
    mentions = [*chosen, *rng.choices([str(many), str(link), f"{folder}/./many.jsonl"], k=3)]
    rng.shuffle(mentions)
    shards = open_shards(",".join(mentions))
    held_out, kept = (list(texts(shards, held_out=which)) for which in (True, False))
    if set(held_out) & {each for each in kept if each.isdecimal()}:
        raise Wrong(f"{mentions}: {held_out} are held out, and some of them are trained on")
    if {*held_out, *kept} != set(texts(shards)):
        raise Wrong(f"{mentions}: documents are lost")


def conversations(rng: Random, directory: Path) -> None:
    """Prompts with responses, whole or damaged."""
    pairs = [(text_of(rng, 20), text_of(rng, 20)) for _ in range(rng.randrange(1, 6))]
    lines = [json.dumps({"prompt": a, "response": b}) + "\n" for a, b in pairs]
    whole = "".join(lines).encode()
    contents = damaged(rng, whole) if rng.random() < 0.7 else whole
    path = directory / "a.jsonl"
    path.write_bytes(contents)
    objects = reference_json(contents, reference_pair)
    bad = next((number for number, each in objects if each is None), None)
    try:
        (shard,) = open_shards(str(path), reading=Reading(data_format="prompt"))
        found = [document.text for document, _ in shard.documents()]
    except UsageError as error:
        if bad is None and contents and not contents.startswith(tuple(files.OTHER_MARKS)):
            raise Wrong(f"refused: {error}") from error
        return check_words(error, f"{path}, line {bad or 1}:" if contents else str(path))
    if bad is not None or found != [each for _, each in objects]:
        raise Wrong(f"read {found!r}, where {objects!r} is right")
    return None


def labelled(rng: Random, directory: Path) -> None:
    """Lines of a label and a text, whole or damaged, as of a task of flax_glue."""
    said = [" ".join(text_of(rng, 20).split()) for _ in range(4)]
    whole = "".join(rng.choice("ab") + rng.choice(" \t") + f"{each}\n" for each in said).encode()
    contents = damaged(rng, whole) if rng.random() < 0.7 else whole
    path = directory / "a.txt"
    path.write_bytes(contents)
    right, bad = reference_labelled(contents)
    try:
        found = [(label, *text) for _, text, label in readers.labelled_lines(path)]
    except UsageError as error:
        if bad is None and contents:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, f"{path}, line {bad}:" if contents else str(path))
    if bad is not None or found != right:
        raise Wrong(f"read {found!r}, where {right!r} is right")
    return None


def tokenized(rng: Random, directory: Path) -> None:
    """A directory of the tokenize command of which a file is damaged, or none."""
    documents = [text_of(rng, 40) for _ in range(rng.randrange(1, 9))]
    tokenizer = train_tokenizer([], "bytes", eos=True)
    out = directory / "tokens"
    tokens.write_tokens(out, [documents], tokenizer)
    name = rng.choice([tokens.TOKENS, tokens.ENDS, "meta.json", "tokenizer.json"])
    before = (out / name).read_bytes()
    (out / name).write_bytes(after := damaged(rng, before) if rng.random() < 0.8 else before)
    try:
        found, own = tokens.load_tokens(out)
        starts = [0, *found.ends[:-1].tolist()]
        ids = [found.ids[a : b - 1] for a, b in zip(starts, found.ends, strict=True)]
    except UsageError as error:
        if after == before:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, str(out))
    if [own.decode(each) for each in ids] != documents:
        raise Wrong(f"{name} is damaged, and other documents are read")
    size = sum(len(each.encode()) for each in documents)
    if found.bytes_per_token * len(found.ids) != size:
        raise Wrong(f"{name} is damaged, and {found.bytes_per_token} bytes per token are read")
    return None


def tokenizers(rng: Random, directory: Path) -> None:
    """A tokenizer and what stands beside it, of which a file is damaged, or none."""
    whole = train_tokenizer([], "bytes", eos=True)
    whole.save(directory)
    ends = ["<|endoftext|>", "a", "</s>", None, 7, ["a"], {"content": "a"}, {"content": 3}]
    end, number = rng.choice(ends), rng.choice([97, [98, 97], "a", None, -1, 10**9, [], [None]])
    beside = {
        "tokenizer_config.json": {"eos_token": end},
        "special_tokens_map.json": {"eos_token": rng.choice(ends)},
        "generation_config.json": {"eos_token_id": number},
        "config.json": {"text_config": rng.choice([{"eos_token_id": number}, 3, None])},
    }
    for name, settings in beside.items():
        if rng.random() < 0.6:
            (directory / name).write_text(json.dumps(settings))
    chosen = rng.choice(sorted(directory.iterdir()))
    before = chosen.read_bytes()
    if rng.random() < 0.7:
        chosen.write_bytes(damaged(rng, before))
    try:
        loaded = load_tokenizer(rng.choice([directory, directory / JsonTokenizer.file_name]))
        document_end.tell_of_end(loaded, "a")
    except UsageError as error:
        named = all(is_name(each.get("eos_token")) for each in beside.values())
        if chosen.read_bytes() == before and named:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, str(directory))
    if loaded.eos_id is not None and not 0 <= loaded.eos_id < loaded.vocab_size:
        raise Wrong(f"the end is {loaded.eos_id} of {loaded.vocab_size} tokens")
    if chosen.name != JsonTokenizer.file_name or chosen.read_bytes() == before:
        said = text_of(rng, 20)
        if loaded.decode(loaded.encode(said)) != said:
            raise Wrong(f"{said!r} is read as {loaded.decode(loaded.encode(said))!r}")
    return None


def is_name(token: object) -> bool:
    """Whether that is how a file names a token, or that there is none."""
    content = token.get("content") if isinstance(token, dict) else token
    return token is None or isinstance(content, str)


def tensors(rng: Random, directory: Path) -> None:
    """A model of several files with an index, of which one is damaged, or none."""
    from safetensors.numpy import save_file

    shapes = {f"layers.{k}.weight": (rng.randrange(1, 4), rng.randrange(1, 4)) for k in range(4)}
    places = {name: f"{rng.choice('ab')}.safetensors" for name in shapes}
    for file in set(places.values()):
        own = {name: np.ones(shapes[name], np.float32) for name in shapes if places[name] == file}
        save_file(own, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    chosen = rng.choice(sorted(directory.iterdir()))
    before = chosen.read_bytes()
    if rng.random() < 0.8:
        chosen.write_bytes(damaged(rng, before))
    try:
        found = {name: each.shape for name, each in open_tensors(directory).items()}
    except UsageError as error:
        if chosen.read_bytes() == before:
            raise Wrong(f"refused: {error}") from error
        return check_words(error, str(directory))
    # A name in a header may have become another one that the index has not.
    if chosen == index and found != shapes:
        raise Wrong(f"{chosen.name} is damaged, and {found} is read")
    return None


KINDS: dict[str, Callable[[Random, Path], None]] = {
    each.__name__: each
    for each in (
        *(json_lines, text, compressed, encodings, names),
        *(conversations, labelled, tokenized, tokenizers, tensors),
    )
}
