"""Which KV heads of a model keep choosing the same pages: the profiles and where they come from."""

from flexijax.profiles.head_profile import HeadProfile as HeadProfile
from flexijax.profiles.lookup import find as find
from flexijax.profiles.lookup import load as load
from flexijax.profiles.lookup import names as names
