"""Slow packages that Keras and KerasHub import, put off until they are needed.

TensorFlow takes longer than all the rest, and scikit-learn, matplotlib, pandas
and Grain take half of that. While Keras and KerasHub are imported, stand-ins
take their places. Later, a stand-in answers what is asked of everybody's data,
such as whether it is a tensor, and imports the package for anything else.
"""

import contextlib
import itertools
import operator
import os
import pkgutil
import re
import sys
import tempfile
import types
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

# What TensorFlow writes to the terminal by itself when it is imported. No
# environment variable turns it off.
_CHATTER = re.compile(
    r"WARNING: All log messages before absl::InitializeLog"
    r"|[IWE]\d{4} [\d:. ]+ (port|cudart_stub|cuda_\w+|computation_placer"
    r"|cpu_feature_guard)\.cc:"
    r"|To enable the following instructions: "
)


@contextlib.contextmanager
def without_chatter():
    """Keeps TensorFlow's own log lines from the terminal, and only those."""
    try:
        terminal = os.dup(2)
    except OSError:  # No standard error, as under pythonw.
        yield
        return
    with tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                if not _CHATTER.match(line):
                    print(line, file=sys.stderr)


class _Later(types.ModuleType):
    """Stands for a module, or a part of one, that is imported when needed.

    Its name is the path to what it stands for.
    """

    def __getattr__(self, name):
        root = self.__name__.partition(".")[0]
        places = sys.modules.get(root), sys.modules.get(self.__name__)
        # What Python asks all modules, such as where their files are.
        if name.startswith("__") and any(isinstance(x, _Later) for x in places):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        real = _loaded(path)
        if real is None:
            real = ANSWERS[path] if path in ANSWERS else _load(path)
        return real


class _Class(type):
    """Stands for a class: without the module, nothing is an instance of it.

    Its name is the path to what it stands for.
    """

    def __instancecheck__(cls, instance):
        real = _loaded(cls.__name__)
        return real is not None and isinstance(instance, real)

    def __getattr__(cls, name):
        return getattr(_load(cls.__name__), name)


class _Wrapper:
    """Stands for a class of Keras that is derived from scikit-learn's.

    Args:
        path: str. The path to the class.
    """

    def __init__(self, path):
        self._path = path

    def __call__(self, *args, **kwargs):
        return _load(self._path)(*args, **kwargs)

    def __mro_entries__(self, bases):
        return (_load(self._path),)

    def __instancecheck__(self, instance):
        real = _loaded(self._path)
        return real is not None and isinstance(instance, real)

    def __getattr__(self, name):
        return getattr(_load(self._path), name)


class _Module:
    """Stands for a class as the base of others, which get the real one."""


_seeds = []  # For TensorFlow, once it is imported.


def _executing_eagerly():
    executing_eagerly = _loaded("tensorflow.executing_eagerly")
    return executing_eagerly is None or executing_eagerly()


def _loaded(path):
    """What a path leads to, or None if it is not imported."""
    root, _, rest = path.partition(".")
    module = sys.modules.get(root)
    if module is None or isinstance(module, _Later):
        return None
    try:
        return operator.attrgetter(rest)(module)
    except AttributeError:  # Another thread is importing it.
        return None


def _load(path):
    """Imports what a path leads to."""
    _remove_stand_ins()
    return pkgutil.resolve_name(path)


