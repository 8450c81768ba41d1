"""Vocabularies learnt from a corpus."""

import json
from collections.abc import Iterable

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def train_bpe(texts: Iterable[str], *, largest: int) -> bytes:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of ``texts``, as ``tokenizer.json``.

    Merging ends where every word is one token, or at ``largest`` tokens. All bytes are in the
    vocabulary, so any text can be encoded. Documents start with ``BOS`` and end with ``EOS``.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=largest,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    return json.dumps(json.loads(backend.to_str()), indent=1, ensure_ascii=False).encode()
