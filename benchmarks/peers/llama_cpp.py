"""A Llama with random weights as a GGUF file, and llama.cpp that runs it.

Generation calls llama.cpp's C functions, as its own programs do: the Python
class of llama-cpp-python is slower, and wants a tokenizer.
"""

import ctypes
import os

import numpy as np

__all__ = ["Model", "write_gguf"]

MOST_TOKENS_AT_ONCE = 512


def write_gguf(path, sizes, file_type):
    """Writes a Llama with tied embeddings and no tokenizer.

    Args:
        path: Path.
        sizes: dict. What `llama_sizes` returns.
        file_type: str. `"F32"`, `"F16"` or `"Q8_0"`: how matrices are stored.
    """
    import gguf

    hidden_dim, num_heads = sizes["hidden_dim"], sizes["num_query_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(sizes["vocabulary_size"])
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden_dim)
    writer.add_block_count(sizes["num_layers"])
    writer.add_feed_forward_length(sizes["intermediate_dim"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_rope_dimension_count(hidden_dim // num_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32"])
    writer.add_tokenizer_model("no_vocab")

    quantization = gguf.GGMLQuantizationType[file_type]
    rng = np.random.default_rng(0)
    for name, shape in shapes(sizes).items():
        if len(shape) == 1:  # A norm's scale.
            writer.add_tensor(name, np.ones(shape, "float32"))
            continue
        weights = 0.02 * rng.standard_normal(shape, "float32")
        weights = gguf.quants.quantize(weights, quantization)
        writer.add_tensor(name, weights, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(sizes):
    """The tensors' names, and their shapes as `(outputs, inputs)`."""
    hidden_dim, inner = sizes["hidden_dim"], sizes["intermediate_dim"]
    groups = sizes["num_query_heads"] // sizes["num_key_value_heads"]
    narrow = hidden_dim // groups
    block = {
        "attn_norm": (hidden_dim,),
        "attn_q": (hidden_dim, hidden_dim),
        "attn_k": (narrow, hidden_dim),
        "attn_v": (narrow, hidden_dim),
        "attn_output": (hidden_dim, hidden_dim),
        "ffn_norm": (hidden_dim,),
        "ffn_gate": (inner, hidden_dim),
        "ffn_up": (inner, hidden_dim),
        "ffn_down": (hidden_dim, inner),
    }
    return {
        "token_embd.weight": (sizes["vocabulary_size"], hidden_dim),
        "output_norm.weight": (hidden_dim,),
        **{
            f"blk.{number}.{name}.weight": shape
            for number in range(sizes["num_layers"])
            for name, shape in block.items()
        },
    }


class Model:
    """llama.cpp with a GGUF file, and a context for each length asked for."""

    def __init__(self, path):
        import llama_cpp

        self._cpp = llama_cpp
        # It is kept, since the library calls it for as long as it lives.
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), parameters
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {path}")
        self._contexts = {}

    def generate(self, token_ids, num_new, top_p, temperature):
        """Continues one prompt.

        Args:
            token_ids: int32 array `(length,)`.
            num_new: int.
            top_p: float.
            temperature: float; 0 for greedy.

        Returns:
            list of int, the new tokens.
        """
        cpp = self._cpp
        context = self._context(len(token_ids) + num_new)
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        sampler = self._sampler(top_p, temperature)
        for start in range(0, len(token_ids), MOST_TOKENS_AT_ONCE):
            part = token_ids[start : start + MOST_TOKENS_AT_ONCE]
            self._decode(context, part.tolist())
        tokens = []
        while True:
            tokens.append(cpp.llama_sampler_sample(sampler, context, -1))
            if len(tokens) == num_new:
                break
            self._decode(context, tokens[-1:])
        cpp.llama_sampler_free(sampler)
        return tokens

    def _context(self, length):
        if length not in self._contexts:
            parameters = self._cpp.llama_context_default_params()
            parameters.n_ctx = length
            parameters.n_batch = parameters.n_ubatch = MOST_TOKENS_AT_ONCE
            parameters.n_threads = len(os.sched_getaffinity(0))
            parameters.n_threads_batch = parameters.n_threads
            self._contexts[length] = self._cpp.llama_init_from_model(
                self._model, parameters
            )
        return self._contexts[length]

    def _sampler(self, top_p, temperature):
        cpp = self._cpp
        sampler = cpp.llama_sampler_chain_init(
            cpp.llama_sampler_chain_default_params()
        )
        steps = [cpp.llama_sampler_init_greedy()]
        if temperature:
            steps = [
                cpp.llama_sampler_init_temp(temperature),
                cpp.llama_sampler_init_top_p(top_p, 1),
                cpp.llama_sampler_init_dist(0),
            ]
        for step in steps:
            cpp.llama_sampler_chain_add(sampler, step)
        return sampler

    def _decode(self, context, tokens):
        array = (self._cpp.llama_token * len(tokens))(*tokens)
        batch = self._cpp.llama_batch_get_one(array, len(tokens))
        if self._cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed for {len(tokens)} tokens")
