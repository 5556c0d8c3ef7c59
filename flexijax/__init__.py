"""Long-context generation in JAX with FlexiCache, a two-tier, stability-aware sparse KV cache."""

from flexijax.config import CacheConfig as CacheConfig
from flexijax.profiles.head_profile import HeadProfile as HeadProfile
