"""The methods that drop tokens, with constants that suit budgets of 16 tokens and two layers.

Windows are the same, so that their prompts are read by the same programs.
"""

from flexijax.policies.a2sf import A2SF
from flexijax.policies.compresskv import CompressKV
from flexijax.policies.h2o import H2O
from flexijax.policies.kvcrush import KVCrush
from flexijax.policies.lacache import LaCache
from flexijax.policies.lazy_eviction import LazyEviction
from flexijax.policies.morphkv import MorphKV
from flexijax.policies.snapkv import SnapKV
from flexijax.policies.streaming_llm import StreamingLLM
from flexijax.policies.treekv import TreeKV

# Decode steps differ by whether all queries of a chunk are kept for the policy, or none are.
WATCHING = {
    "h2o": H2O(),
    "a2sf": A2SF(recent=4),
    "morphkv": MorphKV(window=4),
    "lazy_eviction": LazyEviction(threshold=0.05, recent=4),
    "treekv": TreeKV(sinks=2, window=4),
    "kvcrush": KVCrush(sinks=4, page=2, window=4),
}
PLACING = {"streaming_llm": StreamingLLM(), "lacache": LaCache()}
# Of the prompt they keep the budget, and beside it all that is generated.
GROWING = {
    "snapkv": SnapKV(window=4),
    "compresskv": CompressKV(heads=((0, 3), (2, 1)), window=4),
}
DROPPING = {**PLACING, **GROWING, **WATCHING}
