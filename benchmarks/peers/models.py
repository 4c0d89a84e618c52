"""The models that are compared: one size, random weights, one interface.

Nothing heavy is imported before a peer is made, which happens in a process of
its own.
"""

import importlib.util

import numpy as np

from benchmarks.peers import llama_cpp

__all__ = ["PEERS", "Peer", "keras_hub_llama", "llama_sizes"]

TOP_P, TEMPERATURE = 0.92, 0.8


class Peer:
    """A model that continues prompts of random tokens.

    Args:
        config: dict. Arguments of `BwETAFBackbone`.
        dtype: str.
        folder: Path. What `prepare` has written is in it.
    """

    requires = ()
    # What a program of its own would import.
    imports = ""

    @classmethod
    def missing(cls):
        """Names of the packages that are not installed."""
        return [
            name
            for name in cls.requires
            if importlib.util.find_spec(name) is None
        ]

    @classmethod
    def takes(cls, batch, prompt, new, sampled):
        """Whether it can do this, and does it in a time worth measuring."""
        return True

    @classmethod
    def prepare(cls, config, folder):
        """Writes the files that the model is made of, if there are any."""

    def generate(self, batch, prompt, new, sampled):
        """Makes `new` tokens after each of `batch` prompts.

        Args:
            batch, prompt, new: int. Rows, and tokens of each.
            sampled: bool. Top-p sampling, or greedy.
        """
        raise NotImplementedError


