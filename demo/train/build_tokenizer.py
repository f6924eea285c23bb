"""Train the byte-level BPE tokenizer on generated conversations.

What it is for: writes tokenizer.json, tokenizer_config.json (with the chat
template) into the model folder.  Every byte is in the base alphabet, so any
UTF-8 text can be encoded; digits are always single tokens, so numbers are
copied digit by digit.

What it is not for: weights and config.json (export.py).
"""
import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import data

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", default=str(Path(__file__).parent.parent / "model"))
    ap.add_argument("--vocab", type=int, default=1024)
    ap.add_argument("--conversations", type=int, default=6000)
    ap.add_argument("--seed", type=int, default=7)
    args = ap.parse_args()
    r = random.Random(args.seed)

    def texts():
        for _ in range(args.conversations):
            # Only the words matter here: markers are added as special tokens.
            for m in data.conversation(r, 300, drill=r.random() < 0.15):
                yield m["role"] + "\n" + m["content"]

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tok.train_from_iterator(texts(), trainer)
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
        "added_tokens_decoder": {str(i): {"content": s, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
                                 for i, s in enumerate(SPECIAL)},
        "chat_template": CHAT_TEMPLATE,
    }, indent=2) + "\n")
    print("vocabulary", tok.get_vocab_size())


if __name__ == "__main__":
    main()
