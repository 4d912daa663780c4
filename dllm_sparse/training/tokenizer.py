"""The twins' tokenizer: byte-level BPE, exact on any text, every digit a token of its own."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dllm_sparse.types import UsageError

SPECIAL_TOKENS = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "mask": "<|mdm_mask|>"}
"""LLaDA's names; as there, padding is the end-of-text token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer with `vocab_size` entries: 256 bytes, the special tokens (first ids) and merges.

    Encoding puts the beginning-of-text token in front unless special tokens are switched off.
    """
    special = list(dict.fromkeys(SPECIAL_TOKENS.values()))
    if vocab_size < 256 + len(special):
        raise UsageError(f"data.vocab_size={vocab_size}: at least {256 + len(special)} (all bytes and special tokens)")
    tokenizer = Tokenizer(models.BPE())
    # Single digits: sums and counts are then about digits, not about which numbers BPE happened to merge.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UsageError(
            f"the corpus yields only {tokenizer.get_vocab_size()} of {vocab_size} entries; lower data.vocab_size"
        )
    bos = SPECIAL_TOKENS["bos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of bos, eos, pad and mask."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {role: vocabulary[token] for role, token in SPECIAL_TOKENS.items()}
