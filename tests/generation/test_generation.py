"""What `generate` and `stream` promise, on a model with random weights."""

import math
import re

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np
import pytest

from keras_bwetaf import BwETAFCausalLM
from keras_bwetaf.generation.generation import (
    Generation,
    cache_bucket,
    prompt_bucket,
    shorter_prompts,
)
from keras_bwetaf.generation.request import fit_to_context, make_request
from keras_bwetaf.generation.sampling import SamplingSettings
from keras_bwetaf.generation.streaming import TextStream
from tests import parity
from tests.generation.conftest import CONTEXT, TEXTS

PROMPT = "In the beginning"
PROMPTS = [PROMPT, "stars", "The night sky is full of light; who can count?"]


def full_logits(lm, token_ids):
    token_ids = np.atleast_2d(token_ids)
    mask = np.ones_like(token_ids)
    return np.asarray(lm({"token_ids": token_ids, "padding_mask": mask}))


def greedy_by_full_passes(lm, prompt, count):
    """The slow way: a whole forward pass for each new token."""
    row = list(lm.preprocessor.tokenizer(prompt))
    for _ in range(count):
        padded = np.zeros((1, 64), "int32")
        padded[0, : len(row)] = row
        mask = (np.arange(64)[None] < len(row)).astype("int32")
        logits = lm({"token_ids": padded, "padding_mask": mask})
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    return row


@pytest.mark.slow
def test_prefix_is_not_changed_by_what_follows(lm):
    token_ids = np.random.default_rng(0).integers(1, 300, (2, 200))
    whole = full_logits(lm, token_ids)
    for length in (1, 64, 199):
        prefix = full_logits(lm, token_ids[:, :length])
        assert parity.relative_l2(prefix, whole[:, :length]) < 1e-5


def test_cached_decoding_equals_the_full_pass_at_every_step(lm):
    token_ids = np.random.default_rng(0).integers(1, 300, (2, 100))
    whole = full_logits(lm, token_ids)
    slots = 128
    cache = lm.backbone.make_cache(2, slots)

    @jax.jit
    def step(token, cache, i):
        hidden_states, cache = lm.backbone.hidden_states(
            token,
            cache=cache,
            cache_index=i,
            positions=jnp.full((2, 1), i),
            attention_mask=jnp.broadcast_to(
                jnp.arange(slots) <= i, (2, 1, slots)
            ),
        )
        return lm.backbone.head(hidden_states)[:, 0], cache

    for i in range(100):
        logits, cache = step(token_ids[:, i : i + 1], cache, i)
        assert parity.relative_l2(logits, whole[:, i]) < 1e-5


def test_greedy_equals_full_passes(lm):
    row = greedy_by_full_passes(lm, PROMPT, 20)
    prompt = lm.preprocessor.tokenizer(PROMPT)
    expected = lm.preprocessor.tokenizer.detokenize(row[len(prompt) :])
    made = lm.generate(
        PROMPT, max_new_tokens=20, temperature=0, strip_prompt=True
    )
    assert made == expected


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 5}])
def test_batch_equals_single(lm, sampling):
    batch = lm.generate(PROMPTS, max_new_tokens=40, **sampling)
    single = [
        lm.generate(prompt, max_new_tokens=40, **sampling) for prompt in PROMPTS
    ]
    assert batch == single
    assert all(
        text.startswith(prompt)
        for text, prompt in zip(batch, PROMPTS, strict=True)
    )
    assert len(set(batch)) == 3


def test_padded_equals_unpadded(lm):
    """The same prompt in a bucket twice as long, for another's sake."""
    long = " ".join([TEXTS[0]] * 8)
    assert len(lm.preprocessor.tokenizer(long)) > 64
    both = lm.generate([PROMPT, long], max_new_tokens=40, seed=5)
    assert both[0] == lm.generate(PROMPT, max_new_tokens=40, seed=5)


@pytest.mark.parametrize(
    "tokens_per_dispatch", [1, 3, 8, 100, 2**31 - 1, 10**30]
)
def test_streamed_equals_generated(lm, tokens_per_dispatch):
    for prompt in PROMPTS:
        arguments = dict(max_new_tokens=50, seed=3, temperature=1.5)
        pieces = list(
            lm.stream(
                prompt, tokens_per_dispatch=tokens_per_dispatch, **arguments
            )
        )
        text = lm.generate(prompt, strip_prompt=True, **arguments)
        assert "".join(pieces) == text
        assert all(pieces)
        if tokens_per_dispatch == 1:
            assert len(pieces) > 20


