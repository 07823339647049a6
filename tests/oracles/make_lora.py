"""Write tests/golden_lora: adapters that PEFT saved, and the weights that PEFT merges them into.

Needs peft and accelerate beside torch and transformers:

    python tests/oracles/make_lora.py tests/golden/apple tests/golden_lora

Imports nothing of this repository. The base is the language model of the golden checkpoint, read
into transformers' Qwen2 in float32; the adapters' weights are random.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

CASES = {
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "o_proj": 8},
        "alpha_pattern": {"v_proj": 3, "^model.layers.0.self_attn.o_proj": 5},
    },
    "rslora": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        # For Linear layers, PEFT takes this back with a warning.
        "fan_in_fan_out": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj", "k_proj"],
        "modules_to_save": ["lm_head"],
    },
    "embedding": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["embed_tokens", "q_proj"],
    },
}


def base_model(folder: Path) -> Qwen2ForCausalLM:
    raw = json.loads((folder / "config.json").read_text())
    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in raw.items() if k != "model_type"}))
    state = load_file(folder / "model.safetensors")
    state = {k: v.float() for k, v in state.items() if k in model.state_dict()}
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    before = base_model(arguments.base).state_dict()
    for number, (name, settings) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = peft.get_peft_model(
            base_model(arguments.base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
                parameter.copy_(parameter.bfloat16())
        folder = arguments.out / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        config["base_model_name_or_path"] = None
        file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        after = model.merge_and_unload().state_dict()
        changed = {k: v.numpy() for k, v in after.items() if not torch.equal(v, before[k])}
        np.savez_compressed(folder / "merged.npz", **changed)
    versions = {m.__name__: m.__version__ for m in (peft, torch, transformers)}
    (arguments.out / "PROVENANCE.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
