"""A cache method of your own: keep the tokens whose keys have the smallest L2 norm, and the newest.

Keys with a small norm tend to get much attention, whatever the query; a norm is known as soon as a
key is, so nothing has to be observed. Source: Devoto et al. 2024, https://arxiv.org/abs/2406.11430.

    python -m examples.own_policy
"""

import dataclasses

import jax
import jax.numpy as jnp

import flexijax
from flexijax.demo import document
from flexijax.policies.base import HeadGroup, Policy, PolicyState, RunSpec, Tier, Tokens


@dataclasses.dataclass(frozen=True)
class KeyNorm(Policy):
    """Keeps the `recent` newest tokens and, up to the budget, those of small key norm.

    dense_layers: so many first layers keep everything, since the rule holds less there.
    """

    recent: int = 64
    dense_layers: int = 2

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """All heads alike: tokens with limited room on the device, and no place below it."""
        if layer < self.dense_layers:
            return (HeadGroup(run.all_heads, (Tier(None),)),)
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """float32[T], the greatest stay: once after the prompt, then after every 16 tokens."""
        norm = jnp.linalg.norm(tokens.k.astype(jnp.float32), axis=-1)  # rotation keeps it
        return jnp.where(tokens.position >= tokens.length - self.recent, jnp.inf, -norm)


def main() -> None:
    lm = flexijax.load("smollm2")  # without the model: an error that names the package to install
    question = f"{document(characters=8_000)}\n\nIn one paragraph: what is argparse for?"
    assert lm.tokenizer is not None
    prompt = lm.tokenizer.chat([{"role": "user", "content": question}])
    caches = {
        "key norm": flexijax.CacheConfig(policy=KeyNorm(), budget_tokens=1024),
        "full": flexijax.CacheConfig(policy="full"),
    }
    found = flexijax.compare(lm, prompt, caches, max_new_tokens=64)
    for name, answer in found.answers.items():
        held, evicted = answer.metrics.device_kv_bytes, answer.metrics.evicted_tokens
        print(f"{name}: {held / 1e6:.0f} MB on the device, {evicted:,} tokens evicted by all heads")
        print(f"  {answer.text}\n")
    print(f"tokens of full that key norm would choose as well: {found.agreement['key norm']}")


if __name__ == "__main__":
    main()
