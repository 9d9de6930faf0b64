"""Tiny checkpoints with a tokenizer of single characters, as safetensors, pickles and GGUF."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import tiny_model

CHARACTERS = "\n" + string.printable[:94]


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 99 tokens: four special ones and printable characters."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_dense(path: Path) -> Path:
    """Writes a dense Llama that never ends a text, with tokenizer, as safetensors."""
    tiny_model("llama", initializer_range=0.3, eos_token_id=None).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def save_gguf(path: Path, model) -> Path:
    """Writes a Llama as one GGUF file in float32, with a byte-level tokenizer of its vocabulary size."""
    import gguf  # whoever needs no such file need not have it

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = ["<unk>", "<s>", "</s>", "he", "ll", *(chr(33 + i) for i in range(config.vocab_size - 5))]
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _gguf_tensor(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def _gguf_name(name: str) -> str:
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _gguf_tensor(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """GGUF stores the two halves of every query and key head interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if projection in name:
            halves = tensor.view(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
            return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor.contiguous()