def test_same_seed_same_text(lm):
    def generate(seed):
        return lm.generate(
            [PROMPT] * 3, max_new_tokens=30, seed=seed, temperature=3.0
        )

    assert generate(1) == generate(1)
    assert generate(1) != generate(2)
    assert len(set(generate(1))) == 1
    different = generate([1, 2, 3])
    assert len(set(different)) == 3
    assert generate([3, 1, 2]) == [different[i] for i in (2, 0, 1)]
    # Without a seed, every row gets another one, from NumPy's state.
    np.random.seed(0)
    unseeded = generate(None)
    assert len(set(unseeded)) == 3
    assert generate(None) != unseeded
    np.random.seed(0)
    assert generate(None) == unseeded


def test_second_call_compiles_nothing(fresh_lm):
    lm = fresh_lm
    lm.generate(PROMPT, max_new_tokens=20)
    decoder = lm.generate_function
    sizes = decoder._prefill._cache_size(), decoder._decode._cache_size()
    assert sizes == (1, 1)
    lm.generate("stars", max_new_tokens=20)
    lm.generate(PROMPT * 3, max_new_tokens=31, temperature=0.1, top_k=4)
    lm.generate(PROMPT, max_length=33, top_p=1.0, seed=3, temperature=0)
    lm.generate(PROMPT * 2, max_length=33)
    lm.generate(PROMPT, max_new_tokens=20, stop_token_ids=[1, 2, 3])
    lm.generate(PROMPT, max_new_tokens=20, stop_strings=["xyz"])
    list(lm.stream(PROMPT, max_new_tokens=20, min_p=0.1))
    for kind in (int, np.int64, np.uint8, jnp.int32):
        for _ in lm.stream(
            PROMPT,
            max_new_tokens=kind(20),
            tokens_per_dispatch=kind(3),
            seed=kind(1),
            temperature=jnp.float32(0.5),
        ):
            pass
    assert lm.generate_function is decoder
    sizes = decoder._prefill._cache_size(), decoder._decode._cache_size()
    assert sizes == (1, 1)


@pytest.mark.slow
def test_stop_tokens_are_matched_in_new_tokens_only(lm):
    tokenizer = lm.preprocessor.tokenizer
    arguments = dict(max_new_tokens=30, temperature=0, strip_prompt=True)
    text = lm.generate(PROMPT, stop_token_ids=None, **arguments)
    prompt = tokenizer(PROMPT)
    made = greedy_by_full_passes(lm, PROMPT, 30)[len(prompt) :]
    stop = made[10]
    end = made.index(stop)
    stopped = lm.generate(PROMPT, stop_token_ids=[stop], **arguments)
    assert stopped == tokenizer.detokenize(made[:end])
    assert text.startswith(stopped) and len(stopped) < len(text)
    # A stop token in the prompt stops nothing.
    assert prompt[0] not in made
    assert text == lm.generate(PROMPT, stop_token_ids=prompt[:1], **arguments)
    # One row stops, the other goes on.
    other = lm.generate("stars", stop_token_ids=[stop], **arguments)
    assert [stopped, other] == lm.generate(
        [PROMPT, "stars"], stop_token_ids=[stop], **arguments
    )


def test_end_token_stops_and_is_not_shown(lm):
    tokenizer = lm.preprocessor.tokenizer
    embeddings = lm.backbone.token_embedding.embeddings.numpy()
    made = greedy_by_full_passes(lm, PROMPT, 5)[-5:]
    # The end token becomes likelier than the one that would come third.
    changed = embeddings.copy()
    changed[tokenizer.end_token_id] = 1.5 * embeddings[made[2]]
    lm.backbone.token_embedding.embeddings.assign(changed)
    try:
        arguments = dict(max_new_tokens=30, temperature=0, strip_prompt=True)
        text = lm.generate(PROMPT, **arguments)
        going_on = lm.generate(PROMPT, stop_token_ids=None, **arguments)
    finally:
        lm.backbone.token_embedding.embeddings.assign(embeddings)
    assert text == tokenizer.detokenize(made[: made.index(made[2])])
    assert going_on.startswith(text) and len(going_on) > len(text)
    assert tokenizer.end_token not in going_on


def test_ids_beyond_the_vocabulary_have_no_text(lm):
    tokenizer = lm.preprocessor.tokenizer
    size = tokenizer.vocabulary_size()
    stream = TextStream(tokenizer, [], [])
    assert stream.push([size, 40, size + 5], final=True) == (
        tokenizer.detokenize([40])
    )