WRAPPERS = "keras.src.wrappers.sklearn_wrapper"
LEARNER = "tensorflow_text.tools.wordpiece_vocab"
# By the package whose import they are for.
STAND_INS = {
    "keras": ("matplotlib", "matplotlib.pyplot", "pandas"),
    "keras_hub": (
        "grain",
        "rouge_score",
        "tensorflow",
        "tensorflow_text",
        LEARNER,
    ),
}
PARTS = (
    "matplotlib.patches",
    "matplotlib.pyplot",
    "rouge_score.rouge_scorer",
    "tensorflow.data",
    "tensorflow.io",
    "tensorflow.io.gfile",
    "tensorflow.random",
    f"{LEARNER}.wordpiece_tokenizer_learner_lib",
)
CLASSES = (
    "grain.DataLoader",
    "grain.IterDataset",
    "grain.MapDataset",
    "pandas.DataFrame",
    "pandas.Series",
    "tensorflow.DType",
    "tensorflow.RaggedTensor",
    "tensorflow.Tensor",
    "tensorflow.TensorShape",
    "tensorflow.TypeSpec",
    "tensorflow.data.Dataset",
)
# What is asked by KerasHub, at import, of data of any kind and of names of
# presets; and by Keras, when it saves a model or sets the random seed.
ANSWERS = {
    **{path: _Later(path) for path in PARTS},
    **{path: _Class(path, (), {}) for path in CLASSES},
    **{
        path: _Wrapper(path)
        for path in (
            f"{WRAPPERS}.SKLearnClassifier",
            f"{WRAPPERS}.SKLearnRegressor",
            f"{WRAPPERS}.SKLearnTransformer",
        )
    },
    "tensorflow.Module": _Module,
    "tensorflow.executing_eagerly": _executing_eagerly,
    "tensorflow.io.gfile.get_registered_schemes": list,
    "tensorflow.random.set_seed": _seeds.append,
}


def _remove_stand_ins():
    for name in itertools.chain(*STAND_INS.values(), [WRAPPERS]):
        if isinstance(sys.modules.get(name), _Later):
            del sys.modules[name]


@contextlib.contextmanager
def stand_ins(package):
    """Has what imports slow packages get stand-ins of those not imported yet.

    Args:
        package: str. For whom they are, a key of `STAND_INS`.
    """
    roots = {name.partition(".")[0] for name in STAND_INS[package]}
    absent = {
        root
        for root in roots
        if root not in sys.modules and _is_installed(root)
    }
    if "tensorflow" in sys.modules:  # It comes with the other, or not at all.
        absent.discard("tensorflow_text")
    for name in STAND_INS[package]:
        if name.partition(".")[0] in absent:
            sys.modules[name] = _Later(name)
    try:
        yield
    finally:
        _remove_stand_ins()


@contextlib.contextmanager
def _around_keras():
    with stand_ins("keras"):
        if "sklearn" not in sys.modules and _is_installed("sklearn"):
            # Only these classes of Keras need scikit-learn.
            sys.modules[WRAPPERS] = _Later(WRAPPERS)
        yield


@contextlib.contextmanager
def _around_keras_hub():
    from keras.src.utils import module_utils

    with stand_ins("keras_hub"):
        if isinstance(sys.modules.get("tensorflow"), _Later):
            # Keras looks whether there is one, and keeps it.
            module_utils.tensorflow.available  # noqa: B018
        yield


def _is_installed(name):
    spec = PathFinder.find_spec(name)
    return spec is not None and spec.has_location  # No folder left behind.


@contextlib.contextmanager
def _quiet_and_off_gpus():
    """Keeps TensorFlow from the terminal, and from JAX's memory."""
    with without_chatter():
        yield
        keep_off_gpus()
    tensorflow = sys.modules["tensorflow"]
    for each in _Module.__subclasses__():
        each.__bases__ = (tensorflow.Module,)
    for seed in _seeds[-1:]:
        tensorflow.random.set_seed(seed)


def keep_off_gpus():
    """Has TensorFlow, which is imported, take no GPU."""
    with contextlib.suppress(RuntimeError):  # It is in use already.
        sys.modules["tensorflow"].config.set_visible_devices([], "GPU")


class _Finder(MetaPathFinder):
    """Imports some packages within a context."""

    contexts = {
        "keras": _around_keras,
        "keras_hub": _around_keras_hub,
        "tensorflow": _quiet_and_off_gpus,
    }

    def find_spec(self, name, path=None, target=None):
        if name not in self.contexts:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.has_location:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module):
                with self.contexts[name]():
                    execute(module)

            loader.exec_module = exec_module
        return spec


def postpone():
    """Has Keras and KerasHub, if not imported yet, do without slow packages.

    TensorFlow, whoever imports it later, is quiet and takes no GPU.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # Or it complains.
    # Whoever imported TensorFlow without KerasHub has a use for it.
    if {"keras_hub", "tensorflow"} <= sys.modules.keys():
        keep_off_gpus()
    sys.meta_path.insert(0, _Finder())
