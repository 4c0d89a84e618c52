"""The transformers model against Keras, and in the hands of transformers."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import converters
import keras_bwetaf
from converters.hugging_face_folder import read_config
from converters.transformers_model.configuration_bwetaf import BwETAFConfig
from converters.transformers_model.modeling_bwetaf import (
    CACHE_NAME,
    BwETAFForCausalLM,
    BwETAFRotaryEmbedding,
)
from keras_bwetaf.layers.rotary_embedding import inverse_frequencies
from keras_bwetaf.layers.rounding import round_to
from keras_bwetaf.models.tokenizer import BwETAFTokenizer
from tests.converters.conftest import TINY
from tests.original import manager
from tests.original import tokenizer as original_tokenizer
from tests.parity import float64_logits, relative_l2

pytestmark = pytest.mark.fast

LENGTH = 512
NUM_TOKENS = 24
SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PROMPT_LENGTHS = 24, 9, 47, 3, 160  # Characters.
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    " leading, trailing  and   inner spaces \n\n\tand\r\n lines ",
    "Ἐν ἀρχῇ ἦν ὁ λόγος, Élève, où êtes-vous? naïve e\u0301 İ",
    "В начале сотворил Бог 太初有道 각 ﬁ אב हिन्दी ไทย",
    "😀👩‍👩‍👧‍👦🇫🇷 \ufeff\u200b \0 \x1b[0m",
    "one<|EOS|>two <|UK|> <|EOS|><|EOS|>",
    "<|E\u0301OS|> <|E OS|>",
    "can't WON'T 'll ' s , . ! don ' t",
    "1234567890 3.14 x" + "x" * 100,
    "",
]


def torch_folder(flax, target):
    """A Flax folder as one that transformers loads."""
    converters.convert(flax, target, to="torch", optimizer=False)
    return target


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder, dtype="float32", **arguments):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, **arguments
    )


def load_keras(folder, dtype="float32"):
    """The model of a folder that has no tokenizer."""
    with pytest.warns(UserWarning, match="has no preprocessor"):
        return keras_bwetaf.from_preset(folder, dtype=dtype)


def logits(model, token_ids, **arguments):
    with torch.no_grad():
        outputs = model(torch.as_tensor(token_ids), **arguments)
    return outputs.logits.float().numpy()


def keras_logits(lm, token_ids):
    token_ids = jnp.asarray(token_ids, "int32")
    inputs = {"token_ids": token_ids, "padding_mask": jnp.ones_like(token_ids)}
    return np.asarray(lm(inputs), "float32")


def keras_embedding(lm, token_ids):
    """What the first layer reads: rotated, rounded to bfloat16."""
    x = lm.backbone.token_embedding(jnp.asarray(token_ids, "int32"))
    x = round_to(lm.backbone.embedding_rotary(x), "bfloat16")
    return torch.from_numpy(np.array(x))


def random_ids(*shape, vocabulary=128, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, shape)


@pytest.fixture(scope="module", autouse=True)
def offline(remote_code):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(autouse=True)
def complaints():
    """transformers logs its warnings: a test fails if there was one."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@pytest.fixture
def make_folder(save_flax, tmp_path):
    """Saves a tiny model of the original as a folder for transformers."""

    def make(name="torch", **changes):
        flax = save_flax(f"flax-{name}", **{"max_len": LENGTH, **changes})
        return torch_folder(flax, tmp_path / name)

    return make


@pytest.fixture(scope="module")
def trained_folder(trained_checkpoint, tmp_path_factory):
    return torch_folder(
        trained_checkpoint, tmp_path_factory.mktemp("trained") / "torch"
    )