def test_stop_strings(lm):
    arguments = dict(max_new_tokens=60, seed=3, strip_prompt=True)
    text = lm.generate(PROMPT, **arguments)
    stop = text[20:24]
    expected = text[: text.index(stop)]
    assert lm.generate(PROMPT, stop_strings=stop, **arguments) == expected
    assert (
        lm.generate(PROMPT, stop_strings=["no such", stop], **arguments)
        == expected
    )
    arguments.pop("strip_prompt")
    pieces = lm.stream(
        PROMPT, stop_strings=stop, tokens_per_dispatch=1, **arguments
    )
    assert "".join(pieces) == expected
    # In the prompt, it stops nothing.
    assert lm.generate(PROMPT, stop_strings=PROMPT, **arguments) == (
        PROMPT + text
    )


@pytest.mark.parametrize("tokens_per_push", [1, 2, 5, 100])
def test_stop_strings_do_not_depend_on_the_pieces(lm, tokens_per_push):
    """One stop string may hold another: the first to be complete counts."""
    tokenizer = lm.preprocessor.tokenizer
    ids = [tokenizer.tokenize(c)[0] for c in "the abcd xyz"]
    stream = TextStream(tokenizer, ["abcd", "bc"], [])
    text = "".join(
        stream.push(ids[i : i + tokens_per_push])
        for i in range(0, len(ids), tokens_per_push)
    )
    assert text == "the a" and stream.stopped


def test_cache_is_no_larger_than_needed():
    def slots(prompt, **arguments):
        arguments = {"max_new_tokens": None, "max_length": None, **arguments}
        _, _, longest = fit_to_context(
            [[1] * prompt], context=2048, truncation=None, **arguments
        )
        return cache_bucket(prompt_bucket(prompt) + longest)

    assert slots(32, max_new_tokens=256) == 320
    assert slots(2, max_length=2048) == 2560
    assert slots(1100, max_length=2048) == 2560
    # Any prompt of the same bucket needs the same size.
    assert slots(2, max_length=2048) == slots(32, max_length=2048)
    assert slots(1025, max_length=2048) == slots(1536, max_length=2048)
    assert slots(1537, max_length=2048) == slots(2047, max_length=2048)


def test_lengths(lm):
    tokenizer = lm.preprocessor.tokenizer
    prompt = tokenizer(PROMPT)

    def count(**arguments):
        made = lm.generate(
            {"token_ids": [prompt], "padding_mask": [[1] * len(prompt)]},
            stop_token_ids=None,
            **arguments,
        )
        return int(made["padding_mask"].sum()) - len(prompt)

    preprocessor = lm.preprocessor
    lm.preprocessor = None
    try:
        for wanted in (1, 2, 63, 64, 65, 130):
            assert count(max_new_tokens=wanted) == wanted
        assert count(max_length=len(prompt) + 7) == 7
        assert count(max_length=CONTEXT) == CONTEXT - len(prompt)
    finally:
        lm.preprocessor = preprocessor


def test_default_length_is_that_of_the_preprocessor(lm):
    lm.preprocessor.sequence_length = 30
    try:
        text = lm.generate(PROMPT, seed=1)
        assert text == lm.generate(PROMPT, seed=1, max_length=30)
    finally:
        lm.preprocessor.sequence_length = CONTEXT


def test_token_ids_without_a_preprocessor(lm):
    bare = BwETAFCausalLM(lm.backbone)
    inputs = lm.preprocessor.generate_preprocess(PROMPTS, sequence_length=40)
    made = bare.generate(inputs, stop_token_ids=None, temperature=0)
    assert made["token_ids"].shape == (3, 40)
    assert made["padding_mask"].all()
    texts = lm.generate(
        PROMPTS, max_length=40, temperature=0, stop_token_ids=None
    )
    again = lm.preprocessor.tokenizer.detokenize(made["token_ids"].tolist())
    assert again == texts
    new = bare.generate(
        inputs, stop_token_ids=None, temperature=0, strip_prompt=True
    )
    num_new = new["padding_mask"].sum(axis=1)
    assert (num_new == 40 - inputs["padding_mask"].sum(axis=1)).all()


