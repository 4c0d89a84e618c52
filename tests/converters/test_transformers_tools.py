"""The transformers model in the hands of the tools that are built on it."""

import copy

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from converters.transformers_model.configuration_bwetaf import BwETAFConfig
from converters.transformers_model.modeling_bwetaf import (
    CACHE_NAME,
    BwETAFForCausalLM,
    BwETAFModel,
    BwETAFRMSNorm,
    round_to,
)

SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
)
NUM_TOKENS = 12
# PEFT and TRL call transformers by names that it has deprecated.
OLD_NAMES = "ignore:.*gradient_checkpointing.*:FutureWarning"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BwETAFForCausalLM(BwETAFConfig(**SMALL, eos_token_id=None)).eval()


@pytest.fixture
def tokenizer():
    """Each token is its number, as a word."""
    vocabulary = {"<|EOS|>": 0} | {str(i): i for i in range(1, 511)}
    vocabulary["abcdef"] = 511  # transformers puts it before each token.
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "<|EOS|>")),
        eos_token="<|EOS|>",
        pad_token="<|EOS|>",
    )


def random_ids(*shape, seed=0):
    ids = np.random.default_rng(seed).integers(1, 512, shape)
    return torch.from_numpy(ids)


def greedy(model, token_ids, **arguments):
    """The new tokens of each row."""
    made = model.generate(
        token_ids, max_new_tokens=NUM_TOKENS, do_sample=False, **arguments
    )
    return made[:, token_ids.shape[1] :]


def relative_l2(received, expected):
    return (received - expected).norm() / expected.norm()


# === Rounding ===


