"""Our answers beside those of the harness's own model, on our export."""

import json

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import keras_bwetaf
from keras_bwetaf.evaluation import perplexity
from keras_bwetaf.evaluation.harness import HarnessModel, evaluate_tasks
from tests import trained
from tests.evaluation import tasks

COUNT = 12


@pytest.fixture(scope="module")
def lm():
    return keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks.write(folder, COUNT)
    return folder


def answers(results, name):
    """What the model answered to each request of a task, in order."""
    samples = sorted(results["samples"][name], key=lambda each: each["doc_id"])
    return [each["resps"] for each in samples]


@pytest.fixture(scope="module")
def both(lm, folder, tmp_path_factory):
    """The results of ours, and of the harness's own model."""
    exported = tmp_path_factory.mktemp("exported") / "torch"
    lm.export_to_transformers(exported)
    ours = evaluate_tasks(
        lm, tasks.NAMES, include_path=folder, log_samples=True
    )
    theirs = lm_eval.simple_evaluate(
        HFLM(
            str(exported),
            trust_remote_code=True,
            dtype="float32",
            device="cpu",
            batch_size=4,
        ),
        tasks=list(tasks.NAMES),
        task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
    )
    return ours, theirs


@pytest.mark.slow
def test_choices_are_those_of_the_harness(both):
    ours, theirs = (answers(each, tasks.NAMES[0]) for each in both)
    for received, expected in zip(ours, theirs, strict=True):
        for ((a, greedy),), ((b, is_greedy),) in zip(
            received, expected, strict=True
        ):
            assert abs(a - b) < 1e-3
            assert greedy == is_greedy
    ours, theirs = (each["results"][tasks.NAMES[0]] for each in both)
    assert ours["acc,none"] == theirs["acc,none"] > 0.5
    assert ours["acc_norm,none"] == theirs["acc_norm,none"]


@pytest.mark.slow
def test_rolling_is_that_of_the_harness(both, lm, folder):
    ours, theirs = (answers(each, tasks.NAMES[1]) for each in both)
    np.testing.assert_allclose(
        np.ravel(ours), np.ravel(theirs), atol=1e-3, rtol=0
    )
    # And `perplexity` has the same figures, without windows.
    texts = [
        json.loads(line)["text"]
        for line in (folder / "stories.jsonl").read_text().splitlines()
    ]
    result = perplexity(lm, texts)
    np.testing.assert_allclose(
        [each.nats for each in result.documents], -np.ravel(ours), atol=1e-3
    )
    np.testing.assert_allclose(
        result.bits_per_byte,
        both[0]["results"][tasks.NAMES[1]]["bits_per_byte,none"],
        rtol=1e-5,
    )


@pytest.mark.slow
def test_generated_text_is_that_of_the_harness(both):
    ours, theirs = (answers(each, tasks.NAMES[2]) for each in both)
    assert ours == theirs
    assert len({str(each) for each in ours}) > COUNT // 2


class Asked(HarnessModel):
    """Counts what it is asked."""

    num_asked = 0

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.num_asked += len(requests)
        return super()._loglikelihood_tokens(requests, **kwargs)


@pytest.mark.slow
def test_what_is_answered_is_not_asked_again(lm, folder, tmp_path):
    model = Asked(lm)
    scores = []
    for _ in range(2):
        results = lm_eval.simple_evaluate(
            model,
            tasks=[tasks.NAMES[0]],
            task_manager=TaskManager(include_path=str(folder)),
            use_cache=str(tmp_path / "answers"),
            bootstrap_iters=0,
        )
        scores.append(results["results"])
    assert scores[0] == scores[1]
    assert model.num_asked == 3 * COUNT


def instances(*arguments, kind="loglikelihood"):
    return [
        lm_eval.api.instance.Instance(kind, {}, each, 0) for each in arguments
    ]


def test_long_contexts_lose_their_beginning(lm):
    model = HarnessModel(lm)
    context = " ".join(trained.documents(trained.FOLDER)["val"][:9])
    requests = instances((context, " the end"), (context, " a dog"))
    together = model.loglikelihood(requests)
    assert together == [model.loglikelihood([each])[0] for each in requests]
    tokens = model.tok_encode(context)
    room = lm.backbone.max_sequence_length
    assert len(tokens) > room
    (score,) = model._loglikelihood_tokens(
        [(("", ""), tokens[-room:], model.tok_encode(" the end"))]
    )
    np.testing.assert_allclose(score[0], together[0][0], rtol=1e-5)
    with pytest.raises(ValueError, match="shorter than the context"):
        model.loglikelihood(instances(("a", context)))


def test_settings_of_generation(lm):
    model = HarnessModel(lm, max_new_tokens=5)

    def generate(**settings):
        (text,) = model.generate_until(
            instances(("Once upon a time", settings), kind="generate_until")
        )
        return text

    greedy = generate(until=[])
    assert len(model.tok_encode(greedy)) == 5
    assert generate(until="\n", do_sample=False, temperature=9.0) == greedy
    sampled = generate(do_sample=True, temperature=2.0, max_gen_toks=20)
    assert not sampled.startswith(greedy)
    with pytest.raises(ValueError, match="Received: num_beams"):
        generate(num_beams=3)


def test_a_model_without_a_tokenizer():
    backbone = keras_bwetaf.BwETAFBackbone.from_preset(trained.FOLDER)
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessModel(keras_bwetaf.BwETAFCausalLM(backbone))


@pytest.mark.slow
def test_unknown_tasks(lm):
    with pytest.raises(ValueError, match=r"piqua \(did you mean piqa"):
        evaluate_tasks(lm, ["piqua"])