class KerasBwETAF(Peer):
    """`BwETAFCausalLM.generate`."""

    requires = ("keras_bwetaf",)
    imports = "import keras_bwetaf"

    def __init__(self, config, dtype, folder):
        import keras_bwetaf

        backbone = keras_bwetaf.BwETAFBackbone(**config, dtype=dtype)
        self._lm = keras_bwetaf.BwETAFCausalLM(backbone)
        self._vocabulary_size = config["vocabulary_size"]

    def generate(self, batch, prompt, new, sampled):
        token_ids = random_tokens(self._vocabulary_size, (batch, prompt))
        self._lm.generate(
            {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)},
            max_new_tokens=new,
            stop_token_ids=None,
            temperature=TEMPERATURE if sampled else 0,
            top_p=TOP_P,
            seed=0,
        )

    def ragged(self, count, shortest, longest, new, rows_per_call):
        """Continues prompts of different lengths, which stop anywhere.

        Args:
            count: int. How many prompts.
            shortest, longest: int. Tokens of a prompt.
            new: int. Most new tokens of a row; half as many on average, as one
                token id in `new / 2` stops it.
            rows_per_call: int.

        Returns:
            int, how many new tokens there are.
        """
        rng = np.random.default_rng(1)
        lengths = rng.integers(shortest, longest, count, endpoint=True)
        shape = (count, longest)
        is_prompt = np.arange(longest) < lengths[:, None]
        token_ids = random_tokens(self._vocabulary_size, shape) * is_prompt
        stop = list(range(0, self._vocabulary_size, new // 2))
        num_new = 0
        for start in range(0, count, rows_per_call):
            rows = slice(start, start + rows_per_call)
            outputs = self._lm.generate(
                {
                    "token_ids": token_ids[rows],
                    "padding_mask": is_prompt[rows].astype("int32"),
                },
                max_new_tokens=new,
                stop_token_ids=stop,
                strip_prompt=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=list(range(count))[rows],
            )
            num_new += int(outputs["padding_mask"].sum())
        return num_new


class KerasHub(Peer):
    """KerasHub's Llama on JAX. Its sampler is compiled in."""

    requires = ("keras_hub", "jax")
    imports = "import keras_hub"

    def __init__(self, config, dtype, folder):
        import keras_hub

        self._lms = {}
        backbone = keras_hub_llama(config, dtype)
        for sampled in (False, True):
            top_p = keras_hub.samplers.TopPSampler(
                p=TOP_P, temperature=TEMPERATURE, seed=0
            )
            lm = keras_hub.models.LlamaCausalLM(backbone)
            lm.compile(sampler=top_p if sampled else "greedy")
            self._lms[sampled] = lm
        self._vocabulary_size = config["vocabulary_size"]

    def generate(self, batch, prompt, new, sampled):
        token_ids = random_tokens(self._vocabulary_size, (batch, prompt))
        inputs = {
            "token_ids": np.pad(token_ids, ((0, 0), (0, new))),
            "padding_mask": np.pad(np.ones_like(token_ids), ((0, 0), (0, new))),
        }
        self._lms[sampled].generate(inputs, stop_token_ids=None)


class Transformers(Peer):
    """transformers' Llama on PyTorch, in inference mode.

    Its cache is the dynamic one, the default; a static one was no faster.
    """

    requires = ("transformers", "torch")
    imports = "import torch\nfrom transformers import LlamaForCausalLM"

    def __init__(self, config, dtype, folder):
        import torch
        import transformers

        sizes = llama_sizes(config)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=sizes["vocabulary_size"],
                hidden_size=sizes["hidden_dim"],
                intermediate_size=sizes["intermediate_dim"],
                num_hidden_layers=sizes["num_layers"],
                num_attention_heads=sizes["num_query_heads"],
                num_key_value_heads=sizes["num_key_value_heads"],
                max_position_embeddings=config["max_sequence_length"],
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(self._device, getattr(torch, dtype))
        self._model = model.eval()
        self._vocabulary_size = config["vocabulary_size"]

    def generate(self, batch, prompt, new, sampled):
        import torch

        token_ids = torch.from_numpy(
            random_tokens(self._vocabulary_size, (batch, prompt))
        ).to(self._device, torch.int64)
        how = {"do_sample": False}
        if sampled:
            how = dict(
                do_sample=True, top_p=TOP_P, top_k=0, temperature=TEMPERATURE
            )
        with torch.inference_mode():
            tokens = self._model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=new,
                **how,
            )
        tokens.cpu()


class BwETAF(Peer):
    """The original, which samples one row and reads prompts by the token."""

    requires = ("BwETAF",)
    # Importing it downloads a tokenizer.
    imports = (
        "from unittest import mock\n"
        "with mock.patch('tiktoken.get_encoding'): import BwETAF"
    )

    @classmethod
    def takes(cls, batch, prompt, new, sampled):
        return batch == 1 and sampled

    def __init__(self, config, dtype, folder):
        from benchmarks import original

        self._generate = original.KV_caching(
            original.model(dtype, config=config),
            top_p=TOP_P,
            temperature=TEMPERATURE,
        )
        self._vocabulary_size = config["vocabulary_size"]

    def generate(self, batch, prompt, new, sampled):
        (token_ids,) = random_tokens(self._vocabulary_size, (1, prompt))
        list(self._generate(token_ids, max_len=new))


class LlamaCpp(Peer):
    """llama.cpp on a Llama that is written here; one row at a time.

    It has two threads, memory-mapped weights, batches of 512 tokens for the
    prompt, and logits of the last token only. Its cache is in float16, as is
    its default.
    """

    requires = ("llama_cpp", "gguf")
    imports = "import llama_cpp"
    file_type = "F32"

    @classmethod
    def takes(cls, batch, prompt, new, sampled):
        return batch == 1

    @classmethod
    def prepare(cls, config, folder):
        llama_cpp.write_gguf(
            folder / f"{cls.file_type}.gguf", llama_sizes(config), cls.file_type
        )

    def __init__(self, config, dtype, folder):
        self._model = llama_cpp.Model(folder / f"{self.file_type}.gguf")
        self._vocabulary_size = config["vocabulary_size"]

    def generate(self, batch, prompt, new, sampled):
        (token_ids,) = random_tokens(self._vocabulary_size, (1, prompt))
        top_p, temperature = (TOP_P, TEMPERATURE) if sampled else (1, 0)
        self._model.generate(token_ids, new, top_p, temperature)


class LlamaCppF16(LlamaCpp):
    """The same with weights in float16."""

    file_type = "F16"


class LlamaCppQ8(LlamaCpp):
    """The same with weights of 8 bits, and a scale for each 32."""

    file_type = "Q8_0"


OURS = "keras_bwetaf"
PEERS = {
    OURS: KerasBwETAF,
    "KerasHub": KerasHub,
    "transformers": Transformers,
    "BwETAF": BwETAF,
    "llama.cpp f32": LlamaCpp,
    "llama.cpp f16": LlamaCppF16,
    "llama.cpp Q8_0": LlamaCppQ8,
}


def random_tokens(vocabulary_size, shape):
    return np.random.default_rng(0).integers(1, vocabulary_size, shape, "int32")


def llama_sizes(config):
    """What a Llama of the same size has in common with a backbone."""
    names = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "intermediate_dim",
    )
    return {name: config[name] for name in names}


def keras_hub_llama(config, dtype):
    """KerasHub's `LlamaBackbone` of the same size."""
    import keras_hub

    return keras_hub.models.LlamaBackbone(
        **llama_sizes(config), tie_word_embeddings=True, dtype=dtype
    )
