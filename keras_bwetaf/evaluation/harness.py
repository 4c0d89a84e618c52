"""A model as lm-evaluation-harness sees it, and its tasks."""

from collections.abc import Sequence
from typing import Any

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import positive_int
from keras_bwetaf.evaluation.scoring import Scorer
from keras_bwetaf.models import BwETAFCausalLM
from keras_bwetaf.names import with_nearest
from keras_bwetaf.optional import import_optional

lm_eval = import_optional("lm_eval", "eval", "Evaluation on tasks")

# After that, which says how to install it.
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import (  # noqa: E402
    get_rolling_token_windows,
    make_disjoint_window,
    make_table,
)

__all__ = ["HarnessModel", "evaluate_tasks", "make_table"]

# What a task may ask of generation, by our names.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A model for `lm_eval.simple_evaluate`.

    Args:
        lm: `BwETAFCausalLM`, with a tokenizer.
        batch_size: int. Rows that are computed together.
        max_new_tokens: int. Of a task that does not say how many it wants.
        seed: int. Of tasks that sample.

    Raises:
        ValueError: If the model has no tokenizer.
        ImportError: From importing this module, if lm-evaluation-harness is
            not installed.

    Example:

    ```python
    model = keras_bwetaf.evaluation.HarnessModel(lm)
    results = lm_eval.simple_evaluate(model, tasks=["piqa"])
    ```
    """

    def __init__(
        self,
        lm: BwETAFCausalLM,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        if lm.preprocessor is None:
            raise ValueError(
                "Tasks are text, and the model has no tokenizer. Give it a "
                "preprocessor."
            )
        self._lm = lm
        self._scorer = Scorer(lm, batch_size)
        self._max_new_tokens = positive_int("max_new_tokens", max_new_tokens)
        self._seed = seed
        self._tokenizer = lm.preprocessor.tokenizer
        self._context = lm.backbone.max_sequence_length

    @property
    def eot_token_id(self):
        return self._tokenizer.end_token_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return list(map(int, self._tokenizer(string)))

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """Continuations of the same context are scored together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            # The last token is predicted, and not read.
            room = self._context + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    "A continuation must be shorter than the context of "
                    f"{self._context} tokens. Received: one of "
                    f"{len(continuation)}"
                )
            groups.setdefault(tuple(context[-room:]), []).append(i)
        alone = [
            (context, *members)
            for context, members in groups.items()
            if len(members) == 1
        ]
        shared = [each for each in groups.items() if len(each[1]) > 1]
        answers: list = [None] * len(requests)

        def answer(i, losses, is_greedy):
            answers[i] = -float(losses.sum()), bool(is_greedy.all())
            self.cache_hook.add_partial(
                "loglikelihood", requests[i][0], answers[i]
            )

        rows = [[*context, *requests[i][2]] for context, i in alone]
        for (_, i), scores in zip(alone, self._scorer.rows(rows), strict=True):
            answer(i, *(x[-len(requests[i][2]) :] for x in scores))
        scores = self._scorer.continuations(
            [
                (context, [requests[i][2] for i in each])
                for context, each in shared
            ]
        )
        for (_, members), of_group in zip(shared, scores, strict=True):
            for i, of_one in zip(members, of_group, strict=True):
                answer(i, *of_one)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        rows, owners, sizes = [], [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self._context,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, windows):
                rows.append([*context, *tokens])
                owners.append(i)
                sizes.append(len(tokens))
        sums = [0.0] * len(requests)
        scores = self._scorer.rows(rows)
        for i, size, (losses, _) in zip(owners, sizes, scores, strict=True):
            sums[i] -= float(losses[-size:].sum())
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial(
                "loglikelihood_rolling", request.args, total
            )
        return sums

    def generate_until(self, requests, disable_tqdm=False):
        answers: list = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            settings = dict(requests[members[0]].args[1])
            texts = self._lm.generate(
                [requests[i].args[0] for i in members],
                strip_prompt=True,
                truncation="left",
                batch_size=self._scorer.batch_size,
                seed=self._seed,
                **self._generation_options(settings),
            )
            for i, text in zip(members, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial(
                    "generate_until", requests[i].args, text
                )
        return answers

    def _generation_options(self, settings):
        """A task's settings as arguments of `generate`."""
        settings = normalize_gen_kwargs(settings, self._max_new_tokens)
        until = settings.pop("until")
        max_new_tokens = settings.pop("max_gen_toks")
        if settings.pop("do_sample", None) is False:
            settings["temperature"] = 0.0
        unknown = settings.keys() - set(SAMPLING)
        if unknown:
            raise ValueError(
                f"A task's generation_kwargs may be {', '.join(SAMPLING)}, "
                "until, do_sample and max_gen_toks. Received: "
                f"{', '.join(sorted(unknown))}"
            )
        return {
            "max_new_tokens": max_new_tokens,
            "stop_strings": [text for text in until if text] or None,
            **settings,
        }


def evaluate_tasks(
    lm: BwETAFCausalLM,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    include_path: PathLike | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks of lm-evaluation-harness.

    Args:
        lm: `BwETAFCausalLM`, with a tokenizer.
        tasks: list of str. Names of tasks.
        batch_size: int. Rows that are computed together.
        include_path: str or path. A folder with tasks of one's own, YAML
            files.
        **options: As `lm_eval.simple_evaluate` takes them, such as `limit`,
            `num_fewshot` and `use_cache`, the path of a file: what is
            answered there is not asked again.

    Returns:
        dict, as `lm_eval.simple_evaluate` returns it. Of several processes,
        each returns the same.

    Raises:
        ValueError: If the model has no tokenizer, or there is no such task.

    Example:

    ```python
    results = keras_bwetaf.evaluation.evaluate_tasks(
        lm, ["piqa", "arc_easy"], limit=100
    )
    print(keras_bwetaf.evaluation.make_table(results))
    ```
    """
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            "Expected names of tasks, as `lm-eval ls tasks` lists them, or "
            "of those in `include_path`. Received: "
            f"{with_nearest(unknown, manager.all_tasks)}"
        )
    return lm_eval.simple_evaluate(
        model=HarnessModel(lm, batch_size),
        tasks=list(tasks),
        task_manager=manager,
        **{"log_samples": False, "bootstrap_iters": 1000, **options},
    )
