#!/usr/bin/env bash
# Packs what `python -m benchmarks.gpu` needs on a GPU machine that has no network, and unpacks it
# there. README.md beside this file says what travels, and how.
set -euo pipefail

# What that machine lacks of the modules that the application imports: machine.txt has what is there.
# grain needs array-record and portpicker, tyro the two after it; tensorboardX writes the event files.
# PyTorch, which is there, needs jinja2 as well, in whatever version.
lacking=(grain array-record portpicker tyro docstring-parser typeguard tensorboardx zstandard
  jinja2 markupsafe)
# Of that machine.
version=3.12
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64
  manylinux2014_x86_64)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
pack=$root/.gpu-pack
unpacked=$root/.gpu-unpacked
data=$root/../shared/data/corpus/train.jsonl.xz
[[ -f $data ]] || data=$root/examples/flax_llama/data/austen.txt.xz
vocab_size=32000
limit=64
wheels=yes
action=pack

usage() {
  cat <<EOF
Usage: bash benchmarks/gpu/pack.sh [OPTION]...

Packs into one folder the wheels that a GPU machine lacks, and a corpus with its tokenizer.

  --unpack          unpack instead: the wheels to TO/site, the corpus to TO/tokens
  --data FILES      what to tokenize: paths and globs, separated by commas, of text or JSON lines
                    ($data)
  --vocab-size N    of the tokenizer, which is trained on it ($vocab_size)
  --no-wheels       fetch no wheels: those that are in the folder stay
  --limit MIB       how much may travel, the repository with it ($limit)
  --pack DIRECTORY  the folder ($pack)
  --to DIRECTORY    where to unpack ($unpacked)

PYTHON names the interpreter; by default that of .venv, where there is one, or python3.
EOF
}

fail() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --unpack) action=unpack ;;
    --no-wheels) wheels=no ;;
    --help | -h) usage && exit ;;
    --data | --vocab-size | --limit | --pack | --to)
      (($# > 1)) || fail "$1 needs a value."
      case $1 in
        --data) data=$2 ;;
        --vocab-size) vocab_size=$2 ;;
        --limit) limit=$2 ;;
        --pack) pack=$2 ;;
        --to) unpacked=$2 ;;
      esac
      shift
      ;;
    *) fail "$1 is no option: see --help." ;;
  esac
  shift
done

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

packed() {
  "$python" -m benchmarks.gpu.packed "$@" --pack "$pack"
}

fetch_wheels() {
  rm -rf "$pack/.wheels"
  "$python" -m pip download --quiet --disable-pip-version-check --dest "$pack/.wheels" \
    --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]/#/--platform=}" --constraint "$root/constraints.txt" "${lacking[@]}"
  rm -rf "$pack/wheels"
  mv "$pack/.wheels" "$pack/wheels"
}

tokenize() {
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "Training a tokenizer on $data"
  "$python" -m examples.flax_llama.train_tokenizer \
    --data "$data" --vocab-size "$vocab_size" --out "$work/tokenizer.json"
  "$python" -m examples.flax_llama.tokenize \
    --data "$data" --tokenizer "$work/tokenizer.json" --out "$work/tokens"
  echo "Compressing the tokens"
  packed add-corpus --tokens "$work/tokens" --data "$data" --vocab-size "$vocab_size"
}

pack() {
  mkdir -p "$pack"
  current=$(packed is-current --data "$data" --vocab-size "$vocab_size")
  if [[ $current == True ]]; then
    echo "The corpus is packed already."
  else
    tokenize
  fi
  if [[ $wheels == yes ]]; then
    fetch_wheels
  fi
  packed finish --limit "$limit"
}

unpack() {
  [[ -f $pack/manifest.json ]] ||
    fail "$pack/manifest.json does not exist: pack first, where there is a network."
  if cmp -s "$pack/manifest.json" "$unpacked/manifest.json"; then
    echo "$unpacked is unpacked already."
    return
  fi
  rm -rf "$unpacked/manifest.json" "$unpacked/site"
  mkdir -p "$unpacked/site"
  if compgen -G "$pack/wheels/*.whl" >/dev/null; then
    "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" ||
      fail "the wheels are for Python $version, and PYTHON=$python is another."
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
      --no-cache-dir --target "$unpacked/site" "$pack"/wheels/*.whl
  fi
  packed unpack-corpus --tokens "$unpacked/tokens"
  # Last, since it says that all is there.
  cp "$pack/manifest.json" "$unpacked/manifest.json"
  echo "Unpacked: PYTHONPATH=$unpacked/site for the modules, --data $unpacked/tokens for the tokens."
}

"$action"