def test_datasets_of_token_ids(lm):
    """Batches of different widths are padded to the widest."""
    import tensorflow as tf

    bare = BwETAFCausalLM(lm.backbone)

    def rows():
        for width, length in ((8, 2), (16, 9)):
            ids = np.full((1, width), 7, "int32")
            mask = (np.arange(width) < length).astype("int32")[None]
            yield {"token_ids": ids, "padding_mask": mask}

    spec = tf.TensorSpec((1, None), "int32")
    dataset = tf.data.Dataset.from_generator(
        rows, output_signature={"token_ids": spec, "padding_mask": spec}
    )
    arguments = dict(stop_token_ids=None, temperature=0)
    made = bare.generate(dataset, **arguments)
    assert made["padding_mask"].sum(axis=1).tolist() == [8, 16]
    made = bare.generate(dataset, max_new_tokens=9, **arguments)
    assert made["padding_mask"].sum(axis=1).tolist() == [11, 18]


def test_tf_dataset(lm):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(PROMPTS).batch(2)
    arguments = dict(max_new_tokens=10, temperature=0)
    assert lm.generate(dataset, **arguments) == lm.generate(
        PROMPTS, **arguments
    )
    assert lm.generate(tf.constant(PROMPTS), **arguments) == lm.generate(
        PROMPTS, **arguments
    )
    # A seed for each prompt, and not for each of a batch.
    assert len(PROMPTS) % 2
    arguments = dict(max_new_tokens=10, seed=[*range(len(PROMPTS))])
    assert lm.generate(dataset, **arguments) == lm.generate(
        PROMPTS, **arguments
    )
    with pytest.raises(ValueError, match=f"of the {len(PROMPTS)} prompts"):
        lm.generate(dataset, max_new_tokens=10, seed=[1, 2])


def test_truncation(lm):
    tokenizer = lm.preprocessor.tokenizer
    long = " ".join(TEXTS * 2)
    ids = tokenizer(long)
    assert len(ids) > CONTEXT
    with pytest.raises(ValueError, match="Prompt 0 has .* leaves no room"):
        lm.generate(long, max_new_tokens=20)
    kept = tokenizer.detokenize(ids[-(CONTEXT - 20) :])
    arguments = dict(max_new_tokens=20, seed=1, strip_prompt=True)
    assert lm.generate(long, truncation="left", **arguments) == lm.generate(
        kept, **arguments
    )
    pieces = lm.stream(long, truncation="left", max_new_tokens=20, seed=1)
    assert "".join(pieces) == lm.generate(kept, **arguments)


def test_card_settings_are_the_default(fresh_lm):
    config = fresh_lm.sampler.get_config()
    assert (config["temperature"], config["top_p"]) == (0.8, 0.92)


def test_sampler_of_keras_hub(fresh_lm):
    greedy = fresh_lm.generate(PROMPT, max_new_tokens=20, temperature=0)
    fresh_lm.compile(sampler="greedy")
    assert fresh_lm.generate(PROMPT, max_new_tokens=20) == greedy


def test_sampler_of_the_user(fresh_lm):
    """Its random state goes on from call to call, and can be set back."""

    class Sharpened(keras_hub.samplers.Sampler):
        def __init__(self):
            super().__init__(temperature=10.0)
            self.generator = keras.random.SeedGenerator(1)

        def get_next_token(self, probabilities):
            logits = 1.5 * keras.ops.log(probabilities)
            token = keras.random.categorical(logits, 1, seed=self.generator)
            return token[:, 0]

    lm = fresh_lm
    sampler = Sharpened()
    lm.compile(sampler=sampler)
    arguments = dict(max_new_tokens=20, strip_prompt=True)
    start = sampler.generator.state.numpy()
    texts = [lm.generate(PROMPT, **arguments) for _ in range(3)]
    assert len(set(texts)) == 3
    sampler.generator.state.assign(start)
    assert "".join(lm.stream(PROMPT, max_new_tokens=20)) == texts[0]
    assert lm.generate(PROMPT, **arguments) == texts[1]
    assert lm.generate_function._decode._cache_size() == 1
    with pytest.raises(ValueError, match="settings can't be changed in a"):
        lm.generate(PROMPT, max_new_tokens=5, temperature=0.5)