def some_floats(smallest, largest):
    """Numbers of all magnitudes, halfway ones, and those before a power."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, "uint32")
    halfway = bits & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    before = bits | np.uint32(0x7FFF00)
    bits = np.concatenate([bits, halfway, before, bits & np.uint32(0xFF800000)])
    x = torch.from_numpy(bits.view("float32"))
    return x[((x.abs() >= smallest) & (x.abs() <= largest)) | (x == 0)]


@pytest.mark.parametrize(
    "dtype, smallest, largest",
    [("bfloat16", 2.0**-90, 2.0**90), ("float16", 2.0**-14, 65000.0)],
)
def test_sums_round_as_casts_do(dtype, smallest, largest):
    dtype = getattr(torch, dtype)
    x = some_floats(smallest, largest).requires_grad_()
    assert len(x) > 10_000
    received = round_to(x, dtype)
    assert torch.equal(received, x.to(dtype).float())
    received.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(round_to(x, torch.float32), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_first_norm_rounds_each_step(dtype):
    torch.manual_seed(0)
    norm = BwETAFRMSNorm(64, 1e-8, torch.bfloat16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm = norm.to(getattr(torch, dtype))
    hidden_states = torch.randn(200, 64).to(norm.weight.dtype)
    x = hidden_states.bfloat16()
    mean_square = (x * x).mean(-1, keepdim=True, dtype=torch.float32)
    x = x / (mean_square.bfloat16() + 1e-8).sqrt()
    expected = (x.float() * norm.weight.float()).to(hidden_states.dtype)
    assert torch.equal(norm(hidden_states), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("rope_dtype", [None, "bfloat16"])
def test_a_compiled_model_rounds_as_well(model, rope_dtype):
    config = BwETAFConfig(**SMALL, rope_dtype=rope_dtype)
    compiled = BwETAFForCausalLM(config).eval()
    compiled.load_state_dict(model.state_dict())
    token_ids = random_ids(2, 96)
    with torch.no_grad():
        expected = compiled(token_ids, use_cache=False).logits
        received = torch.compile(compiled, fullgraph=True)(
            token_ids, use_cache=False
        ).logits
    assert relative_l2(received, expected) < 1e-5


# === Keywords ===


def test_unknown_keywords_are_refused(model):
    token_ids = random_ids(1, 4)
    for each in (model, model.model):
        with pytest.raises(
            TypeError, match="among attention_mask, cache, "
        ) as info:
            each(token_ids, past_kv=None, cache_params=None)
        assert str(info.value).endswith("Received: cache_params, past_kv")
    with pytest.raises(ValueError, match="not used by the model.*past_kv"):
        model.generate(token_ids, past_kv=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_transformers_passes_is_accepted(model, attention):
    model.set_attn_implementation(attention)
    token_ids = random_ids(1, 4)
    expected = model(token_ids)
    received = model(
        token_ids,
        labels=token_ids,
        position_ids=torch.arange(4)[None],
        output_hidden_states=True,
        num_items_in_batch=torch.tensor(4),
        shift_labels=token_ids,
        is_causal=True,
        cu_seq_lens_q=None,
    )
    assert torch.equal(received.logits, expected.logits)
    assert len(received.hidden_states) == 3
    as_tuple = model(token_ids, return_dict=False)
    assert torch.equal(as_tuple[0], expected.logits)


# === Caches ===


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names(model, name):
    token_ids = random_ids(2, 12)
    first = model(token_ids[:, :8], use_cache=True)
    cache = getattr(first, CACHE_NAME)
    second = model(token_ids[:, 8:], **{name: cache})
    assert getattr(second, CACHE_NAME) is cache
    received = torch.cat([first.logits, second.logits], dim=1)
    assert relative_l2(received, model(token_ids).logits) < 1e-6


def test_two_caches_are_refused(model):
    cache = StaticCache(model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="only one of `cache` and `past_key"):
        model(random_ids(1, 4), cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", ["static", "uncached", "given", "assisted"])
def test_every_cache_makes_the_same_text(model, name):
    token_ids = (
        random_ids(2, 10)[:1] if name == "assisted" else random_ids(2, 10)
    )
    arguments = {
        "static": dict(cache_implementation="static"),
        "uncached": dict(use_cache=False),
        "given": {CACHE_NAME: StaticCache(model.config, max_cache_len=64)},
        "assisted": dict(prompt_lookup_num_tokens=3),
    }[name]
    expected = greedy(model, token_ids)
    assert len(set(expected[0].tolist())) > NUM_TOKENS // 2
    assert torch.equal(greedy(model, token_ids, **arguments), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_changes_no_text(model, cache):
    token_ids = random_ids(3, 12)
    mask = torch.ones_like(token_ids)
    mask[1, :5] = mask[2, :9] = 0
    received = greedy(
        model, token_ids, attention_mask=mask, cache_implementation=cache
    )
    for row, row_mask, text in zip(token_ids, mask, received, strict=True):
        assert torch.equal(greedy(model, row[row_mask == 1][None])[0], text)


def test_a_cache_is_dropped_where_layers_are_recomputed(model):
    """Or each token would be in it twice."""
    model.train()
    model.activation_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    outputs = model(random_ids(1, 8), labels=random_ids(1, 8), cache=cache)
    outputs.loss.backward()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "attention", [pytest.param("sdpa", marks=pytest.mark.slow), "eager"]
)
def test_continuous_batching_makes_the_same_text(model, attention):
    model.set_attn_implementation(attention)
    prompts = [random_ids(length).tolist() for length in (3, 17, 9)]
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(
            max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1
        ),
        # By default, its cache takes most of the free memory.
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=64
        ),
    )
    received = [outputs[name].generated_tokens for name in sorted(outputs)]
    model.set_attn_implementation(attention)
    expected = [
        greedy(model, torch.tensor([prompt]))[0].tolist() for prompt in prompts
    ]
    assert sorted(received) == sorted(expected)


def test_continuous_batching_is_refused_with_heads_by_layer():
    config = BwETAFConfig(**SMALL | {"num_attention_heads": [2, 4]})
    model = BwETAFForCausalLM(config).eval()
    with pytest.raises(
        ValueError, match=r"Use `generate`.*heads=\[2, 4\], num_k"
    ):
        model.generate_batch(inputs=[[1, 2]])


# === Exports ===


def test_torch_export(model):
    length = torch.export.Dim("length", min=2, max=128)
    exported = torch.export.export(
        model,
        (random_ids(2, 8),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )
    token_ids = random_ids(2, 33, seed=1)
    received = exported.module()(token_ids, use_cache=False).logits
    assert relative_l2(received, model(token_ids).logits) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_onnx_export(model, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits().eval(),
        (random_ids(2, 8),),
        path,
        dynamo=True,
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2)}},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    token_ids = random_ids(2, 33, seed=1)
    (received,) = session.run(None, {"input_ids": token_ids.numpy()})
    expected = model(token_ids).logits
    assert relative_l2(torch.from_numpy(received), expected) < 1e-5


# === Training ===


def examples(count):
    return [
        {"input_ids": ids, "labels": ids}
        for ids in random_ids(count, 16).tolist()
    ]


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def arguments(folder, kind=TrainingArguments, **changes):
    return kind(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **changes,
    )


def assert_learned(trainer):
    losses = [
        each["loss"] for each in trainer.state.log_history if "loss" in each
    ]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}])
def test_trainer(model, tmp_path, changes):
    pytest.importorskip("accelerate")
    trainer = Trainer(
        model,
        arguments(tmp_path, **changes),
        train_dataset=examples(8),
        eval_dataset=examples(4),
        data_collator=collate,
    )
    trainer.train()
    assert_learned(trainer)
    assert set(trainer.evaluate()) >= {"eval_loss"}
    assert trainer.predict(examples(4)).predictions.shape == (4, 16, 512)


@pytest.mark.filterwarnings(OLD_NAMES)
def test_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    base = copy.deepcopy(model)
    token_ids = random_ids(2, 10)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]
    )
    adapted = peft.get_peft_model(model, settings)
    trainer = Trainer(
        adapted,
        arguments(tmp_path),
        train_dataset=examples(8),
        data_collator=collate,
    )
    trainer.train()
    text = greedy(adapted.eval(), token_ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(greedy(loaded, token_ids), text)
    merged = loaded.merge_and_unload()
    assert torch.equal(greedy(merged, token_ids), text)


@pytest.mark.filterwarnings(OLD_NAMES)
def test_trl(model, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    trainer = trl.SFTTrainer(
        model,
        arguments(tmp_path, trl.SFTConfig, max_length=16),
        train_dataset=datasets.Dataset.from_list(examples(8)),
        processing_class=tokenizer,
    )
    trainer.train()
    assert_learned(trainer)


def test_stop_strings(model, tokenizer):
    token_ids = random_ids(1, 10)
    (text,) = greedy(model, token_ids).tolist()
    stop = str(text[4])
    (stopped,) = greedy(
        model, token_ids, tokenizer=tokenizer, stop_strings=[stop]
    ).tolist()
    end = next(i for i, token in enumerate(text, 1) if stop in str(token))
    assert stopped == text[:end]


# === Servers ===


@pytest.fixture
def attention_with_its_own_cache():
    """Registers attention as vLLM does: rows are flat, masks are its own."""
    cache, calls = {}, []

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        attention_instances=None,
        **kwargs,
    ):
        calls.append((attention_mask, attention_instances))
        past = cache.get(module.layer_idx)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        cache[module.layer_idx] = key, value
        length, slots = query.shape[2], key.shape[2]
        mask = torch.ones(length, slots, dtype=torch.bool)
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask.tril(slots - length),
            scale=scaling,
            enable_gqa=True,
        )
        return output.transpose(1, 2).reshape(1, length, -1), None

    ALL_ATTENTION_FUNCTIONS.register("of_a_server", attention)
    yield calls
    del ALL_ATTENTION_FUNCTIONS._global_mapping["of_a_server"]


def test_the_form_that_vllm_asks_for(model, attention_with_its_own_cache):
    config = copy.deepcopy(model.config)
    config._attn_implementation = "of_a_server"
    with torch.device("meta"):
        body = BwETAFModel(config)
    assert body._supports_attention_backend
    for layer in body.layers:
        assert layer.self_attn.is_causal
        assert layer.self_attn.layer_idx is not None
    body = BwETAFModel(config).eval()
    body.load_state_dict(model.model.state_dict())
    token_ids = random_ids(1, 40)
    states = []
    for start, end in ((0, 30), (30, 31), (31, 40)):
        states += body(
            input_ids=token_ids[:, start:end],
            position_ids=torch.arange(start, end)[None],
            use_cache=False,
            attention_instances={0: 1},
            return_dict=False,
        )
    received = model.lm_head(torch.cat(states, dim=1))
    assert relative_l2(received, model(token_ids).logits) < 1e-6
    assert attention_with_its_own_cache == [(None, {0: 1})] * 6
    with pytest.raises(TypeError, match="Received: attention_instance$"):
        body(token_ids, attention_instance=None)
