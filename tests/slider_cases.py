"""A tiny model with a vocabulary of words, and one that takes sizes, for the slider's tests."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = {"</s>": 0} | {f"w{i}": i for i in range(1, 40)}
IDS = torch.randint(1, 40, (4, 12), generator=torch.Generator().manual_seed(0))


def words():
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def tiny(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


class Elastic:
    """A model that only claims to change its size; below one half it is another one."""

    def __init__(self):
        self.large, self.small = tiny(1), tiny(2)
        self.model = self.large

    def resize(self, keep):
        self.model = self.large if keep >= 0.5 else self.small
        return self.planned(keep)

    def planned(self, keep):
        return SimpleNamespace(entries=[SimpleNamespace(bytes=int(1000 * keep), dense_bytes=1000)])
