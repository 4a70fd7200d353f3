"""What all tests share: one thread, no network, the same examples every time, and a tiny random model."""

import os
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start
# Importing litellm would fetch its price table.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

REPOSITORY = Path(__file__).parent.parent

torch.set_num_threads(1)
# A background job of a script ignores ctrl-c, and so would the commands whose interruption is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Examples derive from the test's source alone, and nothing is stored in the repository.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "ssrctl-tests-hypothesis")
hypothesis.settings.register_profile(
    "ssrctl",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("ssrctl")

TEXT = (
    "First add 12 and 30.\n12+30=42\nThen double it: 42*2=84\n\n#### 84\n"
    "Zuerst die Brüche kürzen: ½ plus ¼ ergibt ¾.\n次に、三を足す。答えは七です。\n"
    "Une étape à la fois 🙂🚀 déjà vu: naïve café\nthe answer is the answer is the answer"
)


@pytest.fixture(autouse=True)
def _no_page_at_the_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `train` and `eval` end without a page, which takes a second, unless the test is marked ``page``."""
    if request.node.get_closest_marker("page") is None:
        monkeypatch.setattr("ssrctl.stages.train.write_last_page", lambda make, page: None)
        monkeypatch.setattr("ssrctl.stages.eval.write_last_page", lambda make, page: None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: $SSRCTL_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("SSRCTL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}; set SSRCTL_DATA to it")
    return folder


@pytest.fixture(scope="session")
def bpe_tokenizer():
    """A byte-level BPE tokenizer trained on a few lines with characters of one to four bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<end>"],
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def tiny_model():
    """A random Qwen3 of 17 thousand parameters with tied embeddings, float32, in eval mode."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
    # Small random weights give flat distributions; larger ones make the tests' log-probabilities differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return model


@pytest.fixture
def tiny_loaded(tiny_model, bpe_tokenizer):
    """The tiny random model with its tokenizer, as ``load_model`` would give it."""
    from ssrctl.io.artifacts import ModelIdentity
    from ssrctl.models.loading import LoadedModel

    return LoadedModel(tiny_model, bpe_tokenizer, ModelIdentity(name="tiny", revision=None, fingerprint="x"), 128)
