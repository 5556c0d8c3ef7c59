"""Which KV heads of a model keep choosing the same pages: the profiles and where they come from."""

from flexijax.profiles.head_profile import HeadProfile as HeadProfile