@pytest.fixture(scope="module")
def trained(trained_folder):
    return load(trained_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(trained_folder):
    return AutoTokenizer.from_pretrained(trained_folder, trust_remote_code=True)


# === Numbers ===


@pytest.mark.parametrize("theta", [10000.0, 500000])
@pytest.mark.parametrize("width", [1, 2, 7, 12, 33, 128, 384, 768, 2048])
def test_frequencies_are_those_of_keras(width, theta):
    rotary = BwETAFRotaryEmbedding(BwETAFConfig(rope_theta=theta), width)
    received = rotary.frequencies.float() * 2.0**-62
    expected = inverse_frequencies(width, float(theta))
    np.testing.assert_array_equal(received, expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"gqa_repeats": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"num_heads": [2, 4, 8], "num_blocks": 3}, marks=pytest.mark.slow
        ),
        {"num_heads": 5, "attention_dim": 35, "gqa_repeats": 1, "ff_dim": 47},
    ],
    ids=["plain", "one-key-head", "heads-by-layer", "odd-no-repeats"],
)
def test_float32_logits_are_those_of_keras(make_folder, changes):
    """From the embedding on; see the next test for the embedding itself."""
    folder = make_folder(**changes)
    token_ids = random_ids(2, LENGTH)
    lm = load_keras(folder)
    embedded = keras_embedding(lm, token_ids)
    expected = keras_logits(lm, token_ids)
    for attention in ("eager", "sdpa"):
        model = load(folder, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        end_to_end = relative_l2(logits(model, token_ids), expected)
        model.model.layers[0].register_forward_pre_hook(
            lambda module, inputs: (embedded, *inputs[1:])
        )
        assert relative_l2(logits(model, token_ids), expected) < 1e-5
        assert end_to_end < 5e-5


def test_embeddings_are_those_of_keras(make_folder):
    """Cosines of PyTorch and of XLA may differ in their last place.

    Once in some ten thousand numbers, that turns the rounding to bfloat16 to
    the other side, which moves the logits of a row, and of those that see
    it, by 1e-5 and more; Keras differs from Keras compiled in the same way.
    """
    folder = make_folder(attention_dim=96, num_blocks=1)
    token_ids = random_ids(8, LENGTH)
    outputs = load(folder).model(
        torch.as_tensor(token_ids), output_hidden_states=True
    )
    received = outputs.hidden_states[0]
    expected = keras_embedding(load_keras(folder), token_ids)
    differs = received != expected
    assert differs.float().mean() < 2e-4
    # Where they differ, it is by one step of bfloat16.
    steps = received.bfloat16().view(torch.int16).int()
    steps -= expected.bfloat16().view(torch.int16).int()
    assert steps.abs().max() <= 1


def test_logits_of_a_trained_model_are_those_of_keras(trained, trained_folder):
    lm = keras_bwetaf.from_preset(trained_folder, dtype="float32")
    token_ids = random_ids(2, LENGTH, vocabulary=1024)
    expected = keras_logits(lm, token_ids)
    assert relative_l2(logits(trained, token_ids), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rope_dtype", [None, "float32"])
def test_bfloat16_logits_are_as_good_as_those_of_keras(make_folder, rope_dtype):
    """Both are compared with the model in float64, with rounded angles.

    Two bfloat16 computations that round in another order are each as far
    from the exact result, about the same distance: 10% more is chance, and
    angles of the wrong dtype are several times as far.
    """
    changes = dict(dtype="bfloat16", attention_dim=64)
    folder = make_folder(**changes)
    change_config(folder, rope_dtype=rope_dtype)
    token_ids = random_ids(LENGTH)
    source = manager(**{**TINY, "max_len": LENGTH, **changes})
    exact = float64_logits(source, token_ids, rope_dtype or "bfloat16")

    model = load(folder, "bfloat16")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    received = logits(model, token_ids[None])[0]
    lm = load_keras(folder, "bfloat16")
    expected = keras_logits(lm, token_ids[None])[0]
    ours, keras = relative_l2(received, exact), relative_l2(expected, exact)
    apart = relative_l2(received, expected)
    print(rope_dtype, "ours", ours, "keras", keras, "apart", apart)
    assert ours < 1.1 * keras
    assert apart < ours + keras


def test_a_cast_leaves_the_frequencies_alone(make_folder):
    folder = make_folder()
    change_config(folder, rope_dtype="float32")
    token_ids = random_ids(2, LENGTH)
    np.testing.assert_array_equal(
        logits(load(folder).to(torch.bfloat16), token_ids),
        logits(load(folder, "bfloat16"), token_ids),
    )


# === Padding and caches ===


def test_right_padding_changes_nothing(trained):
    token_ids = random_ids(1, 48, vocabulary=1024)
    padded = np.concatenate([token_ids, np.zeros((1, 16), int)], axis=1)
    mask = torch.tensor([[1] * 48 + [0] * 16])
    received = logits(trained, padded, attention_mask=mask)[:, :48]
    assert relative_l2(received, logits(trained, token_ids)) < 1e-6


def test_left_padding_changes_nothing_when_positions_are_given(trained):
    token_ids = random_ids(1, 48, vocabulary=1024)
    padded = np.concatenate([np.zeros((1, 16), int), token_ids], axis=1)
    mask = torch.tensor([[0] * 16 + [1] * 48])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    received = logits(
        trained, padded, attention_mask=mask, position_ids=positions
    )[:, 16:]
    assert relative_l2(received, logits(trained, token_ids)) < 1e-6


def test_positions_count_from_the_start_of_the_row_by_default(trained):
    """As those of Llama do: padding counts, unless positions are given."""
    token_ids = random_ids(1, 64, vocabulary=1024)
    mask = torch.tensor([[0] * 16 + [1] * 48])
    received = logits(trained, token_ids, attention_mask=mask)[:, 16:]
    expected = logits(
        trained, token_ids[:, 16:], position_ids=torch.arange(16, 64)[None]
    )
    assert relative_l2(received, expected) < 1e-6
    elsewhere = logits(trained, token_ids[:, 16:])
    assert relative_l2(received, elsewhere) > 1e-3


def test_a_prompt_may_come_in_chunks(trained):
    token_ids = torch.as_tensor(random_ids(2, 96, vocabulary=1024))
    cache, chunks = None, []
    with torch.no_grad():
        for chunk in token_ids.split([40, 1, 50, 5], dim=1):
            outputs = trained(chunk, cache=cache, use_cache=True)
            cache = getattr(outputs, CACHE_NAME)
            chunks.append(outputs.logits.numpy())
    assert cache.get_seq_length() == 96
    received = np.concatenate(chunks, axis=1)
    assert relative_l2(received, logits(trained, token_ids)) < 1e-6


# === Generation ===


@pytest.fixture(scope="module")
def prompts(trained_documents):
    """How texts that the model has not seen begin."""
    texts = trained_documents["val"][: len(PROMPT_LENGTHS)]
    return [
        text[:length].rstrip()
        for text, length in zip(texts, PROMPT_LENGTHS, strict=True)
    ]


@pytest.fixture(scope="module")
def continuations(trained_folder, prompts):
    """What Keras generates for each prompt; it has a cache of its own."""
    lm = keras_bwetaf.from_preset(trained_folder, dtype="float32")
    texts = lm.generate(prompts, max_new_tokens=NUM_TOKENS, temperature=0)
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) > len(prompt) + NUM_TOKENS
    return texts


def test_greedy_text_is_that_of_keras(
    trained, prompts, continuations, tokenizer
):
    for prompt, expected in zip(prompts, continuations, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        made = trained.generate(
            **inputs, max_new_tokens=NUM_TOKENS, do_sample=False
        )
        assert tokenizer.decode(made[0], skip_special_tokens=True) == expected


def test_generation_does_not_need_a_cache(trained, prompts, tokenizer):
    inputs = tokenizer(prompts[0], return_tensors="pt")
    made = [
        trained.generate(
            **inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["dynamic", "static", "uncached"],
)
def test_greedy_text_of_a_batch_is_that_of_keras(
    trained, prompts, continuations, tokenizer, arguments
):
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left"
    )
    assert (inputs["attention_mask"] == 0).sum() > 20
    made = trained.generate(
        **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, **arguments
    )
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    assert texts == continuations


def test_text_generation_pipeline(trained_folder, prompts, continuations):
    pipeline = transformers.pipeline(
        "text-generation",
        model=str(trained_folder),
        trust_remote_code=True,
        dtype="float32",
    )
    made = pipeline(prompts[0], do_sample=False, max_new_tokens=NUM_TOKENS)
    assert made[0]["generated_text"] == continuations[0]


# === Tokenizer ===


def test_token_ids_and_text_are_the_same(
    tokenizer, trained_checkpoint, trained_folder, trained_documents
):
    ours = BwETAFTokenizer(trained_folder / "tokenizer.json")
    original = original_tokenizer.load(trained_checkpoint)
    for text in TEXTS + [text[:1000] for text in trained_documents["val"]]:
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text)
        assert ids == ours.tokenize(text, allowed_special="all").tolist()
        assert tokenizer.decode(ids) == original.decode(ids)
        assert tokenizer.decode(ids) == ours.detokenize(ids)
    assert len(tokenizer) == ours.vocabulary_size()
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id == ours.unk_token_id
    assert set(tokenizer("text")) == {"input_ids", "attention_mask"}


# === Files ===


def test_saved_and_loaded_again_it_is_the_same(make_folder, tmp_path):
    folder = make_folder(num_heads=[2, 4], dtype="bfloat16")
    model = load(folder, "auto")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    again, report = load(tmp_path / "saved", "auto", output_loading_info=True)
    assert not any(report.values())
    assert "transformers_modules" in type(again).__module__
    expected, received = model.state_dict(), again.state_dict()
    assert list(expected) == list(received)
    for name, tensor in expected.items():
        assert tensor.dtype == received[name].dtype == torch.bfloat16
        assert torch.equal(tensor, received[name]), name
    token_ids = random_ids(1, 16)
    np.testing.assert_array_equal(
        logits(again, token_ids), logits(model, token_ids)
    )
    assert read_config(tmp_path / "saved").items() >= (
        read_config(folder).items()
    )
    assert converters.verify(folder, tmp_path / "saved", logits=False)["same"]


def test_a_stored_head_does_no_harm(make_folder):
    folder = make_folder()
    token_ids = random_ids(1, 16)
    expected = logits(load(folder), token_ids)
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embeddings.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    np.testing.assert_array_equal(logits(model, token_ids), expected)


def test_the_model_without_its_head(make_folder):
    folder = make_folder()
    model = load(folder)
    body = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype="float32"
    )
    token_ids = torch.as_tensor(random_ids(2, 16))
    with torch.no_grad():
        states = body(token_ids, output_hidden_states=True)
        received = states.last_hidden_state @ model.lm_head.weight.T
        embedded = body(inputs_embeds=body.embed_tokens(token_ids))
    np.testing.assert_allclose(
        received, logits(model, token_ids), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(embedded.last_hidden_state, states.last_hidden_state)
    first, _, last = states.hidden_states
    assert torch.equal(first, first.bfloat16().float())
    assert torch.equal(last, states.last_hidden_state)


# === Training ===


def test_loss_and_gradients(make_folder):
    folder = make_folder()
    model = load(folder).train()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    token_ids = random_ids(2, 64)
    labels = np.where(np.arange(64) < 10, -100, token_ids)
    targets = torch.as_tensor(labels)

    def gradients():
        model.zero_grad()
        outputs = model(torch.as_tensor(token_ids), labels=targets)
        outputs.loss.backward()
        return outputs, {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
        }

    outputs, received = gradients()
    shifted = np.asarray(
        jax.nn.log_softmax(jnp.asarray(outputs.logits.detach()[:, :-1]))
    )
    chosen = np.take_along_axis(shifted, token_ids[:, 1:, None], axis=2)
    by_hand = -chosen[labels[:, 1:] != -100].mean()
    np.testing.assert_allclose(outputs.loss.item(), by_hand, rtol=1e-5)

    lm = load_keras(folder)
    values = [variable.value for variable in lm.trainable_variables]
    state = [variable.value for variable in lm.non_trainable_variables]

    def loss(values):
        inputs = {
            "token_ids": jnp.asarray(token_ids),
            "padding_mask": jnp.ones_like(token_ids),
        }
        logits, _ = lm.stateless_call(values, state, inputs)
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(
            log_probabilities, token_ids[:, 1:, None], axis=2
        )[..., 0]
        return -chosen[:, 9:].mean()

    paths = [variable.path for variable in lm.trainable_variables]
    expected = dict(zip(paths, jax.jit(jax.grad(loss))(values), strict=True))
    names = {
        tensor.keras: tensor.name
        for tensor in converters.bwetaf_v3.tensors(read_config(folder))
    }
    assert set(names) == set(expected) and set(names.values()) == set(received)
    for path, gradient in expected.items():
        # Rounding is in the way of the embeddings' gradient.
        limit = 1e-2 if "embedding" in path else 1e-5
        assert relative_l2(received[names[path]], gradient) < limit, path

    model.activation_checkpointing_enable()
    _, recomputed = gradients()
    for name, gradient in received.items():
        assert torch.equal(recomputed[name], gradient), name


def test_the_end_token_learns_as_any_other(make_folder):
    model = load(make_folder()).model
    token_ids = torch.zeros((1, 4), dtype=torch.long)
    model(token_ids).last_hidden_state.square().sum().backward()
    assert model.embed_tokens.weight.grad[0].abs().min() > 0


def test_dropout_is_after_attention_and_nowhere_else():
    layer = BwETAFForCausalLM(BwETAFConfig(**SMALL)).model.layers[0]
    assert layer.dropout.p == 0.05
    layer.dropout.p = 1.0  # Nothing of attention is left.
    x = torch.randn(1, 4, 64)
    angles = {width: (torch.ones(4, width // 2),) * 2 for width in (32, 64)}
    received = layer(x, position_embeddings=angles)
    expected = x + layer.mlp(layer.post_attention_layernorm(x))
    assert torch.equal(received, expected)


# === Configuration and initial weights ===


@pytest.mark.parametrize("deviation", [None, 0.3])
def test_initial_weights(deviation):
    config = BwETAFConfig(
        **SMALL, initializer_range=0.1, embedding_initializer_range=deviation
    )
    deviations = {"embed_tokens.weight": deviation or 64**-0.5}
    model = BwETAFForCausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            expected = deviations.get(name.removeprefix("model."), 0.1)
            np.testing.assert_allclose(
                parameter.std().item(), expected, rtol=0.1, err_msg=name
            )
    assert model.model.embed_tokens.weight[0].abs().min() > 0  # end token


def test_defaults_are_those_of_the_97m_model():
    with torch.device("meta"):
        model = BwETAFForCausalLM(BwETAFConfig())
    assert model.num_parameters() == 97_609_728
    parameters = dict(model.named_parameters())
    config = BwETAFConfig().to_dict()
    shapes = {
        tensor.name: tensor.shape
        for tensor in converters.bwetaf_v3.tensors(config)
    }
    assert shapes == {name: tuple(p.shape) for name, p in parameters.items()}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": [4]}, r"`num_attention_heads` must be.*\[4\]"),
        ({"num_key_value_heads": [2] * 3}, "`num_key_value_heads` must be an"),
        ({"num_attention_heads": 6}, "must divide.*2, 6 and 64 in layer 0"),
        ({"num_key_value_heads": [2, 3]}, "must divide.*3, 4 and 64 in layer"),
        ({"rope_dtype": "float64"}, "rope_dtype"),
    ],
)
def test_a_wrong_configuration_is_explained(changes, message):
    with pytest.raises(Exception, match=message):
        BwETAFConfig(**(SMALL | changes))


def test_inputs_are_checked():
    model = BwETAFForCausalLM(BwETAFConfig(**SMALL))
    with pytest.raises(ValueError, match="exactly one of `input_ids`"):
        model()


def test_only_wanted_logits_are_computed(trained):
    token_ids = random_ids(2, 16, vocabulary=1024)
    every = logits(trained, token_ids)
    np.testing.assert_allclose(
        logits(trained, token_ids, logits_to_keep=3), every[:, -3:], atol=1e-4
    )
    places = torch.tensor([1, 5])
    np.testing.assert_allclose(
        logits(trained, token_ids, logits_to_keep=places),
        every[:, [1, 5]],
        atol=1e-4,
    )