def test_interrupt_leaves_the_sampler_usable(fresh_lm, monkeypatch):
    lm = fresh_lm
    sampler = keras_hub.samplers.RandomSampler(seed=1)
    # A subclass is called, and not replaced by our own.
    lm.compile(sampler=type("Own", (type(sampler),), {})(seed=1))
    decoder = lm.make_generate_function()
    decode = decoder._decode

    def interrupted(*arguments):
        decode(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.generate(PROMPT, max_new_tokens=20)
    monkeypatch.undo()
    assert lm.generate(PROMPT, max_new_tokens=20).startswith(PROMPT)


def test_refused_sampler_changes_nothing(fresh_lm):
    before = fresh_lm.sampler
    with pytest.raises(ValueError, match="must choose one token from its"):
        fresh_lm.compile(sampler="beam")
    assert fresh_lm.sampler is before


def test_weights_are_no_constants_of_the_programs(fresh_lm):
    """Changed weights are used without compiling anything."""
    lm = fresh_lm
    before = lm.generate(PROMPT, max_new_tokens=20, temperature=0)
    kernel = lm.backbone.transformer_layers[0].feedforward.gate.kernel
    old = kernel.numpy()
    kernel.assign(-old)
    try:
        after = lm.generate(PROMPT, max_new_tokens=20, temperature=0)
    finally:
        kernel.assign(old)
    assert before != after
    assert lm.generate_function._decode._cache_size() == 1


def test_decode_step_copies_no_cache(fresh_lm):
    """Caches are written in place: no copy, pad or concatenation of one."""
    lm = fresh_lm
    lm.generate(PROMPT, max_new_tokens=100, seed=0)
    decoder = lm.generate_function
    values = decoder._values()
    settings = SamplingSettings.of(lm.sampler, [0])
    state = jax.eval_shape(
        lambda values, *rest: decoder._prefill_step(values, 256, *rest, [])[0],
        values,
        jax.ShapeDtypeStruct((1, 64), "int32"),
        {
            "prompt_lengths": np.array([3], "int32"),
            "limits": np.array([100], "int32"),
            "stop_token_ids": np.full(8, -1, "int32"),
        },
        settings,
    )
    program = jax.jit(decoder._decode_steps, donate_argnums=1).lower(
        values, state, settings, 8, 0, []
    )
    text = program.compile().as_text()
    # Keys and values of the first layer.
    assert "f32[2,8,256]" in text and "f32[2,256,8]" in text
    copies = [
        line
        for line in text.splitlines()
        if re.search(
            r"= f32\[2,(256,8|256,16|8,256|16,256)\]\S* "
            r"(copy|pad|concatenate|transpose)\(",
            line,
        )
    ]
    assert not copies, copies
    constants = re.findall(r"= f32\[([\d,]+)\]\S* constant\(", text)
    sizes = [math.prod(map(int, shape.split(","))) for shape in constants]
    assert max(sizes, default=0) < 1000


@pytest.mark.parametrize(
    "inputs, arguments, message",
    [
        ("", {}, "Prompt 0 has no tokens"),
        (["a", ""], {}, "Prompt 1 has no tokens"),
        ([], {}, "a list of at least one str. Received: \\[\\]"),
        (None, {}, "a str or a list of at least one str. Received: None"),
        (3, {}, "Received: 3"),
        (["a", 3], {}, "must be strings. Received: 3 of type int at index 1"),
        ("a", {"max_new_tokens": 0}, "an int from 1 to 255.*=0"),
        ("a", {"max_new_tokens": -1}, "an int from 1 to 255.*=-1"),
        ("a", {"max_new_tokens": 2.0}, "an int from 1 to 255.*=2.0"),
        ("a", {"max_new_tokens": 256}, "an int from 1 to 255.*=256"),
        ("a", {"max_length": 0}, "`max_length` must be an int from 2 to 256"),
        ("a", {"max_length": 257}, "`max_length` must be an int from 2"),
        ("a", {"max_length": 9, "max_new_tokens": 9}, "not both"),
        ("stars " * 9, {"max_length": 4}, "no room for a new token in a max"),
        ("a", {"truncation": "right"}, "`truncation` must be one of"),
        ("a", {"max_new_tokens": True}, "an int from 1 to 255.*=True"),
        ("a", {"seed": "3"}, "`seed` must be an int from 0.*'3'"),
        ("a", {"temperature": None}, "`temperature` must be at.*=None"),
        ("a", {"stop_token_ids": "foo"}, "must be a list of ids out of"),
        ("a", {"stop_token_ids": [1.7]}, "must be a list of ids out of"),
        ("a", {"stop_strings": 3}, "`stop_strings` must be a str or a list"),
        ("a", {"seed": -1}, "`seed` must be an int from 0"),
        ("a", {"seed": [1, 2]}, "hold one for each of the 1 prompts"),
        ("a", {"temperature": -1}, "`temperature` must be at least 0"),
        ("a", {"stop_token_ids": [100000]}, "must be a list of ids out of"),
        ("a", {"stop_strings": ""}, "`stop_strings` must be a str or a list"),
        ("a", {"stop_strings": [3]}, "`stop_strings` must be a str or a"),
    ],
)
def test_wrong_input(lm, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(inputs, **arguments)
    if isinstance(inputs, str):
        with pytest.raises(ValueError, match=message):
            lm.stream(inputs, **arguments)


def test_unknown_argument(lm):
    with pytest.raises(TypeError, match="Unknown arguments: \\['temp'\\]"):
        lm.generate("a", temp=1)


def test_wrong_input_to_stream(lm):
    with pytest.raises(ValueError, match="takes one prompt, a str"):
        lm.stream(["a"])
    with pytest.raises(ValueError, match="`tokens_per_dispatch` must be a"):
        lm.stream("a", tokens_per_dispatch=0)


@pytest.mark.parametrize(
    "inputs, arguments, message",
    [
        ("text", {}, "takes a dict with 'token_ids' and 'padding_mask'"),
        (([1, 2], [1, 1]), {}, "must have the same shape"),
        (([[1, 2]], [[1]]), {}, "must have the same shape"),
        (([[0, 1]], [[0, 1]]), {}, "pad on the right"),
        (([[999, 0]], [[1, 0]]), {}, "beyond the model's vocabulary.*999"),
        (([[-7, 0]], [[1, 0]]), {}, "beyond the model's vocabulary.*-7"),
        (([[1, 0]], [[1, 0]]), {"max_length": 0}, "from 2 to 256.*=0"),
        (([[1, 0]], [[1, 0]]), {"stop_strings": "a"}, "needs a tokenizer"),
        (([[1, 0]], [[1, 0]]), {"stop_token_ids": "auto"}, "Pass a list of"),
    ],
)
def test_wrong_token_ids(lm, inputs, arguments, message):
    bare = BwETAFCausalLM(lm.backbone)
    if isinstance(inputs, tuple):
        inputs = dict(zip(("token_ids", "padding_mask"), inputs, strict=True))
    with pytest.raises(ValueError, match=message):
        bare.generate(inputs, **{"stop_token_ids": None, **arguments})
    with pytest.raises(ValueError, match="`stream` needs a tokenizer"):
        bare.stream("text")


def test_prompt_buckets():
    sizes = sorted({prompt_bucket(size) for size in range(1, 2049)})
    assert sizes == [
        *(32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    ]
    for smaller, size in zip([0, *sizes], sizes, strict=False):
        assert shorter_prompts(size) == smaller
        assert shorter_prompts(smaller + 1) == smaller
    assert all(size <= prompt_bucket(size) for size in range(1, 2049))


@pytest.mark.slow
@pytest.mark.parametrize(
    "temperature", [pytest.param(0, marks=pytest.mark.slow), 0.9]
)
def test_rows_that_have_ended_leave_the_batch(lm, temperature, monkeypatch):
    """The texts are those of each prompt alone; the batch gets smaller."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 300, n).tolist() for n in (5, 70, 3, 9, 20)]
    limits = [70, 3, 5, 2, 4]
    options = dict(
        max_length=None,
        max_new_tokens=70,
        stop_token_ids=None,
        truncation=None,
        seed=[1, 2, 3, 4, 5],
        sampling={"temperature": temperature},
    )
    request = make_request(lm, prompts, **options)._replace(limits=limits)
    decoder = lm.make_generate_function()
    sizes = []
    decode = type(decoder).decode

    def counted(self, state, *arguments, **keywords):
        sizes.append(len(state.done))
        return decode(self, state, *arguments, **keywords)

    monkeypatch.setattr(type(decoder), "decode", counted)

    def made(request):
        rows = [[] for _ in request.prompts]
        for fresh in Generation(decoder, request).run(64):
            for row, tokens in zip(rows, fresh, strict=True):
                row.extend(tokens)
        return rows

    together = made(request)
    assert [len(row) for row in together] == limits
    assert sizes == [8, 2, 2]
    assert together == [made(request.of_rows([i]))[0] for i in range(5)]


@pytest.mark.slow
def test_a_long_list_goes_through_in_batches(lm, capsys):
    texts = [PROMPT[: 3 + i % 7] for i in range(7)]
    arguments = dict(max_new_tokens=9, seed=list(range(7)), stop_token_ids=None)
    expected = lm.generate(texts, **arguments)
    assert lm.generate(texts, batch_size=3, **arguments) == expected
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="`batch_size` must be"):
        lm.generate(texts, batch_size=0, **arguments)
