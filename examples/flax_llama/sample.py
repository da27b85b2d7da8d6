"""Continues a prompt with a trained LLaMA.

python -m examples.flax_llama.sample --checkpoint runs/galore --prompt "It is a truth"
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from tokenizers import Tokenizer

from examples.flax_llama.config import LlamaConfig, UsageError
from examples.flax_llama.model import Llama


def load(checkpoint: Path) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer that `train` wrote to its `out` directory."""
    if not (checkpoint / "checkpoint").is_dir():
        raise UsageError(
            f"checkpoint={checkpoint}: expected the --out directory of a finished run."
        )
    shape = LlamaConfig(**json.loads((checkpoint / "config.json").read_text())["model"])
    abstract = nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(state)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(checkpoint.absolute() / "checkpoint", target)
    return nnx.merge(graphdef, params), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@nnx.jit
def next_token(
    model: Llama, context_S: jax.Array, length: int, temperature: float, key: jax.Array
) -> jax.Array:
    """Draws the token after the first `length` ones, int32 scalar."""
    logits_V = model(context_S[None])[0, length - 1].astype(jnp.float32)
    sampled = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, logits_V.argmax())


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The prompt and `tokens` tokens after it; a temperature of 0 takes the likeliest.

    Every token reruns the model over the last `max_seq` tokens: no cache, one compilation.
    """
    if tokens < 0 or temperature < 0:
        raise UsageError(f"tokens={tokens} and temperature={temperature} must not be negative.")
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise UsageError("prompt is empty: give at least one character to continue.")
    window = model.config.max_seq
    for key in jax.random.split(jax.random.key(seed), tokens):
        context = ids[-window:]
        # Attention is causal: what stands after the last token changes nothing.
        padded = jnp.array(context + [0] * (window - len(context)), jnp.int32)
        ids.append(int(next_token(model, padded, len(context), temperature, key)))
    return tokenizer.decode(ids)


def sample(
    checkpoint: Path,
    prompt: str = "It is a truth universally acknowledged, that",
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continues a prompt with a trained LLaMA.

    Args:
      checkpoint: the --out directory of a finished training run.
      prompt: text to continue.
      tokens: number of tokens to add.
      temperature: of the softmax; 0 always takes the likeliest token.
      seed: of the sampling.
    """
    model, tokenizer = load(checkpoint)
    return generate(model, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)


def main() -> None:
    try:
        print(tyro.cli(sample))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
