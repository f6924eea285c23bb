"""Write a checkpoint as a Hugging Face Llama model folder.

What it is for: rounds the weights to bfloat16 and writes model.safetensors,
config.json and generation_config.json.  Without --checkpoint it writes random
weights of the final shape, for integration work before training has finished.

What it is not for: the tokenizer files (build_tokenizer.py).
"""
import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import model


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--checkpoint")
    ap.add_argument("--out", default=str(Path(__file__).parent.parent / "model"))
    args = ap.parse_args()
    cfg = model.Config()
    params = load_file(args.checkpoint) if args.checkpoint else {k: np.asarray(v) for k, v in model.init_params(cfg, 0).items()}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v).astype(ml_dtypes.bfloat16) for k, v in params.items()},
              out / "model.safetensors", metadata={"format": "pt"})
    pad, _, end = 0, 1, 2  # order of the special tokens in build_tokenizer.py
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size, "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers, "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads, "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_position_embeddings, "rms_norm_eps": cfg.rms_norm_eps, "rope_theta": cfg.rope_theta,
        "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "tie_word_embeddings": True, "bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad,
        "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad, "do_sample": False}, indent=2) + "\n")
    size = (out / "model.safetensors").stat().st_size
    print(f"{sum(v.size for v in params.values())} parameters, {size} bytes")


if __name__ == "__main__":
    main()
