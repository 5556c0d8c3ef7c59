"""Long-context generation in JAX with FlexiCache, a two-tier, stability-aware sparse KV cache."""

from flexijax import policies as policies
from flexijax import profiles as profiles
from flexijax.compare import Answers as Answers
from flexijax.compare import compare as compare
from flexijax.config import CacheConfig as CacheConfig
from flexijax.engine.engine import Engine as Engine
from flexijax.engine.sampling import Sampling as Sampling
from flexijax.engine.stream import EngineError as EngineError
from flexijax.engine.stream import Stream as Stream
from flexijax.evaluate import evaluate as evaluate
from flexijax.evaluation import Comparison as Comparison
from flexijax.evaluation import ConfigSummary as ConfigSummary
from flexijax.evaluation import Evaluation as Evaluation
from flexijax.generate import generate as generate
from flexijax.models.checkpoint import save as save
from flexijax.models.language_model import LanguageModel as LanguageModel
from flexijax.models.load import load as load
from flexijax.profiles.head_profile import HeadProfile as HeadProfile
from flexijax.results import Generation as Generation
from flexijax.results import Metrics as Metrics
from flexijax.results import StaleProfileWarning as StaleProfileWarning
